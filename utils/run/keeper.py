"""The checkpoints of a run: written in the background while it trains on, the last one and the one before kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from utils.run.checkpoint import write_checkpoint

LAST, PREVIOUS, BEST, MIDDLE = "last.pt", "previous.pt", "best_on_test.pt", "unfinished.pt"


def snapshot(value: Any) -> Any:
    """A copy in memory of nested values, which later training steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: snapshot(v) for key, v in value.items()}
    return type(value)(map(snapshot, value)) if isinstance(value, (list, tuple)) else value


class Keeper:
    """Writes the checkpoints of a run folder, one at a time.

    `finished` and `middle` copy what they are given, and return while a thread writes it; they wait for the write
    before theirs, and raise its error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def finished(self, content: dict[str, Any], more: dict[str, Any], *, best: bool) -> None:
        """After a meta epoch: last.pt with `content` and `more`, what was last.pt as previous.pt, and best_on_test.pt
        with `content` alone if it is the best."""
        self.wait()
        self._running = self._pool.submit(self._write_finished, snapshot(content), snapshot(more), best)

    def middle(self, content: dict[str, Any]) -> None:
        """In the middle of a meta epoch: unfinished.pt."""
        self.wait()
        self._running = self._pool.submit(write_checkpoint, self.folder / MIDDLE, snapshot(content))

    def wait(self) -> None:
        """Until nothing is being written.

        Raises:
            OSError: it could not be written.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write_finished(self, content: dict[str, Any], more: dict[str, Any], best: bool) -> None:
        """At any moment last.pt is whole, and what it replaces is there until then."""
        if best:
            write_checkpoint(self.folder / BEST, content)
        keep_previous(self.folder / LAST, self.folder / PREVIOUS)
        write_checkpoint(self.folder / LAST, content | more)
        with contextlib.suppress(FileNotFoundError):
            (self.folder / MIDDLE).unlink()


def keep_previous(last: Path, previous: Path) -> None:
    """The file at `last` is at `previous`, too, until it is replaced; where a file cannot have two names, it moves."""
    if not last.is_file():
        return
    part = previous.with_name(previous.name + ".part")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    try:
        part.hardlink_to(last)
    except OSError:
        os.replace(last, previous)  # noqa: PTH105
    else:
        os.replace(part, previous)  # noqa: PTH105
