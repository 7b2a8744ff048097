"""What is ours of the comparison with other models: images laid out, maps handed over, our evaluation of them."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import peers, peers_ours
from default import UsageError
from fake_data import TINY, make_mvtec, png16
from main import main as program
from utils.metrics import METRICS, mean_results

CLASSES = ("bottle", "grid")


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
    found = peers.metrics_of(folder, "cpu", CLASSES)
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
        peers.metrics_of(folder, "PaDiM", CLASSES)
    np.savez(other / "bottle.npz", maps=np.zeros((9, 32, 32), np.float32), scores=np.zeros(9, np.float32))
    with pytest.raises(UsageError, match=r"PaDiM: .*bottle\.npz: "):
        peers.metrics_of(folder, "PaDiM", CLASSES)


def test_what_is_done_is_not_done_again_and_is_compared(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that hands over our maps, but for the highest value of each, is behind in what comes of the pixels."""
    other = folder / "CFlow"
    (other / "maps").mkdir(parents=True, exist_ok=True)
    for name, seconds, memory in (("bottle", 2.0, 700.0), ("grid", 3.0, 900.0)):
        with np.load(folder / "cpu" / "maps" / f"{name}.npz") as ours:
            maps = ours["maps"].copy()
            maps[maps >= np.quantile(maps, 0.999)] = maps.min()
            np.savez(other / "maps" / f"{name}.npz", maps=maps, scores=ours["scores"])
        (other / f"{name}.pt").write_bytes(bytes(1 << 20))
        for what in ("train", "test"):
            said = {"seconds": seconds, "epochs": 1.5, "memory": memory}
            (other / f"{name}.{what}.json").write_text(json.dumps(said), encoding="utf-8")
    words = ["--data-path", str(folder.parent / "data"), "--work-dir", str(folder), "--python", "false"]
    monkeypatch.setattr(sys, "argv", ["peers.py", *words, "--only", "cpu", "CFlow"])
    peers.main()
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("cpu is ahead of CFlow in all by 0.0") and said[-1] == peers.NOT_RUN
    mean = mean_results(peers.metrics_of(folder, "CFlow", CLASSES))
    rate = 18 / 5
    line = f"| CFlow | 2 | {100 * mean.image_auroc:.1f} |"
    end = f"| {100 * mean.mad:.1f} | 5 | 3.6 | {rate / (100 * mean.mad):.3f} | 0.9, 0.9 | 2 |"
    assert said[-4].startswith(line) and said[-4].endswith(end)
    assert said[-5].startswith("| cpu | 1 |")
    monkeypatch.setattr(sys, "argv", ["peers.py", *words, "--classes", "grid", "--only", "CFlow"])
    peers.main()
    assert "| CFlow | 1 |" in capsys.readouterr().out
    for flags, error in (
        (["--classes", "grit"], "--classes: 'grit' is not there; choose from bottle, grid"),
        (["--only", "PatchCore"], "PatchCore: peers_anomalib.py train failed with status 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["peers.py", *words, *flags])
        with pytest.raises(SystemExit) as left:
            peers.main()
        assert left.value.code == 2 and error in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["peers.py", *words[:4], "--only", "PaDiM"])
    with pytest.raises(SystemExit) as left:
        peers.main()
    assert left.value.code == 2 and "--python: " in capsys.readouterr().err


def test_where_we_are_behind_is_said() -> None:
    ours = dict.fromkeys(METRICS, 0.9)
    rows = {"cpu": {"mean": ours}, "PaDiM": {"mean": ours | {"aupro": 0.92, "pixel_ap": 0.95, "image_ap": 0.5}}}
    assert peers.compared("cpu", rows) == ["cpu is behind PaDiM in P-AP by 5.0, AUPRO by 2.0"]


def test_a_step_says_what_it_took(folder: Path) -> None:
    ours = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (folder / "cpu").glob("*.t*.json")}
    assert set(ours) == {"all.train.json", "bottle.test.json", "grid.test.json"}
    for took in ours.values():
        assert took["seconds"] > 0 and 100 < took["memory"] < 10_000
    options = argparse.Namespace(work_dir=str(folder), classes=list(CLASSES), seed=1, threads=1)
    assert peers.step("cpu", "train", options)["epochs"] == {"all": 1}
    assert set(peers.step("cpu", "test", options)["seconds"]) == set(CLASSES)
