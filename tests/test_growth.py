"""The benchmark of growth, and that work with many classes is linear in them."""

import math
import sys
from pathlib import Path

import pytest

from benchmarks import growth
from datasets import build_datasets, resolve_classes, walk
from default import make_config
from fake_data import make_mvtec


def test_a_slope_is_that_of_the_last_step() -> None:
    assert growth.slope({10: 7.0, 100: 8.0, 1000: 80.0}) == pytest.approx(1)
    assert growth.slope({1000: 8.0, 10: 0.08}) == pytest.approx(1)
    assert growth.slope({4: 3.0, 8: 12.0}) == pytest.approx(2)
    assert math.isnan(growth.slope({5: 1.0}))


def test_all_parts_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(growth, "LIMIT", 100.0)  # so few images say nothing of growth
    words = ["--images", "20", "40", "--classes", "1", "2", "--sides", "64", "--tests", "16", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["growth.py", *words])
    with pytest.raises(SystemExit) as left:
        growth.main()
    assert not left.value.code
    said = capsys.readouterr().out
    tables = [block.splitlines() for block in said.split("\n\n")[:-1]]
    assert [len(lines) - 2 for lines in tables] == [1, 1, 2, 8, 8]
    assert tables[-1][0] == "| images: seconds | 20 | 40 | slope |"
    for lines in tables:
        for cell in (cell for line in lines[2:] for cell in line.split(" | ")[1:-1]):
            assert float(cell) > 0
    assert said.splitlines()[-1] == "Faster than linearly grows: nothing."


def test_what_grows_faster_is_named() -> None:
    images = {"sorting": {10: 1.0, 100: 100.0}, "counting": {10: 1.0, 100: 10.0}, "once": {10: 1.0}}
    assert growth.faster_than_linear({"images": images, "classes": {"sorting": {1: 1.0, 2: 2.0}}}) == [
        "sorting, by images: 2.00"
    ]


def test_the_root_is_not_walked_again_for_each_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walked = []
    original = walk.own_classes

    def counting(root: Path, good_names: tuple[str, ...]) -> dict[str, Path]:
        walked.append(root)
        return original(root, good_names)

    monkeypatch.setattr(walk, "own_classes", counting)
    counts = []
    for classes in (("a",), ("a", "b", "c", "d", "e")):
        data = make_config(dataset="folder", data_path=str(make_mvtec(tmp_path / str(len(classes)), classes))).data
        walked.clear()
        train, _ = build_datasets(data, resolve_classes(data))
        assert {item.class_index for item in train.items} == set(range(len(classes)))
        counts.append(len(walked))
    assert counts[0] == counts[1] > 0
