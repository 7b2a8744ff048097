"""What the system refuses ends in one line and a status; a bug of ours in a traceback that says where to report it."""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import main as program
from fake_data import METHOD, TINY, make_mvtec
from utils.run.trouble import trouble

ROOT = Path(__file__).resolve().parents[1]


def no_such_file() -> None:
    Path("/not/here").read_bytes()


def disk_full() -> None:
    with Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")


def too_much_memory() -> None:
    bytearray(1 << 60)


def too_large_a_tensor() -> None:
    torch.empty(1 << 58)


def dead_reader() -> None:
    raise RuntimeError("DataLoader worker (pid 123) is killed by signal: Killed. ")


CASES: dict[Callable[[], None], str] = {
    no_such_file: r"/not/here: No such file or directory",
    disk_full: r"No space left on device; what was written before is whole, and --resume goes on from the last .*",
    too_much_memory: r"out of memory; a smaller --batch-size or --input-size needs less",
    too_large_a_tensor: r"out of memory: .*; a smaller --batch-size .*",
    dead_reader: r"a process that reads images died \(DataLoader worker \(pid 123\) .*\); fewer .* --resume goes on",
}


@pytest.mark.parametrize("act", CASES, ids=lambda act: act.__name__)
def test_what_the_system_refuses_is_one_line(
    act: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(program, "run", lambda argv: act())
    assert program.main([]) == 1
    assert re.fullmatch(rf"main.py: error: {CASES[act]}\n", capsys.readouterr().err)


def test_errors_of_other_processes_and_devices() -> None:
    text = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback ...:\n  File x\nOSError: [Errno 5] bad"
    assert trouble(OSError(text)) == "[Errno 5] bad"
    assert trouble(OSError(errno.EIO, "Input/output error", "a.png")) == "a.png: Input/output error"
    assert str(trouble(torch.OutOfMemoryError("CUDA out of memory. Tried"))).startswith("out of memory: CUDA out of")
    assert str(trouble(RuntimeError("MPS backend out of memory (MPS"))).startswith("out of memory: MPS")
    for bug in (RuntimeError("shapes"), ValueError("x"), KeyError("y"), AssertionError(), ZeroDivisionError()):
        assert trouble(bug) is None


def test_a_bug_says_where_to_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(program, "run", lambda argv: [][0])
    assert program.main(["--preset", "cpu", "--name", "a b\udcff"[:3]]) == 70
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):") and "IndexError" in said
    lines = said.splitlines()[-4:]
    assert lines[0].startswith("main.py: this is a bug of VQ-Flow. Please report it")
    assert lines[1].startswith(f"version: {program.__version__}, Python {sys.version.split()[0]}")
    assert lines[2] == "command: main.py --preset cpu --name 'a b'"
    assert lines[3] == "config: not resolved", "the name is refused"
    assert program.main(["--preset", "cpu"]) == 70
    assert '"extractor": "tf_efficientnet_lite0"' in capsys.readouterr().err.splitlines()[-1]


# --- whole programs


LIMITED = """
import os, resource, sys
sys.path.insert(0, os.getcwd())
from main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_checkpoint_that_does_not_fit_ends_in_one_line(tmp_path: Path) -> None:
    """Files of at most 300,000 bytes: the checkpoint is larger, all that comes before it is not."""
    tree = make_mvtec(tmp_path / "data", classes=("grid",))
    argv = [*TINY, *METHOD, "--dataset", "mvtec", "--data-path", str(tree), "--class-names", "grid", "--cache", "none"]
    words = [sys.executable, "-c", LIMITED, "300000", *argv, "--work-dir", str(tmp_path / "work")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    (folder,) = (tmp_path / "work").glob("mvtec-*")
    expected = f"main.py: error: {folder / 'best_on_test.pt'}: {os.strerror(errno.EFBIG)}\n"
    assert (done.returncode, done.stderr) == (1, expected)
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.jsonl"}


READING = """
import os, sys
from pathlib import Path
sys.path.insert(0, os.getcwd())
from datasets import build_datasets
from datasets.loaders import ordered_loader
from default import DataConfig

if __name__ == "__main__":
    data = DataConfig(data_path=sys.argv[1], class_names=("grid",), input_size=32)
    loader = ordered_loader(build_datasets(data, ("grid",))[0], batch_size=1, workers=2)
    batches = iter(loader)
    next(batches)
    print(*(worker.pid for worker in loader._iterator._workers), flush=True)
    sys.stdin.readline()
    print(1 + sum(1 for _ in batches), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems leave it to PyTorch's own watchdog")
def test_readers_are_deaf_to_signals_and_end_with_their_parent(tmp_path: Path) -> None:
    tree, script = make_mvtec(tmp_path / "data", classes=("grid",)), tmp_path / "reading.py"
    script.write_text(READING)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tree)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "6\n", "they read on"
    process.kill()
    _, error = process.communicate()
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert [alive(pid) for pid in pids] == [False, False]
    assert "Traceback" not in error


def alive(pid: int) -> bool:
    """Not ended, and no zombie that nobody waits for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
