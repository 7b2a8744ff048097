"""Whole runs on data sets with rules of their own: CIFAR-10's groups, and metrics of a data set beside the seven."""

import json
import math
import re
from pathlib import Path

import pytest

from datasets.cifar10 import GROUPS
from fake_data import METHOD, TINY
from fake_sets import make_cifar, make_loco
from main import main


def results(work: Path) -> tuple[dict, Path]:
    (path,) = work.glob("*/results.json")
    return json.loads(path.read_text()), path.parent


def test_cifar10_from_archive_to_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_cifar(tmp_path / "data")
    words = ["--dataset", "cifar10", "--data-path", str(root), "--work-dir", str(tmp_path / "runs"), "--top-k", "1"]
    assert main([*TINY, *METHOD[1:], *words]) == 0
    shown = capsys.readouterr().out
    content, folder = results(tmp_path / "runs")
    assert tuple(content["classes"]) == GROUPS and len(list(folder.glob("*/last.pt"))) == 4
    for row in (*content["classes"].values(), content["mean"]):
        assert set(row) == {"image_auroc", "image_ap", "image_f1max"}
        assert all(0 <= value <= 1 for value in row.values())
    table = shown[shown.rindex("Per class beside the published figures") :]
    for group, theirs in zip(GROUPS, ("84.4", "79.6", "93.0", "89.1"), strict=True):
        row = next(line.split() for line in table.splitlines() if line.startswith(group))
        assert row[-1] == theirs and row[1] == f"{100 * content['classes'][group]['image_auroc']:.1f}"
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "I-AUROC" in page and ">P-AUROC<" not in page


def test_loco_measures_as_its_paper(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_loco(tmp_path / "data", ("pushpins", "screw_bag"))
    words = [*TINY, *METHOD, "--dataset", "mvtec-loco", "--data-path", str(root), "--work-dir", str(tmp_path / "runs")]
    assert main([*words, "--class-names", "pushpins", "screw_bag", "--no-report"]) == 0
    content, folder = results(tmp_path / "runs")
    extra = content["extra"]
    assert set(extra["classes"]) == {"pushpins", "screw_bag"}
    for row in extra["classes"].values():
        assert {"AU-sPRO@0.05", "AU-sPRO@0.05 logical", "AU-sPRO@0.05 structural", "I-AUROC mean"} <= row.keys()
        assert all(math.isfinite(value) and 0 <= value <= 1 for value in row.values())
    again = [
        "--mode",
        "test",
        "--eval_ckpt",
        str(folder),
        "--data-path",
        str(root),
        "--work-dir",
        str(tmp_path / "new"),
    ]
    assert main([*again, "--device", "cpu", "--report"]) == 0
    tested, folder = results(tmp_path / "new")
    assert tested["extra"]["mean"] == pytest.approx(extra["mean"], abs=1e-6)
    page = (folder / "report.html").read_text(encoding="utf-8")
    heads = re.findall(r'<button type="button">([^<]*)</button>', page.split('<table class="sortable">')[1])
    assert heads[-len(extra["mean"]) :] == list(extra["mean"])
    assert "As the data set's paper measures" in capsys.readouterr().out
