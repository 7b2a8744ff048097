"""How every file of a run is written: whole or not at all, and on the disk before it counts."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, data: bytes | Callable[[BinaryIO], object], *, durable: bool = True) -> None:
    """Write `data`, or what a function writes, to a temporary file beside `path`, then move it there.

    Whoever reads `path` finds the old file or the new one, even after a kill or a power failure.

    Args:
        durable: return when it is on the disk; without, a power failure may lose it, but never halve it.

    Raises:
        OSError: it cannot be written; the old file is as it was, and nothing else is left behind.
    """
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data) if isinstance(data, bytes) else data(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(part, path)  # noqa: PTH105  beside os.fsync, on purpose: the two calls that count
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and not error.errno:  # NumPy's
            raise OSError(errno.EIO, str(error), str(path)) from error
        if isinstance(error, OSError) and not error.filename:  # a full disk does not say whose it was
            error.filename = str(path)
        raise
    if durable:
        sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a text file, in one piece and on the disk."""
    with path.open("ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Put a folder's names on the disk, where the system can do that."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
