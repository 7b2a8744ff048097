"""What is ours of the comparison with other models: images laid out, maps handed over, our evaluation of them."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import peers, peers_ours
from default import UsageError
from fake_data import TINY, make_mvtec, png16
from main import main as program
from utils.metrics import METRICS, mean_results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes laid out, and a tiny model of ours that has judged them."""
    root = tmp_path_factory.mktemp("peers")
    make_mvtec(root / "data", size=80)
    peers.lay_out(str(root / "data"), root / "work", input_size=64)
    for step in ("train", "test"):
        peers_ours.main([step, "cpu", str(root / "work"), "--flags", *TINY, "--memory", "6", "--holdout", "0.2"])
    return root / "work"


def test_our_evaluation_of_handed_over_maps_is_the_programs(folder: Path, tmp_path: Path) -> None:
    words = [
        "--mode",
        "test",
        "--eval_ckpt",
        str(folder / "cpu" / "all.pt"),
        "--data-path",
        str(folder.parent / "data"),
    ]
    program([*words, "--dataset", "folder", "--device", "cpu", "--work-dir", str(tmp_path), "--pictures", "0"])
    (results,) = tmp_path.glob("*/results.json")
    known = json.loads(results.read_text(encoding="utf-8"))
    found = peers.metrics_of(folder, "cpu")
    assert set(found) == {"bottle", "grid"}
    for metric in METRICS:
        assert getattr(mean_results(found), metric) == pytest.approx(known["mean"][metric], abs=1e-6)
        assert 0 < known["mean"][metric] <= 1


def test_pictures_laid_out_are_those_that_the_program_sees(folder: Path) -> None:
    assert len(list((folder / "train" / "bottle").glob("*.png"))) == 6
    assert len(list((folder / "test" / "grid").glob("*.png"))) == 9
    with np.load(folder / "truth" / "grid.npz") as truth:
        assert truth["labels"].tolist() == [1] * 3 + [0] * 3 + [1] * 3  # kinds by name
        assert truth["masks"].shape == (9, 64, 64)
        assert (truth["masks"].any((1, 2)) == truth["labels"]).all()
    original = Image.open(folder.parent / "data" / "bottle" / "train" / "good" / "000.png")
    seen = original.resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(seen), np.asarray(Image.open(folder / "train" / "bottle" / "00000.png")))
    peers.lay_out(str(folder.parent / "data"), folder)  # is done: nothing is written at another size
    assert Image.open(folder / "train" / "bottle" / "00000.png").width == 64
    with pytest.raises(UsageError, match="holds images of"):
        peers.lay_out(str(folder), folder)


def test_deep_images_are_refused(tmp_path: Path) -> None:
    make_mvtec(tmp_path / "data", classes=("bottle",))
    deep = np.random.default_rng(0).integers(0, 65536, (64, 64, 1))
    png16(tmp_path / "data" / "bottle" / "train" / "good" / "006.png", deep, colour=0)
    with pytest.raises(UsageError, match=r"006\.png has more than 8 bits"):
        peers.lay_out(str(tmp_path / "data"), tmp_path / "work", input_size=64)


def test_maps_that_are_missing_or_unfit_are_named(folder: Path) -> None:
    other = folder / "PaDiM" / "maps"
    other.mkdir(parents=True)
    with pytest.raises(UsageError, match="PaDiM: no maps of bottle"):
        peers.metrics_of(folder, "PaDiM")
    np.savez(other / "bottle.npz", maps=np.zeros((9, 32, 32), np.float32), scores=np.zeros(9, np.float32))
    with pytest.raises(UsageError, match=r"PaDiM: .*bottle\.npz: "):
        peers.metrics_of(folder, "PaDiM")


def test_rows_are_kept_and_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = asdict(mean_results(peers.metrics_of(folder, "cpu")))
    step = {"seconds": {"all": 120.0}, "memory": 2048.0}
    row = {"mean": ours, "models": 1, "train": step, "judge": step, "images_per_second": 8.0, "bytes": 3 << 20}
    other = row | {"mean": {metric: value - 0.01 for metric, value in ours.items()} | {"aupro": ours["aupro"] + 0.02}}
    for name, kept in (("cpu", row), ("CFlow", other)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "row.json").write_text(json.dumps(kept), encoding="utf-8")
    words = ["--data-path", str(folder.parent / "data"), "--work-dir", str(folder), "--python", sys.executable]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words, "--only", "cpu", "CFlow"])
    peers.main()
    said = capsys.readouterr().out
    mean = 100 * sum(ours.values()) / 7
    assert f"| {100 * ours['aupro']:.1f} | {mean:.1f} | 120 | 8.0 | {8 / mean:.3f} | 2.0, 2.0 | 3 |" in said
    assert said.splitlines()[-2:] == ["cpu is behind CFlow in AUPRO by 2.0", peers.NOT_RUN]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words[:4], "--only", "PaDiM"])
    with pytest.raises(SystemExit) as left:
        peers.main()
    assert left.value.code == 2 and "--python: " in capsys.readouterr().err


def test_a_step_says_what_it_took_and_a_failed_one_is_named(folder: Path) -> None:
    options = argparse.Namespace(work_dir=str(folder), python="false", seed=1, threads=1)
    with pytest.raises(UsageError, match=r"PaDiM: peers_anomalib\.py test failed with status 1"):
        peers.step("PaDiM", "test", options)
    (folder / "CFlow").mkdir(exist_ok=True)
    for name, seconds, memory in (("a.b", 2.0, 700.0), ("grid", 3.0, 900.0)):
        said = {"seconds": seconds, "epochs": 1.5, "memory": memory}
        (folder / "CFlow" / f"{name}.train.json").write_text(json.dumps(said), encoding="utf-8")
    options.python = "true"
    took = peers.step("CFlow", "train", options)
    assert took == {"seconds": {"a.b": 2.0, "grid": 3.0}, "epochs": {"a.b": 1.5, "grid": 1.5}, "memory": 900.0}
    ours = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "cpu").glob("*.json")}
    assert {"all.train.json", "bottle.test.json", "grid.test.json"} <= set(ours)
    for took in (said for name, said in ours.items() if name != "row.json"):
        assert took["seconds"] > 0 and 100 < took["memory"] < 10_000
