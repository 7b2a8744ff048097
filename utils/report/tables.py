"""Tables of ready texts, and how they look in a terminal, in Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.metrics import METRICS, NAN, ClassResult, nanmean
from utils.run.text import one_line, printable
from utils.run.writer import write_whole

# The paper's two columns first.
COLUMNS = ("image_auroc", "pixel_auroc", *(m for m in METRICS if m not in ("image_auroc", "pixel_auroc")), "mad")
TITLES = {
    "image_auroc": "I-AUROC", "pixel_auroc": "P-AUROC", "image_ap": "I-AP", "image_f1max": "I-F1max",
    "pixel_ap": "P-AP", "pixel_f1max": "P-F1max", "aupro": "AUPRO", "mad": "mAD",
}  # fmt: skip
MEAN, BEST = "mean", "best on test"
OWN_METRICS = "As the data set's paper measures"
LATEX = {
    "\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}",
    "^": r"\textasciicircum{}", "~": r"\textasciitilde{}", "±": r"$\pm$", "²": r"$^2$",
}  # fmt: skip
MARKDOWN = {"&": "&amp;", "<": "&lt;", "\\": r"\\", "|": r"\|", "`": r"\`", "*": r"\*"}
FORMULA = ("=", "+", "-", "@")  # spreadsheets compute a cell that begins so


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows (name, column -> text); a text that is not there is shown as `-`. `columns` are keys of TITLES or titles."""

    rows: Sequence[tuple[str, Mapping[str, str]]]
    columns: Sequence[str]
    first: str = "class"
    title: str = ""

    def lines(self) -> list[list[str]]:
        """Header and body, cell by cell, each of one line."""
        head = [self.first, *(TITLES.get(c, c) for c in self.columns)]
        body = ([name, *(row.get(c, "-") for c in self.columns)] for name, row in self.rows)
        return [[one_line(cell) for cell in line] for line in (head, *body)]


def values(result: ClassResult) -> dict[str, float]:
    """The seven metrics and their mean in the tables' order."""
    return {name: getattr(result, name) for name in COLUMNS}


def percent(value: float) -> str:
    """One decimal, - for NaN."""
    return f"{100 * value:.1f}" if value == value else "-"


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    """98.8 [97.1, 99.6]."""
    return percent(value) if interval is None else f"{percent(value)} [{percent(interval[0])}, {percent(interval[1])}]"


def with_deviation(value: float, deviation: float) -> str:
    """98.8 ± 0.3, the mean alone where there is no deviation."""
    return f"{percent(value)} ± {percent(deviation)}" if deviation == deviation else percent(value)


def extra_rows(extra: Mapping[str, Mapping[str, float]]) -> list[tuple[str, Mapping[str, float]]]:
    """Classes and their mean with the metrics of the data set's own, fractions."""
    columns = list(dict.fromkeys(c for row in extra.values() for c in row))
    mean = {c: nanmean([row.get(c, NAN) for row in extra.values()]) for c in columns}
    return [*extra.items(), (MEAN, mean)]


def extra_table(extra: Mapping[str, Mapping[str, float]]) -> Table:
    """The metrics of the data set's own, in per cent."""
    rows = [(name, {c: percent(v) for c, v in row.items()}) for name, row in extra_rows(extra)]
    return Table(rows=rows, columns=tuple(rows[-1][1]), title=OWN_METRICS)


def terminal(table: Table) -> str:
    """Aligned plain text; the first column left, the others right."""
    lines = table.lines()
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([*([table.title] if table.title else []), text[0], "-" * len(text[0]), *text[1:]])


def markdown(table: Table) -> str:
    """A Markdown table under its title."""
    head, *body = ([markdown_text(cell) for cell in line] for line in table.lines())
    lines = [head, ["---", *("---:" for _ in table.columns)], *body]
    title = f"**{table.title}**\n\n" if table.title else ""
    return title + "".join("| " + " | ".join(line) + " |\n" for line in lines)


def markdown_text(text: str) -> str:
    """Without HTML, links and markup."""
    return "".join(MARKDOWN.get(c, c) for c in text).replace("](", r"]\(")


def latex_text(text: str) -> str:
    """Special characters escaped."""
    return "".join(LATEX.get(c, c) for c in text)


def latex(table: Table) -> str:
    """A LaTeX tabular (package booktabs), its title as a comment."""
    head, *body = (" & ".join(map(latex_text, line)) + r" \\" for line in table.lines())
    title = [f"% {table.title}"] if table.title else []
    start = [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule", head, r"\midrule"]
    return "\n".join([*title, *start, *body, r"\bottomrule", r"\end{tabular}", ""])


def csv_text(rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[str], *, first: str = "class") -> str:
    """Comma-separated values under the columns' keys; empty for NaN and for what is not there."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([csv_cell(v) for v in (first, *columns)])
    for name, row in rows:
        writer.writerow([csv_cell(v) for v in (name, *(row.get(c) for c in columns))])
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    """Empty for None and NaN; text of one line, behind an apostrophe where a spreadsheet would see a formula."""
    if isinstance(value, str):
        return one_line(f"'{value}" if value.startswith(FORMULA) else value)
    return "" if value is None or value != value else value


def terminal_page(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables one below the other, then the notes."""
    return "\n\n".join([*map(terminal, tables), "\n".join(map(one_line, notes))])


def markdown_page(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables one below the other, then the notes as a list."""
    listed = "".join(f"- {markdown_text(one_line(note))}\n" for note in notes)
    return "\n".join([*(markdown(table) for table in tables), *([listed] if listed else [])])


def latex_page(tables: Sequence[Table], notes: Sequence[str]) -> str:
    """Tables one below the other, then the notes as comments."""
    return "\n".join(map(latex, tables)) + "".join(f"% {one_line(note)}\n" for note in notes)


def write_all(folder: Path, stem: str, texts: Mapping[str, str]) -> None:
    """One file for each suffix of `texts`, named `stem`; bytes of names that are no UTF-8 as \\udcff."""
    for suffix, text in texts.items():
        write_whole(folder / f"{stem}.{suffix}", printable(text).encode())
