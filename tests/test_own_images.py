"""Training from what people have: good images alone, in whatever folders."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from datasets.walk import own_classes
from default import GOOD_NAMES, UsageError
from detector import load_detector
from fake_data import METHOD, TINY, make_mvtec, picture, save
from main import main


def run(data: Path, work: Path, *words: str) -> int:
    return main([*TINY, *METHOD, "--dataset", "folder", "--data-path", str(data), "--work-dir", str(work), *words])


def images(folder: Path, count: int = 8) -> Path:
    rng = np.random.default_rng(len(folder.name))
    for i in range(count):
        save(folder / f"{i}.png", picture(rng)[0])
    return folder


@pytest.mark.parametrize("form", ["one", "good", "classes", "mvtec", "whole"])
def test_good_images_alone_train_and_decide(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, work = tmp_path / "bolts", tmp_path / "work"
    places = {
        "one": ["."], "good": ["good"], "classes": ["nut", "bolt/ok"], "mvtec": ["nut/train/good", "bolt/train/good"],
        "whole": ["train/good"],
    }[form]  # fmt: skip
    for place in places:
        images(data / place)
    names = ["bolts"] if len(places) == 1 else ["bolt", "nut"]
    argv = ["--holdout", "0.5", "--image-score", "surprise", "--false-alarm-rate", "0.4", "--bootstrap", "9"]
    assert run(data, work, *argv) == 0
    said = capsys.readouterr()
    assert f"warning: {names[0]} has no test images: it is not evaluated" in said.err
    assert "no test images: there was no evaluation" in said.out
    assert "AUROC" not in said.out
    folder = next(p for p in work.iterdir() if p.name != "cache")
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["evaluated"] is False
    assert sorted(content["classes"]) == names
    assert "no evaluation" in (folder / "results.md").read_text(encoding="utf-8")
    assert not (folder / "report.html").exists()
    assert not (folder / "scores.csv").exists()
    out = tmp_path / "out"
    argv = ["--mode", "predict", "--eval_ckpt", str(folder), "--output", str(out), "--device", "cpu", str(data)]
    assert main(argv) == 0
    with (out / "scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * len(places)
    assert all(row["verdict"] for row in rows)
    assert main(["--mode", "table", str(folder), "--work-dir", str(work)]) == 0
    argv = ["--mode", "test", "--eval_ckpt", str(folder), "--data-path", str(data), "--device", "cpu"]
    assert main([*argv, "--work-dir", str(work)]) == 2
    assert "with test images is there; --mode predict judges images without labels" in capsys.readouterr().err


@pytest.mark.parametrize("models", ["--multi-class", "--no-multi-class"])
def test_unlabelled_test_images_are_predicted(models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_mvtec(tmp_path / "data", train=8)
    for kind in ("good", "broken", "scratch"):
        shutil.rmtree(data / "grid" / "test" / kind)
    for name in ("grid", "bottle"):
        images(data / name / "test", 3)
    (data / "grid" / "test" / "torn.png").write_bytes(b"\x89PNG")
    argv = [models, "--image-score", "surprise", "--holdout", "0.5", "--false-alarm-rate", "0.4"]
    assert run(data, tmp_path / "work", *argv) == 0
    said = capsys.readouterr()
    assert "grid has no test images: it is not evaluated; its 4 images in test/ have no labels" in said.err
    folder = next(p for p in (tmp_path / "work").iterdir() if p.name != "cache")
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["evaluated"] is True
    assert content["classes"]["bottle"]["image_auroc"] is not None
    assert content["classes"]["grid"]["image_auroc"] is None
    assert "grid" in (folder / "report.html").read_text(encoding="utf-8")
    assert "7 images: " in said.out
    assert "1 of 7 images could not be read" in said.err
    with (folder / "predict" / "scores.csv").open(encoding="utf-8") as file:
        rows = {Path(row["path"]): row for row in csv.DictReader(file)}
    assert rows.keys() == {p for name in ("grid", "bottle") for p in (data / name / "test").glob("*.png")}
    detector = load_detector(folder, device="cpu", class_name="grid")
    for path, row in rows.items():
        assert (row["score"] == "") == (path.name == "torn.png")
        if path.parts[-3] == "grid" and row["score"]:
            assert float(row["score"]) == pytest.approx(detector(path).score, rel=1e-3)
            assert row["concept"] == "grid" or models == "--multi-class"
    assert len(list((folder / "predict" / "overlays").iterdir())) == 6


def test_which_folders_are_classes(tmp_path: Path) -> None:
    def found(*files: str) -> list[str]:
        root = tmp_path / str(len(list(tmp_path.iterdir()))) / "parts"
        for file in files:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(b"")
        return list(own_classes(root, GOOD_NAMES))

    assert found("a/train/good/1.png", "b/train/good/1.png", "notes/1.png", "1.png") == ["a", "b"]
    assert found("a/1.png", "b/good/1.png", "notes/read.me") == ["a", "b"]
    assert found("1.png", "2.JPG") == found("OK/1.png", "bad/1.png") == found("1.png", "test/2.png") == ["parts"]
    assert found("a/cam1/1.png") == ["a"]
    assert found("read.me") == []
    with pytest.raises(UsageError, match=r"holds both images \(1.png\) and folders of them \(a\)"):
        found("1.png", "a/1.png")
