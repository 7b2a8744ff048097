"""SIGTERM and Ctrl-C: noted while a step is taken, and then acted upon between two steps; elsewhere at once.

Signals belong to the whole process, and so does what is known of them here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import TypeVar

SIGNALS = (signal.SIGTERM, signal.SIGINT)
DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG

Item = TypeVar("Item")


class Stopped(KeyboardInterrupt):
    """The program was asked to end: by which signal, and what it says of it."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text)
        self.number, self.text = number, text

    @property
    def status(self) -> int:
        """What the program leaves with: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


class _State:
    """Which signal came, 0 for none, and whether it is held back."""

    asked = 0
    holding = False


@contextlib.contextmanager
def heeding() -> Iterator[None]:
    """Signals end in `Stopped` meanwhile; only the main thread can ask for that, in others nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _State.asked, _State.holding = 0, False


def _on_signal(number: int, _: object) -> None:
    """The first one is noted where it is held back; the second one ends the program wherever it is."""
    if not _State.holding or _State.asked:
        raise Stopped(number)
    _State.asked = number
    line = f"{signal.Signals(number).name}: the step is finished and saved; once more ends at once\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode() if os.environ.get("RANK", "0") == "0" else b"")  # print may be what was interrupted


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A first signal is only noted meanwhile (see `asked`), and raises `Stopped` at the end."""
    before, _State.holding = _State.holding, True
    try:
        yield
    finally:
        _State.holding = before
    if _State.asked and not before:
        raise Stopped(_State.asked)


@contextlib.contextmanager
def released() -> Iterator[None]:
    """Within `held`: signals raise `Stopped` at once again, and one that was noted does so now."""
    before, _State.holding = _State.holding, False
    try:
        if _State.asked:
            raise Stopped(_State.asked)
        yield
    finally:
        _State.holding = before


def asked() -> int:
    """The signal that was noted, 0 for none."""
    return _State.asked


def quietly_started(start: Callable[[], Item]) -> Item:
    """What `start` gives; the processes that it starts are deaf to Ctrl-C and SIGTERM, which are the program's matter
    even where a terminal or a batch system sends them to all."""
    if not hasattr(signal, "pthread_sigmask"):
        return start()
    resource_tracker.ensure_running()  # starting it would let the signals through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        return start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int) -> None:
    """In a process that `parent` started: it ends when that one dies, however that happens."""
    if sys.platform != "linux":
        return  # PyTorch's workers look after their parent now and then
    import ctypes

    ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)
