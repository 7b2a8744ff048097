"""A run folder's lock: one program at a time, whoever dies with it, and however many come at once."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from default import UsageError
from utils.run import lock
from utils.run.lock import NAME, SILENT, duration, locked

ROOT = Path(__file__).resolve().parents[1]
HOLD = """
import sys, time
from pathlib import Path
from utils.run.lock import locked
with locked(Path(sys.argv[1]), "--resume"):
    print("in", flush=True)
    time.sleep(60)
"""
COMPETE = """
import sys, time
from pathlib import Path
from default import UsageError
from utils.run.lock import locked
folder = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
try:
    with locked(folder, "--resume"):
        print("in", flush=True)
        sys.stdin.readline()
except UsageError:
    print("out", flush=True)
"""
HAMMER = """
import sys
from pathlib import Path
from default import UsageError
from utils.run.lock import locked
folder, entered = Path(sys.argv[1]), 0
print("ready", flush=True)
sys.stdin.readline()
while entered < 60:
    try:
        with locked(folder, "--resume"):
            (folder / "inside").touch(exist_ok=False)
            (folder / "inside").unlink()
            entered += 1
    except UsageError:
        pass
"""


def start(program: str, folder: Path) -> subprocess.Popen[str]:
    """The program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def leave_behind(folder: Path, host: str, age: float) -> None:
    """A dead program's lock."""
    path = folder / NAME
    path.write_text(json.dumps({"host": host, "pid": 4321, "since": time.time() - 3 * 3600}), encoding="utf-8")
    os.utime(path, (time.time() - age,) * 2)


def test_a_second_program_is_told_who_is_there(tmp_path: Path) -> None:
    holder = start(HOLD, tmp_path)
    assert line(holder) == "in"
    with pytest.raises(UsageError) as caught, locked(tmp_path, "--resume"):
        pass
    where = f"--resume: {tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since "
    assert str(caught.value).startswith(where)
    assert str(caught.value).endswith(" s); wait for it")
    assert (tmp_path / NAME).is_file(), "who was refused leaves the lock alone"
    holder.kill()
    holder.communicate()


def test_a_killed_programs_lock_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = start(HOLD, tmp_path)
    assert line(holder) == "in"
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert (tmp_path / NAME).is_file()
    with locked(tmp_path, "--resume"):
        assert f"taken over from process {holder.pid} on " in capsys.readouterr().out
        assert json.loads((tmp_path / NAME).read_text(encoding="utf-8"))["pid"] == os.getpid()
    with locked(tmp_path, "--resume"):
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [None, UsageError("no"), KeyboardInterrupt()])
def test_it_is_given_back_however_the_program_ends(error: BaseException | None, tmp_path: Path) -> None:
    try:
        with locked(tmp_path, "--resume"):
            assert (tmp_path / NAME).is_file()
            if error:
                raise error
    except (UsageError, KeyboardInterrupt) as caught:
        assert caught is error
    assert not (tmp_path / NAME).exists()


def test_a_program_on_another_machine_counts_as_alive_for_a_while(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_behind(tmp_path, "elsewhere", SILENT - 60)
    said = r"in use by process 4321 on elsewhere since .* \(3 h\); .*delete .*lock"
    with pytest.raises(UsageError, match=said), locked(tmp_path, "--resume"):
        pass
    leave_behind(tmp_path, "elsewhere", SILENT + 60)
    with locked(tmp_path, "--resume"):
        assert "taken over from process 4321 on elsewhere" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="its locks are other ones")
def test_without_locks_in_the_file_system_the_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path, "--resume"), pytest.raises(UsageError, match="in use by"), locked(tmp_path, "--resume"):
        pass
    leave_behind(tmp_path, socket.gethostname(), SILENT + 60)
    with locked(tmp_path, "--resume"):
        pass


def test_a_living_owner_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with locked(tmp_path, "--resume"):
        os.utime(tmp_path / NAME, (0, 0))
        deadline = time.time() + 10
        while (tmp_path / NAME).stat().st_mtime == 0 and time.time() < deadline:
            time.sleep(0.02)
        assert time.time() - (tmp_path / NAME).stat().st_mtime < 60


def test_half_a_name_is_nobodys(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text('{"host": "a', encoding="utf-8")
    with locked(tmp_path, "--resume"):
        pass


@pytest.mark.parametrize("stale", [True, False])
def test_of_many_at_once_exactly_one_gets_in(stale: bool, tmp_path: Path) -> None:
    if stale:
        leave_behind(tmp_path, socket.gethostname(), 0)
    programs = [start(COMPETE, tmp_path) for _ in range(8)]
    assert [line(p) for p in programs] == ["ready"] * 8
    for program in programs:
        go(program)
    said = [line(p) for p in programs]
    assert said.count("out") == 7, said
    winner = next(p for p, words in zip(programs, said, strict=True) if words != "out")
    assert not stale or "taken over from process 4321" in said[programs.index(winner)]
    for program in programs:
        assert program.communicate("\n" if program is winner else None)[1] == ""


def test_nobody_is_ever_in_together_with_another(tmp_path: Path) -> None:
    programs = [start(HAMMER, tmp_path) for _ in range(4)]
    assert [line(p) for p in programs] == ["ready"] * 4
    for program in programs:
        go(program)
    ends = [(p.communicate()[1], p.returncode) for p in programs]
    assert ends == [("", 0)] * 4
    assert not (tmp_path / NAME).exists()


def test_durations() -> None:
    assert [duration(s) for s in (-1, 5, 119, 120, 7199, 7200)] == ["0 s", "5 s", "119 s", "2 min", "120 min", "2 h"]
