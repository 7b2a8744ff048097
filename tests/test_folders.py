"""Folders that several programs make at once: run folders, the feature cache, the built-in sample."""

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import torch

from datasets import build_datasets
from datasets.cache import make_store
from datasets.loaders import train_loader
from datasets.sample import SOURCES, is_complete, make_sample
from default import DataConfig
from fake_data import make_mvtec
from utils.run.folders import existing_runs

ROOT = Path(__file__).resolve().parents[1]
MANY = """
import sys
from default import make_config
from utils.run.folders import check_writable, new_run, resumed_run
config = make_config(work_dir=sys.argv[1], name="mine")
print("ready", flush=True)
sys.stdin.readline()
for _ in range(25):
    check_writable(config.run.work_dir)
    resumed_run(config)
    print(new_run(config))
"""


def at_once(count: int, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns in that many threads, which begin at the same time."""
    start = Barrier(count)

    def waiting(_: int) -> Any:
        start.wait()
        return work()

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(waiting, range(count)))


def test_eight_programs_make_run_folders_at_once(tmp_path: Path) -> None:
    work = tmp_path / "not" / "there" / "yet"
    programs = [
        subprocess.Popen(
            [sys.executable, "-c", MANY, str(work)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(8)
    ]  # fmt: skip
    for program in programs:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
    for program in programs:
        assert program.stdin is not None
        program.stdin.write("\n")
        program.stdin.flush()
    said = [program.communicate() for program in programs]
    assert [error for _, error in said] == [""] * 8
    lines = [line for out, _ in said for line in out.splitlines()]
    folders = [line for line in lines if not line.startswith("--resume: ")]  # of folders that have no config.json yet
    assert len(set(folders)) == len(folders) == 200, "each has its own"
    assert len(existing_runs(work, "mine-seed9826")) == 200
    assert len(list(work.iterdir())) == 200, "nothing else is left behind"
    for folder in folders:
        assert json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))["run"]["name"] == "mine"


def test_a_cache_that_many_build_at_once_is_whole(tmp_path: Path) -> None:
    data = DataConfig(data_path=str(make_mvtec(tmp_path / "data", train=3)), class_names=("bottle",), input_size=32)
    images = build_datasets(data, ("bottle",))[0]
    loader = train_loader(images, batch_size=3, workers=0, seed=0)

    def build(folder: Path) -> torch.Tensor:
        store = make_store(
            "disk", folder, loader, lambda image: [image] * 4, device=torch.device("cpu"),
            progress=lambda batches, _: iter(batches),
        )  # fmt: skip
        return store.levels[0].clone()

    for number in range(15):
        folder = tmp_path / "cache" / str(number)
        built = at_once(8, lambda folder=folder: build(folder))  # type: ignore[misc]
        assert all(torch.equal(level, built[0]) for level in built)
    assert len(list((tmp_path / "cache").iterdir())) == 15, "no half-written one is left behind"


def test_a_sample_that_several_make_at_once_is_whole(tmp_path: Path) -> None:
    root = tmp_path / "data" / "sample"

    def make() -> int:
        make_sample(root)
        return len(list(root.rglob("*.png")))  # whoever is done can read it, whatever the others still do

    counts = at_once(2, make)
    assert is_complete(root)
    assert counts == [len(list(root.rglob("*.png")))] * 2
    assert {p.name for p in root.iterdir() if p.is_dir()} == set(SOURCES)
    assert [p.name for p in root.parent.iterdir()] == ["sample"]
