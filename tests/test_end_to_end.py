"""The real command line in a process of its own, on tiny trees in the exact layouts."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fake_data import METHOD, TINY, make_mvtec, make_visa_original, make_visa_rearranged
from utils.tables import COLUMNS

ROOT = Path(__file__).resolve().parents[1]


def program(*argv: object) -> str:
    words = [sys.executable, str(ROOT / "main.py"), *map(str, argv)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


LAYOUTS = {
    "mvtec": ("mvtec", make_mvtec, ("bottle", "grid"), ["--tensorboard"]),
    "visa": ("visa", make_visa_rearranged, ("candle", "pcb1"), ["--pre-extract"]),
    "visa as unpacked": ("visa", make_visa_original, ("candle", "pcb1"), ["--workers", "2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_train_then_test(layout: str, tmp_path: Path) -> None:
    dataset, make, classes, more = LAYOUTS[layout]
    common = ["--dataset", dataset, "--data-path", make(tmp_path / "data", classes), "--work-dir", tmp_path / "runs"]
    out = program("--mode", "train", *common, "--class-names", *classes, *METHOD, *TINY, *more)
    run = tmp_path / "runs" / f"{dataset}-tf_efficientnet_lite0-multi-seed9826"
    assert all(f"\n{name} " in out for name in (*classes, "mean")), out
    files = {p.name for p in run.iterdir()}
    tables = {f"results.{kind}" for kind in ("json", "csv", "md", "tex")}
    assert {*tables, "config.json", "metrics.jsonl", "last.pt", "best_on_test.pt", "pictures"} <= files
    assert ("tensorboard" in files) == ("--tensorboard" in more)
    assert len(list((run / "pictures" / classes[0]).glob("*.jpg"))) >= 2
    program("--mode", "test", *common, "--eval_ckpt", run / "last.pt", "--device", "cpu", "--pictures", 0)
    again = tmp_path / "runs" / f"test-{run.name}"
    for name in classes:
        first, second = results(run)["classes"][name], results(again)["classes"][name]
        # cached features are rounded to half precision
        assert first == pytest.approx(second, abs=0.02 if "--pre-extract" in more else 1e-9)
    assert set(results(run)["best_on_test"]) <= set(COLUMNS)


def test_single_class_models_and_one_table(tmp_path: Path) -> None:
    common = ["--dataset", "mvtec", "--data-path", make_mvtec(tmp_path / "data"), "--work-dir", tmp_path / "runs"]
    out = program(*common, "--class-names", "bottle", "grid", *TINY)
    run = tmp_path / "runs" / "mvtec-tf_efficientnet_lite0-single-seed9826"
    assert (run / "bottle" / "last.pt").is_file() and (run / "grid" / "last.pt").is_file()
    assert out.count("I-AUROC") == 1
    program("--mode", "test", *common, "--eval_ckpt", run, "--device", "cpu", "--pictures", 0)
    assert results(run)["classes"] == results(tmp_path / "runs" / f"test-{run.name}")["classes"]


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    """An unbroken run of two meta epochs against one that lost its second."""
    common = ["--dataset", "mvtec", "--data-path", make_mvtec(tmp_path / "data"), "--class-names", "bottle", "grid",
              *METHOD, *TINY, "--meta-epochs", "2", "--pictures", "0"]  # fmt: skip
    name = "mvtec-tf_efficientnet_lite0-multi-seed9826"
    program(*common, "--work-dir", tmp_path / "a")
    # A run whose schedule spans two meta epochs, stopped after the first: the checkpoint is written at its end.
    stopper = tmp_path / "stop.py"
    stopper.write_text(
        "import sys, train\nsave = train.Trainer._save\n"
        "def once(self, *args):\n    save(self, *args)\n    raise KeyboardInterrupt\n"
        "train.Trainer._save = once\nfrom main import main\nsys.exit(main(sys.argv[1:]))\n",
        encoding="utf-8",
    )
    words = [sys.executable, str(stopper), *map(str, common), "--work-dir", str(tmp_path / "b")]
    environment = {**__import__("os").environ, "PYTHONPATH": str(ROOT)}
    stopped = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert stopped.returncode == 130, stopped.stderr
    assert len((tmp_path / "a" / name / "metrics.jsonl").read_text().splitlines()) == 2
    shutil.copytree(tmp_path / "b" / name, tmp_path / "kept")
    program(*common, "--work-dir", tmp_path / "b", "--resume")
    a, b = (torch.load(tmp_path / k / name / "last.pt", weights_only=True) for k in "ab")
    assert a["epoch"] == b["epoch"] == 2
    assert all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][key][n]) for n, v in state.items())
    assert results(tmp_path / "a" / name)["classes"] == results(tmp_path / "b" / name)["classes"]


def test_an_official_checkpoint_is_recognised(parity: Path, tmp_path: Path) -> None:
    """The recorded model has its own feature widths: the line that says so shows that the file was understood."""
    record = torch.load(parity / "residual.pt", weights_only=True)
    torch.save(record["checkpoint"], tmp_path / "official.pt")
    words = ["--mode", "test", "--dataset", "mvtec", "--data-path", make_mvtec(tmp_path / "data"), "--class-names",
             "bottle", *METHOD, *TINY, "--eval_ckpt", tmp_path / "official.pt", "--work-dir", tmp_path]  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "made with other options than asked for" in done.stderr
