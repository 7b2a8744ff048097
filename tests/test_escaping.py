"""Names from files and checkpoints are shown as they are: no markup, formula or terminal command takes effect."""

import csv
import html
import io
import json
import os
import runpy
from pathlib import Path

import pytest

from datasets.folder import Scan
from default import make_config
from utils.metrics import METRICS, ClassResult
from utils.report.gather import summarize_seeds
from utils.report.results import Results, write_results
from utils.report.tables import csv_cell, latex_text, markdown_text
from utils.report.verdicts import PREDICTED, Rows
from utils.run.text import one_line, printable

NAMES = [
    "<script>alert(1)</script>", r"\input{/etc/passwd}", "=cmd|'/c calc'!A1", "+1", "@SUM(A1)", "-2", "a\x1b[31mred",
    "a|b", "two\nlines", "a\rb", "[a](javascript:b)", "`x` *y* _z_", "^^5cinput{x}", "x%\n\\end{tabular}",
    "\u202egnp.exe", "a\tb",
]  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The files of an evaluation whose classes have all these names, and the terminal's text."""
    folder = tmp_path_factory.mktemp("results")
    row = ClassResult(**dict.fromkeys(METRICS, 0.5))
    config = make_config(mode="test", eval_ckpt="runs/\x1b[2J\nmore <b>", dataset="folder")
    results = Results(
        classes=dict.fromkeys(NAMES, row), best_on_test=None, intervals=None, config=config, unseen=True
    )  # fmt: skip
    return folder, write_results(folder, results)


def test_the_terminal(written: tuple[Path, str]) -> None:
    text = written[1]
    head, _, *rest = text.splitlines()
    assert not any(ord(c) < 32 for c in text.replace("\n", "")) and "\u202e" not in text
    assert [line.split("  ")[0].rstrip() for line in rest[: len(NAMES)]] == [one_line(name) for name in NAMES]
    assert {len(line) for line in rest[: len(NAMES)]} == {len(head)}
    assert r"two\nlines" in text and r"a\x1b[31mred" in text and r"checkpoint runs/\x1b[2J\nmore" in text


def test_markdown(written: tuple[Path, str]) -> None:
    table, notes = (written[0] / "results.md").read_text(encoding="utf-8").split("\n\n")
    assert "<" not in table + notes and "](" not in table
    lines = table.splitlines()
    assert len(lines) == len(NAMES) + 3 and len({line.replace(r"\|", "").count("|") for line in lines}) == 1
    for name, line in zip(NAMES, lines[2:], strict=False):
        cell = line.removeprefix("| ").replace(r"\|", "\0").split(" | ")[0].replace("\0", r"\|")
        assert cell == markdown_text(one_line(name))
        assert html.unescape("".join(unslashed(cell))) == one_line(name)
    assert all(note.startswith("- ") for note in notes.splitlines())


def unslashed(text: str) -> list[str]:
    """CommonMark's backslash escapes undone."""
    found, taken = [], False
    for here, following in zip(text, [*text[1:], ""], strict=True):
        if here == "\\" and not taken and following and following in "\\|`*(":
            taken = True
            continue
        found.append(here)
        taken = False
    return found


def test_latex(written: tuple[Path, str]) -> None:
    text = (written[0] / "results.tex").read_text(encoding="utf-8")
    body = text.split("\\midrule\n")[1].split("\\bottomrule")[0]
    assert len(body.splitlines()) == len(NAMES) + 1
    assert "\\input" not in body and "^^" not in body and text.count("\\end{tabular}") == 1
    assert all(line.startswith("%") for line in text.split("\\end{tabular}\n")[1].splitlines())
    assert latex_text("^~") == r"\textasciicircum{}\textasciitilde{}"


def test_csv(written: tuple[Path, str]) -> None:
    text = (written[0] / "results.csv").read_text(encoding="utf-8")
    rows = list(csv.reader(io.StringIO(text)))
    assert len(rows) == len(NAMES) + 2 == len(text.splitlines())
    for name, row in zip(NAMES, rows[1:], strict=False):
        assert row[0].removeprefix("'") == one_line(name)
        assert row[0][0] not in "=+-@"
        assert float(row[1]) == 0.5
    assert [csv_cell(v) for v in (-0.5, None, float("nan"), "-x", "x=1", 3)] == [-0.5, "", "", "'-x", "x=1", 3]
    names = json.loads((written[0] / "results.json").read_text(encoding="utf-8"))["classes"]
    assert list(names) == NAMES, "JSON holds them as they are"


def test_metrics_of_the_data_set(tmp_path: Path) -> None:
    """Their names come from a results.json of somebody else, too: in one run's tables and in those of several."""
    row, extra = ClassResult(**dict.fromkeys(METRICS, 0.5)), dict.fromkeys(NAMES, 0.25)
    config = make_config(dataset="folder", work_dir=str(tmp_path), seeds=(1, 2), name="runs")
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        results = Results(
            classes={"c": row}, best_on_test=None, intervals=None, config=config, unseen=True, extra={"c": extra}
        )
        shown = write_results(folder, results)
    shown += summarize_seeds(config, folders)
    assert not any(ord(c) < 32 for c in shown.replace("\n", "")) and "\u202e" not in shown
    summary = tmp_path / "runs-seeds1_2"
    for path in (folders[0] / "results.md", summary / "results.md"):
        text = path.read_text(encoding="utf-8").split("paper measures**")[1]
        assert "<" not in text and "](" not in text.split("\n\n")[1]
        assert len({line.replace(r"\|", "").count("|") for line in text.split("\n\n")[1].splitlines()}) == 1
    text = (summary / "results.tex").read_text(encoding="utf-8")
    assert "\\input" not in text and "^^" not in text and text.count("\\end{tabular}") == 2
    head, *rows = csv.reader((summary / "results.csv").open(encoding="utf-8", newline=""))
    assert len(rows) == 2 and not any(cell.startswith(("=", "+", "-", "@")) for cell in head)
    assert [float(cell) for cell in rows[0][-2 * len(NAMES) :: 2]] == [0.25] * len(NAMES)


def test_a_prediction_of_a_file_with_such_a_name(tmp_path: Path) -> None:
    row = dict.fromkeys(PREDICTED) | {"path": "=1+1.png", "error": "=1+1.png: no\nimage"}
    with Rows(tmp_path) as rows:
        rows.add(row)
        assert rows.is_done(Path("=1+1.png"))
    (_, line) = csv.reader((tmp_path / "scores.csv").open(encoding="utf-8"))
    assert (line[0], line[-1]) == ("'=1+1.png", r"'=1+1.png: no\nimage")
    with Rows(tmp_path) as rows:
        assert rows.is_done(Path("=1+1.png"))


def test_the_script_without_pytorch_escapes_alike() -> None:
    pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    cell = runpy.run_path(str(Path(__file__).resolve().parents[1] / "deploy" / "run_onnx.py"))["cell"]
    for name in [*NAMES, "a\xa0b\u202f.png", "ä 片 ².png", os.fsdecode(b"=\xff.png"), "\u2029", "\x85"]:
        assert cell(name) == csv_cell(name), ascii(name)
    assert cell(Path("=1.png")) == "'=1.png"


def test_what_remains_as_it_is() -> None:
    assert printable("a\nb\tc ä 片 ²\r\n") == "a\nb\tc ä 片 ²\r\n"
    assert one_line("ä\ud800\udcff") == r"ä\ud800\xff"
    assert "\n" not in one_line(Scan(train=[], test=[]).line("a\nb"))
