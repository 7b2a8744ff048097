"""Result tables: terminal, JSON, CSV, Markdown and LaTeX, one row a class and their mean."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from utils.log import plain
from utils.metrics import METRICS, ClassResult, mean_results

# The paper's two columns first.
COLUMNS = ("image_auroc", "pixel_auroc", *(m for m in METRICS if m not in ("image_auroc", "pixel_auroc")), "mad")
TITLES = {
    "image_auroc": "I-AUROC", "pixel_auroc": "P-AUROC", "image_ap": "I-AP", "image_f1max": "I-F1max",
    "pixel_ap": "P-AP", "pixel_f1max": "P-F1max", "aupro": "AUPRO", "mad": "mAD",
}  # fmt: skip
MEAN, BEST = "mean", "best on test"
Best = Mapping[str, Mapping[str, float]]


def values(result: ClassResult) -> dict[str, float]:
    """The seven metrics and their mean in the tables' order."""
    return {name: getattr(result, name) for name in COLUMNS}


def result_rows(classes: Mapping[str, ClassResult], best: Best | None) -> list[tuple[str, dict[str, float]]]:
    """Classes, their mean, and each metric's best mean on the test set over all evaluations, if known."""
    rows = [(name, values(result)) for name, result in classes.items()]
    rows.append((MEAN, values(mean_results(classes))))
    if best:
        rows.append((BEST, {name: best[name]["value"] if name in best else float("nan") for name in COLUMNS}))
    return rows


def percent(value: float) -> str:
    """One decimal, - for NaN."""
    return f"{100 * value:.1f}" if value == value else "-"


def format_rows(rows: Sequence[tuple[str, Mapping[str, str]]], columns: Sequence[str], *, first: str = "class") -> str:
    """Aligned plain text; the first column left, the others right."""
    titles = [TITLES.get(c, c) for c in columns]
    lines = [[first, *titles]] + [[name, *(row.get(c, "-") for c in columns)] for name, row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles) + 1)]
    text = [
        "  ".join([line[0].ljust(widths[0]), *(v.rjust(w) for v, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def format_table(classes: Mapping[str, ClassResult], *, best_on_test: Best | None = None) -> str:
    """The terminal's table in per cent."""
    rows = [(name, {c: percent(v) for c, v in row.items()}) for name, row in result_rows(classes, best_on_test)]
    return format_rows(rows, COLUMNS)


def markdown(rows: Sequence[tuple[str, Mapping[str, str]]], columns: Sequence[str], *, first: str = "class") -> str:
    """A Markdown table of ready texts."""
    head = [first, *(TITLES.get(c, c) for c in columns)]
    lines = [head, ["---", *("---:" for _ in columns)], *([n, *(r.get(c, "-") for c in columns)] for n, r in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def latex(rows: Sequence[tuple[str, Mapping[str, str]]], columns: Sequence[str], *, first: str = "class") -> str:
    """A LaTeX tabular of ready texts (package booktabs)."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(c.replace("_", r"\_").replace("%", r"\%").replace("±", r"$\pm$") for c in cells) + r" \\"

    body = [line([name, *(row.get(c, "-") for c in columns)]) for name, row in rows]
    head = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    head += [line([first, *(TITLES.get(c, c) for c in columns)]), r"\midrule"]
    return "\n".join([*head, *body, r"\bottomrule", r"\end{tabular}", ""])


def csv_text(rows: Sequence[tuple[str, Mapping[str, Any]]], columns: Sequence[str], *, first: str = "class") -> str:
    """Comma-separated values under the metrics' names; empty for NaN."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([first, *columns])
    for name, row in rows:
        cells = (row.get(c) for c in columns)
        writer.writerow([name, *("" if v is None or v != v else v for v in cells)])
    return out.getvalue()


def results_json(
    classes: Mapping[str, ClassResult], *, best_on_test: Best | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """`{"classes": {name: metrics}, "mean": metrics, "best_on_test": {metric: {value, epoch}}, "config": ...}`.

    Fractions; NaN as null.
    """
    return plain(
        {
            "classes": {name: asdict(result) for name, result in classes.items()},
            "mean": asdict(mean_results(classes)),
            "best_on_test": best_on_test or {},
            "config": config,
        }
    )


def write_tables(
    folder: Path, classes: Mapping[str, ClassResult], *, best_on_test: Best | None, config: Mapping[str, Any]
) -> None:
    """results.json and .csv in fractions, results.md and .tex in per cent."""
    rows = result_rows(classes, best_on_test)
    shown = [(name, {c: percent(v) for c, v in row.items()}) for name, row in rows]
    content = results_json(classes, best_on_test=best_on_test, config=config)
    texts = {
        "results.json": json.dumps(content, indent=2) + "\n",
        "results.csv": csv_text(rows, COLUMNS),
        "results.md": markdown(shown, COLUMNS),
        "results.tex": latex(shown, COLUMNS),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
