"""What --mode cache does: lists the features that are kept on disk, and clears those that were not used lately."""

from __future__ import annotations

import time
from pathlib import Path

from datasets.cache import sweep, take_away
from default import Config, UsageError

DAY = 86400
STORED = "level_0.npy"  # is in every cache of ours, and in nothing else


def tend(config: Config) -> str:
    """Clear what --clear says; a line for each cache that is left, the largest first, and their sum.

    Raises:
        UsageError: a cache cannot be removed.
    """
    root, days = Path(config.run.work_dir) / "cache", config.run.clear
    sweep(root)
    cleared = 0
    for folder in caches(root):
        if days is not None and unused(folder) >= days:
            try:
                take_away(folder)
            except OSError as error:
                raise UsageError(f"--clear: cannot remove {folder}: {error.strerror}") from error
            cleared += 1
    left = sorted(caches(root), key=lambda folder: (-size_of(folder), folder.name))
    lines = [f"{folder}: {size_of(folder) / 1e9:.2f} GB, last used {unused(folder):.1f} days ago" for folder in left]
    total = f"{len(left)} caches under {root}, {sum(map(size_of, left)) / 1e9:.2f} GB"
    return "\n".join([*lines, total + (f"; {cleared} removed" if days is not None else "")])


def caches(root: Path) -> list[Path]:
    return [path for path in root.glob("*") if (path / STORED).is_file() and path.suffix != ".part"]


def size_of(folder: Path) -> int:
    """Bytes."""
    return sum(path.stat().st_size for path in folder.iterdir())


def unused(folder: Path) -> float:
    """Days since a program opened a cache; its files remain readable to those that have it open."""
    return max(time.time() - folder.stat().st_mtime, 0.0) / DAY
