"""Whole runs: how a model's images are read stays with it, odd names and lopsided classes work."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fake_data import METHOD, TINY, make_mvtec
from main import main

ODD = os.fsdecode(b"bo\xffttle") if sys.platform not in ("win32", "darwin") else "bottle"
SHOWN = ODD.replace("\udcff", r"\xff")


def deepen(folder: Path, scale: int) -> None:
    """Store the images of a class in 16 bits."""
    for part in ("train", "test"):
        for path in (folder / part).rglob("*.png"):
            Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * scale).save(path)


def run(*words: str) -> int:
    return main([*TINY, *METHOD, "--dataset", "folder", "--report", *words])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a 12-bit class with an odd name and nested folders, a class without good test images, and a plain one;
    data/ and runs/ in a folder."""
    root = tmp_path_factory.mktemp("reading")
    data = make_mvtec(root / "data", ("bottle", "grid", "pill"))
    (data / "bottle").rename(data / ODD)
    deepen(data / ODD, 16)
    broken = data / ODD / "test" / "broken"
    for camera in ("cam1", "cam2"):
        shutil.copytree(data / ODD / "test" / "scratch", broken / camera)
        shutil.copytree(data / ODD / "ground_truth" / "scratch", data / ODD / "ground_truth" / "broken" / camera)
    shutil.rmtree(data / "grid" / "test" / "good")
    assert run("--data-path", str(data), "--work-dir", str(root / "runs"), "--name", "one", "--pictures", "9") == 0
    return root


def results(root: Path, name: str) -> dict:
    return json.loads((root / "runs" / name / "results.json").read_text(encoding="utf-8"))


def evaluated(root: Path, name: str, *words: str, data: str = "data", checkpoint: str = "one-seed9826") -> int:
    path = root / "runs" / checkpoint
    common = ["--data-path", str(root / data), "--work-dir", str(root / "runs"), "--name", name, "--device", "cpu"]
    return main(["--mode", "test", "--eval_ckpt", str(path), *common, "--no-report", *words])


def test_names_that_are_not_utf_8_reach_every_file(trained: Path) -> None:
    folder = trained / "runs" / "one-seed9826"
    for name in ("results.csv", "results.md", "report.html"):
        text = (folder / name).read_text(encoding="utf-8")
        assert (SHOWN.replace("\\", "\\\\") if name == "results.md" else SHOWN) in text, name
    assert set(results(trained, "one-seed9826")["classes"]) == {ODD, "grid", "pill"}
    names = {p.name for p in (folder / "pictures" / ODD).iterdir()}
    assert {"broken_000.jpg", "broken_cam1_000.jpg", "broken_cam2_000.jpg"} <= names


def test_a_mean_says_over_how_many_classes_it_is(trained: Path) -> None:
    folder = trained / "runs" / "one-seed9826"
    note = "not defined for grid; the mean is over 2 of 3 classes"
    assert note in (folder / "results.md").read_text(encoding="utf-8")
    assert "the mean is over 2 of 3 classes" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_checkpoint_reads_as_it_was_trained(trained: Path, capsys: pytest.CaptureFixture) -> None:
    content = torch.load(trained / "runs" / "one-seed9826" / "last.pt", weights_only=True)
    assert content["readings"][ODD]["integers"] == [0, 4095]
    assert content["readings"]["pill"]["integers"] is None
    assert evaluated(trained, "again") == 0
    assert f"{SHOWN}: integers beyond 8 bits as 12-bit ones (0 to 4095)" in capsys.readouterr().out
    first, again = (results(trained, name)["classes"] for name in ("one-seed9826", "test-again-seed9826"))
    assert again == first, "the same batches"
    assert evaluated(trained, "deep", "--bit-depth", "16") == 2
    assert "--bit-depth: the model reads images of" in capsys.readouterr().err
    assert run("--data-path", str(trained / "data"), "--work-dir", str(trained / "runs"), "--name", "one", "--resume",
               "--pictures", "9", "--bit-depth", "16") == 2  # fmt: skip
    old = trained / "runs" / "old"
    old.mkdir()
    torch.save(content | {"readings": {"pill": {"hue": 3}}}, old / "last.pt")
    assert evaluated(trained, "old", checkpoint="old") == 2
    assert "last.pt: its field 'readings' is not what a checkpoint has there" in capsys.readouterr().err
    content.pop("readings")
    torch.save(content, old / "last.pt")
    assert evaluated(trained, "old", checkpoint="old") == 0
    assert "all classes: as version 1.0 did" in capsys.readouterr().out
    dark = results(trained, "test-old-seed9826")["classes"]
    assert dark["pill"] == pytest.approx(first["pill"], abs=1e-6)
    assert dark[ODD] != first[ODD], "twelve bits over 65535 are nearly black"


def test_a_tree_with_some_classes_of_the_model(trained: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copytree(trained / "data" / "pill", trained / "some" / "pill")
    assert evaluated(trained, "some", data="some") == 0
    assert "holds 1 of the model's 3 classes: pill" in capsys.readouterr().out
    whole = results(trained, "one-seed9826")["classes"]["pill"]
    found = results(trained, "test-some-seed9826")["classes"]
    assert found == {"pill": pytest.approx(whole, abs=1e-6)}, "other batches, the same figures"
    (trained / "some" / "pill").rename(trained / "some" / "tablet")
    assert evaluated(trained, "none", data="some") == 2
    assert "--data-path: no class of" in capsys.readouterr().err
    assert evaluated(trained, "none", "--class-names", "tablet", data="some") == 2
    assert "is no model of 'tablet'; choose from all" in capsys.readouterr().err
