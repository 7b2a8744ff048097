"""Several processes under torchrun give what a single one gives: gradients, codebooks, statistics, memory, metrics."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fake_data import METHOD, TINY, make_mvtec
from main import main
from utils.run.checkpoint import read_checkpoint
from utils.run.log import read_lines

ROOT = Path(__file__).resolve().parents[1]
FLAGS = [
    *TINY, *METHOD, "--dataset", "folder", "--batch-size", "6", "--noise", "0.3", "--memory", "8", "--holdout", "0.3",
    "--image-score", "surprise", "--eval-size", "40", "--no-report",
]  # fmt: skip
PREDICT = ["--mode", "predict", "--device", "cpu", "--save-maps", "npy", "--batch-size", "4", "--eval_ckpt"]
TILES = ["--tile", "40", "--limit", "3"]
SINGLE = ["--no-multi-class", "--memory", "0", "--no-mixed-gaussian"]


def only(work: Path) -> Path:
    return next(p for p in work.iterdir() if p.name != "cache")


def under_torchrun(count: int, commands: list[list[str]]) -> subprocess.CompletedProcess:
    """The commands, in so many processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.run(
        [*command, str(ROOT / "tests" / "processes.py"), json.dumps(commands)], cwd=ROOT, capture_output=True,
        text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip


@dataclass
class Runs:
    """Run folders of a single process and of several, and what these printed."""

    alone: dict[str, Path]
    together: dict[str, Path]
    output: subprocess.CompletedProcess


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images to train on, four that calibrate, and fourteen to test: shares of three processes differ."""
    return make_mvtec(tmp_path_factory.mktemp("tree"), train=7, good=3, bad=2)


@pytest.fixture(scope="module")
def alone(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work, again = tmp_path_factory.mktemp("train"), tmp_path_factory.mktemp("test")
    assert main([*FLAGS, "--data-path", str(tree), "--work-dir", str(work)]) == 0
    assert main(["--mode", "test", "--eval_ckpt", str(only(work)), "--work-dir", str(again)]) == 0
    said = tmp_path_factory.mktemp("said")
    assert main([*PREDICT, str(only(work)), "--output", str(said), str(tree)]) == 0
    single = tmp_path_factory.mktemp("single")
    assert main([*FLAGS, *SINGLE, "--data-path", str(tree), "--work-dir", str(single)]) == 0
    tiles = tmp_path_factory.mktemp("tiles")
    assert main([*FLAGS, *TILES, "--data-path", str(tree), "--work-dir", str(tiles)]) == 0
    return {"train": only(work), "test": only(again), "predict": said, "single": only(single), "tiles": only(tiles)}


@pytest.fixture(scope="module", params=[2, 3])
def runs(
    request: pytest.FixtureRequest, tree: Path, alone: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    work, again = tmp_path_factory.mktemp("train"), tmp_path_factory.mktemp("test")
    train = [*FLAGS, "--data-path", str(tree), "--work-dir"]
    test = ["--mode", "test", "--eval_ckpt", str(alone["train"]), "--work-dir", str(again)]
    said = tmp_path_factory.mktemp("said")
    single = tmp_path_factory.mktemp("single")
    predict = [*PREDICT, str(alone["train"]), "--output", str(said), str(tree)]
    small = [*train, str(tmp_path_factory.mktemp("small")), "--batch-size", "1"]
    tiles, seen = tmp_path_factory.mktemp("tiles"), tmp_path_factory.mktemp("seen")
    see = ["--mode", "test", "--eval_ckpt", str(alone["tiles"]), "--work-dir", str(seen)]
    commands = [[*train, str(work)], test, predict, [*train, str(single), *SINGLE], small]
    found = under_torchrun(request.param, [*commands, [*train, str(tiles), *TILES], see])
    assert found.returncode == 0, found.stderr
    folders = {"train": only(work), "test": only(again), "predict": said, "single": only(single)}
    folders |= {"tiles": only(tiles), "seen": only(seen)}
    return Runs(alone=alone, together=folders, output=found)


def content(folder: Path) -> dict[str, Any]:
    return read_checkpoint(folder / "last.pt")


def test_the_first_step_is_that_of_the_whole_batch(runs: Runs) -> None:
    one, many = (content(r["train"])["optimizer"]["state"] for r in (runs.alone, runs.together))
    highest = max(float(state["exp_avg"].abs().max()) for state in one.values())
    for number, state in one.items():
        torch.testing.assert_close(many[number]["exp_avg"], state["exp_avg"], rtol=1e-5, atol=1e-5 * highest)
    first, second = (read_lines(r["train"] / "metrics.jsonl")[0] for r in (runs.alone, runs.together))
    assert first["train"]["images"] == second["train"]["images"] == 6
    for name in ("loss", "nll", "commitment", "grad_norm"):
        assert second["train"][name] == pytest.approx(first["train"][name], rel=1e-5)
    assert first["codebooks"] == second["codebooks"]


def test_codebooks_statistics_and_memory_are_those_of_all_images(runs: Runs) -> None:
    one, many = content(runs.alone["train"]), content(runs.together["train"])
    names = [
        n for n in one["model"] if any(p in n for p in ("embed", "cluster", "running", "mean_", "std_", "tracked"))
    ]
    assert len(names) > 50
    for name in names:
        torch.testing.assert_close(many["model"][name], one["model"][name], rtol=1e-5, atol=1e-5)
    for name, value in one["scorer"]["state"].items():
        exact = name.startswith("memory")
        torch.testing.assert_close(many["scorer"]["state"][name], value, rtol=0 if exact else 1e-5, atol=0)
    assert torch.equal(one["random"]["torch"], many["random"]["torch"])
    for name in ("scores", "peaks"):
        torch.testing.assert_close(
            torch.tensor(many["decision"][name]), torch.tensor(one["decision"][name]), rtol=1e-5, atol=1e-5
        )


def test_evaluation_is_that_of_a_single_process(runs: Runs) -> None:
    one, many = runs.alone["test"], runs.together["test"]
    assert (one / "scores.csv").read_bytes() == (many / "scores.csv").read_bytes()
    first, second = (json.loads((f / "results.json").read_text(encoding="utf-8")) for f in (one, many))
    assert first["decision"] == second["decision"] and first["concepts"] == second["concepts"]
    for part in ("mean", *first["classes"]):
        a, b = (found["mean"] if part == "mean" else found["classes"][part] for found in (first, second))
        assert a == pytest.approx(b, rel=0, abs=1e-12)


def test_predictions_come_in_the_order_of_a_single_process(runs: Runs) -> None:
    first, second = (
        [json.loads(line) | {"seconds": 0} for line in (r["predict"] / "scores.jsonl").read_text().splitlines()]
        for r in (runs.alone, runs.together)
    )
    assert len(first) == 36 and first == second
    for path in (runs.alone["predict"] / "maps").iterdir():
        assert path.read_bytes() == (runs.together["predict"] / "maps" / path.name).read_bytes()


def test_models_of_single_classes_are_those_of_a_single_process(runs: Runs) -> None:
    one, many = runs.alone["single"], runs.together["single"]
    assert (one / "scores.csv").read_bytes() == (many / "scores.csv").read_bytes()
    for name in ("bottle", "grid"):
        first, second = content(one / name)["model"], content(many / name)["model"]
        assert all(torch.equal(value, second[key]) for key, value in first.items())
    first, second = (json.loads((f / "results.json").read_text(encoding="utf-8")) for f in (one, many))
    assert first["classes"] == second["classes"] and first["mean"] == second["mean"]


def test_tiles_of_an_image_stay_together(runs: Runs) -> None:
    one, many, seen = runs.alone["tiles"], runs.together["tiles"], runs.together["seen"]
    assert (one / "scores.csv").read_bytes() == (seen / "scores.csv").read_bytes()
    first, second = (json.loads((f / "results.json").read_text(encoding="utf-8")) for f in (one, seen))
    assert first["mean"] == pytest.approx(second["mean"], rel=0, abs=1e-12)
    first, second = content(one), content(many)
    for name, value in first["scorer"]["state"].items():
        torch.testing.assert_close(second["scorer"]["state"][name], value, rtol=1e-5, atol=1e-6)
    assert second["decision"]["scores"] == pytest.approx(first["decision"]["scores"], rel=1e-5, abs=1e-5)


def test_the_first_process_alone_writes_and_prints(runs: Runs) -> None:
    for kind in ("train", "test", "predict", "single"):
        one, many = (
            sorted(p.relative_to(folders[kind]).as_posix() for p in folders[kind].rglob("*"))
            for folders in (runs.alone, runs.together)
        )
        assert one == many
    text, errors = runs.output.stdout, runs.output.stderr
    assert text.count("2 classes, 10 training images; run folder: ") == 2, "both trainings, once"
    assert text.count("6 a step; learning rate 0.0001") == 2, "of all classes, and of tiles"
    assert errors.count("error: --batch-size: expected at least one image for each of") == 1
    assert errors.count("error: refused by the first one") == 1
    assert "echo" not in errors and "Warning" not in errors
