"""torchrun starts all processes again when one is killed, and they go on from the last checkpoint."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from fake_data import METHOD, TINY, make_mvtec
from utils.run.checkpoint import read_checkpoint
from utils.run.distributed import unwritten
from utils.run.log import read_lines

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 8


def workers(parent: int) -> list[int]:
    """The processes that a process has started; Linux tells."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def wait_for(path: Path, lines: int, run: subprocess.Popen) -> None:
    """Until a file in a folder of `path` has so many lines."""
    for _ in range(60000):
        for log in path.glob("*/metrics.jsonl"):
            if len(log.read_text().splitlines()) >= lines:
                return
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    raise AssertionError("there is no first meta epoch")


def test_processes_that_are_started_again_find_no_word_of_the_dead() -> None:
    """The store outlives them: in each round all meet in a part of it that is empty."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))

    def meet(number: int) -> list[int]:
        own = dist.TCPStore("127.0.0.1", store.port, is_master=False, timeout=timedelta(seconds=60))
        time.sleep(0.05 * (number != 0))  # the first one meets the words of the round before
        part = unwritten(own, number, 3)
        return [part.add("arrived", 1), *(part.add(f"only {n}", 0) for n in range(3)), part.add(f"only {number}", 1)]

    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(meet, range(3)))
        assert sorted(row[0] for row in found) == [1, 2, 3], "all in one part, which was empty"
        assert all(row[-1] == 1 for row in found)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux to find torchrun's processes")
def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    tree, work = make_mvtec(tmp_path / "data"), tmp_path / "work"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words = ["--dataset", "folder", "--data-path", str(tree), "--work-dir", str(work), "--resume", "--no-report"]
    more = ["--meta-epochs", str(EPOCHS), "--eval-interval", "100", "--save-every", "1", "--batch-size", "6"]
    more += ["--extractor", "test_efficientnet", "--no-pretrained"]
    with subprocess.Popen(
        [*torchrun, "main.py", *TINY, *METHOD, *words, *more], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as run:  # fmt: skip
        try:
            wait_for(work, 1, run)
            os.kill(workers(run.pid)[-1], signal.SIGKILL)
            text, errors = run.communicate(timeout=500)
        finally:
            run.terminate()  # torchrun ends its processes
    assert run.returncode == 0, errors
    (folder,) = (path for path in work.iterdir() if path.name != "cache")
    again = [line for line in text.splitlines() if "goes on with meta epoch" in line and not line.endswith("the first")]
    assert text.count("a new one starts") == 1
    assert len(again) == 1 and "goes on with meta epoch 1 of" not in again[0]
    assert [entry["epoch"] for entry in read_lines(folder / "metrics.jsonl")] == list(range(1, EPOCHS + 1))
    assert read_checkpoint(folder / "last.pt")["epoch"] == EPOCHS
    assert (folder / "results.json").is_file()
