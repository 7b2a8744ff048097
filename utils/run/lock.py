"""One program in a run folder: a lock that says whose it is, and that a dead owner leaves to the next one.

The operating system holds the lock, and frees it however its owner ends. Some file systems do not pass locks on to
other machines, or have none: there the file's age says whether its owner is alive, who touches it all the time.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import BinaryIO

from default import UsageError

NAME = "lock"
BEAT = 20.0  # seconds between two touches of the file
SILENT = 600.0  # seconds without a touch after which an owner that cannot be asked for is taken to be dead


@dataclass(frozen=True, kw_only=True)
class Owner:
    """The process that holds a lock, or died with it; `since` is when it took it, in seconds since 1970."""

    host: str
    pid: int
    since: float

    def __str__(self) -> str:
        began = datetime.fromtimestamp(self.since).isoformat(sep=" ", timespec="seconds")
        return f"process {self.pid} on {self.host} since {began} ({duration(time.time() - self.since)})"


def duration(seconds: float) -> str:
    """In words: 40 s, 12 min, 5 h."""
    size, unit = next(((s, u) for s, u in ((3600, "h"), (60, "min")) if seconds >= 2 * s), (1, "s"))
    return f"{max(seconds, 0) / size:.0f} {unit}"


@contextlib.contextmanager
def locked(folder: Path, flag: str) -> Iterator[None]:
    """No other program is `locked` in `folder` meanwhile; of several that try at once, one gets in.

    Raises:
        UsageError: another one is at work there; the message begins with `flag`.
    """
    path = folder / NAME
    with seized(path) as (file, hold):
        owner = read_owner(path)
        if hold is Hold.TAKEN or (owner and not is_dead(owner, path, hold)):
            advice = "wait for it" if hold is Hold.TAKEN else f"wait for it, or delete {path} if it is dead"
            raise UsageError(f"{flag}: {folder} is in use by {owner or 'another program'}; {advice}")
        if owner:
            print(f"{folder}: taken over from {owner}, which left its lock behind")
        write_owner(file)
        with beating(path):
            try:
                yield
            finally:
                release(file, path)


class Hold(Enum):
    """What the operating system says of a lock: ours, somebody else's, or that the file system has none."""

    OURS = 1
    TAKEN = 2
    UNKNOWN = 3


@contextlib.contextmanager
def seized(path: Path) -> Iterator[tuple[BinaryIO, Hold]]:
    """The lock's file, open, and whose it is; who leaves frees it."""
    while True:
        with path.open("a+b") as file:
            hold = try_lock(file)
            if hold is Hold.TAKEN or is_at(file, path):
                yield file, hold
                return
        # Its owner was leaving, and took away the file that we had opened.


def is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file still lies at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def try_lock(file: BinaryIO) -> Hold:
        """Lock a byte far behind the owner's name, which others must be able to read."""
        file.seek(1 << 30)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return Hold.TAKEN
        return Hold.OURS

else:
    import fcntl

    def try_lock(file: BinaryIO) -> Hold:
        """Lock the file, without waiting."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Hold.TAKEN
        except OSError:  # some network file systems have no locks
            return Hold.UNKNOWN
        return Hold.OURS


def read_owner(path: Path) -> Owner | None:
    """Whose lock it is or was; None if it was given back, or its owner has not yet put down its name."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def write_owner(file: BinaryIO) -> None:
    """Put down this process's name."""
    owner = Owner(host=socket.gethostname(), pid=os.getpid(), since=time.time())
    file.truncate(0)
    file.write(json.dumps(asdict(owner)).encode())
    file.flush()


def is_dead(owner: Owner, path: Path, hold: Hold) -> bool:
    """Whether a lock that is not `TAKEN` was left behind: surely on this machine, by the file's age on others."""
    if hold is Hold.OURS and owner.host == socket.gethostname():
        return True
    return time.time() - path.stat().st_mtime > SILENT


@contextlib.contextmanager
def beating(path: Path) -> Iterator[None]:
    """The file is touched every `BEAT` seconds meanwhile."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def release(file: BinaryIO, path: Path) -> None:
    """Give the lock back, and take its file away where the system lets us while it is open."""
    file.truncate(0)
    with contextlib.suppress(OSError):
        path.unlink()
