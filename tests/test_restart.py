"""torchrun starts all processes again when one is killed, and they go on from the last checkpoint."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fake_data import METHOD, TINY, make_mvtec
from utils.run.checkpoint import read_checkpoint
from utils.run.log import read_lines

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 25


def workers(parent: int) -> list[int]:
    """The processes that a process has started; Linux tells."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def wait_for(path: Path, lines: int, run: subprocess.Popen) -> None:
    """Until a file in a folder of `path` has so many lines."""
    for _ in range(12000):
        for log in path.glob("*/metrics.jsonl"):
            if len(log.read_text().splitlines()) >= lines:
                return
        assert run.poll() is None, run.communicate()
        time.sleep(0.01)
    raise AssertionError("there is no first meta epoch")


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux to find torchrun's processes")
def test_a_killed_process_is_started_again(tmp_path: Path) -> None:
    tree, work = make_mvtec(tmp_path / "data"), tmp_path / "work"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    words = ["--dataset", "folder", "--data-path", str(tree), "--work-dir", str(work), "--resume", "--no-report"]
    more = ["--meta-epochs", str(EPOCHS), "--eval-interval", "100", "--save-every", "1", "--batch-size", "6"]
    with subprocess.Popen(
        [*torchrun, "main.py", *TINY, *METHOD, *words, *more], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as run:  # fmt: skip
        try:
            wait_for(work, 2, run)
            os.kill(workers(run.pid)[-1], signal.SIGKILL)
            text, errors = run.communicate(timeout=120)
        finally:
            run.terminate()  # torchrun ends its processes
    assert run.returncode == 0, errors
    (folder,) = (path for path in work.iterdir() if path.name != "cache")
    assert text.count("a new one starts") == 1 and text.count(f"--resume: {folder} goes on with meta epoch ") == 1
    assert "goes on with meta epoch 1 of" not in text
    assert [entry["epoch"] for entry in read_lines(folder / "metrics.jsonl")] == list(range(1, EPOCHS + 1))
    assert read_checkpoint(folder / "last.pt")["epoch"] == EPOCHS
    assert (folder / "results.json").is_file()
