"""A feature cache on disk that several processes fill, each with its part of the images.

They write into the same files by position, not through mapped memory: on network file systems two machines that map a
page overwrite each other.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from datasets.cache import (
    Extract,
    FeatureSize,
    NoRoom,
    Progress,
    allocate,
    check_space,
    disk_store,
    kept_store,
    to_half,
)
from default import UsageError
from utils.run.distributed import from_first, wait


def fill_together(
    folder: Path,
    ordered: DataLoader,
    extract: Extract,
    *,
    start: int,
    device: torch.device,
    progress: Progress,
    keep: int = 0,
) -> None:
    """Make the cache `folder` unless it is there.

    Args:
        ordered: this process's images, consecutive ones of the data set.
        start: number of its first image.
        keep: bytes of the disk that are left for other files.

    Raises:
        NoRoom: the features do not fit.
        UsageError: a process does not see the folder that the first one has made.
    """
    size = FeatureSize.of(ordered.dataset, extract, device)  # type: ignore[arg-type]
    part = from_first(lambda: begun(folder, size, device, keep) if kept_store(folder, size) is None else None)
    if part is None:
        return
    if not part.is_dir():
        raise UsageError(f"--work-dir: expected one folder that all processes see, but {part} is not everywhere")
    files = [Rows(path) for path in (*sorted(part.glob("level_*.npy")), part / "masks.npy")]
    for batch in progress(ordered, f"{size}, a part in each process"):
        levels = [to_half(level).permute(0, 2, 3, 1) for level in extract(batch.image.to(device, non_blocking=True))]
        values = [*(level.cpu().numpy() for level in levels), np.packbits(batch.mask.flatten(1).numpy(), axis=1)]
        for file, rows in zip(files, values, strict=True):
            file.write(start, rows)
        start += len(batch.label)
    for file in files:
        file.close()
    wait()
    from_first(lambda: finish(part, folder))


def begun(folder: Path, size: FeatureSize, device: torch.device, keep: int) -> Path:
    """A folder beside `folder`, with files of the right size to write into.

    Raises:
        NoRoom: they do not fit.
    """
    problem = check_space(size, "disk", folder.parent, device, keep)
    if problem:
        raise NoRoom(f"--cache disk: {problem}; use --cache none, or another place")
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f"{folder.name}.", suffix=".part"))
    disk_store(size, part)
    try:
        allocate(part)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise NoRoom(f"--cache disk: cannot keep the {size} in {folder.parent}: {error.strerror}") from error
    return part


def finish(part: Path, folder: Path) -> None:
    """Move a whole cache to its place, unless another program was faster."""
    try:
        part.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(part, ignore_errors=True)


class Rows:
    """An .npy file (N, ...) of which some rows are written."""

    def __init__(self, path: Path) -> None:
        values = np.load(path, mmap_mode="r")
        self.offset, self.bytes = values.offset, values.nbytes // len(values)
        self._file = path.open("r+b")

    def write(self, first: int, rows: NDArray) -> None:
        """From row number `first` on."""
        self._file.seek(self.offset + first * self.bytes)
        self._file.write(np.ascontiguousarray(rows).data.cast("B"))

    def close(self) -> None:
        """What was written is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
