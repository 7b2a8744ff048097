"""Where features of a data set are kept: a memory-mapped folder, memory, or the device; built once, whole or not.

A folder is written beside its place under a name of its own and moved there when it is whole: a half-written one is
never used, and of several processes that build at once the first to finish wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.folder import Batch, ImageFolder
from datasets.masks import mask_files
from default import UsageError
from utils.run.lock import Hold, seized

VERSION = 5  # of the folder's layout and of how images are read
HALF_MAX = 65504.0
SHARE = 0.95  # of the free space that features may take
ABANDONED = 2 * 86400  # seconds after which a half-written folder is a dead process's where no lock tells
LOCK = ".lock"  # ends the name of a file beside a half-written folder; who writes it holds it from before it is there
BLOCK = 1 << 20

Extract = Callable[[Tensor], list[Tensor]]  # images (B, 3, H, W) -> pooled feature levels
Progress = Callable[[DataLoader, str], Iterator[Batch]]


def to_half(features: Tensor) -> Tensor:
    """In half precision, which holds no more than HALF_MAX."""
    return features.clamp(-HALF_MAX, HALF_MAX).half()


@dataclass(frozen=True, kw_only=True)
class FeatureStore:
    """`levels` (N, H_l, W_l, c_l) float16, channels last; `masks` (N, ceil(H W / 8)) uint8, eight pixels a byte."""

    levels: tuple[Tensor, ...]
    masks: Tensor


@dataclass(frozen=True, kw_only=True)
class FeatureSize:
    """What the features of a data set take: `shapes` (H_l, W_l, c_l) of an image, and the packed mask's bytes."""

    count: int
    shapes: tuple[tuple[int, ...], ...]
    mask: int

    @classmethod
    def of(cls, dataset: ImageFolder, extract: Extract, device: torch.device) -> FeatureSize:
        """Asked of the extractor with one black image."""
        side, mask = dataset.input_size, dataset.mask_size
        levels = extract(torch.zeros(1, 3, side, side, device=device))
        shapes = tuple((f.shape[2], f.shape[3], f.shape[1]) for f in levels)
        return cls(count=len(dataset), shapes=shapes, mask=-(-mask * mask // 8))

    @property
    def layout(self) -> list[tuple[int, torch.dtype, tuple[int, ...]]]:
        """Count, type and shape of an entry of each level and of the masks."""
        levels = [(self.count, torch.float16, shape) for shape in self.shapes]
        return [*levels, (self.count, torch.uint8, (self.mask,))]

    @property
    def total(self) -> int:
        """Bytes."""
        return self.count * (sum(2 * h * w * c for h, w, c in self.shapes) + self.mask)

    def __str__(self) -> str:
        return f"features of {self.count} images ({self.total / 1e9:.2f} GB)"


def cache_key(dataset: ImageFolder, **settings: object) -> str:
    """Which cache fits: the files with sizes and times, and all `settings` that the features depend on."""
    settings |= {"version": VERSION}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for item in dataset.items:
        own = f"{item.label}|{item.box}|{dataset.reading(item)!r}"
        for path in (item.path, *(mask_files(item.mask_path) if item.mask_path else ())):
            stat = path.stat()
            digest.update(os.fsencode(path.resolve()))
            digest.update(f"|{stat.st_size}|{stat.st_mtime_ns}|{own}\n".encode())
    return digest.hexdigest()[:20]


def free_space(place: str, root: Path, device: torch.device) -> float:
    """Bytes that are free on disk, in memory or on the device; infinite where the system does not tell."""
    if place == "disk":
        root.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(root).free
    if place == "device" and device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return float("inf")


def check_space(size: FeatureSize, place: str, root: Path, device: torch.device, keep: int = 0) -> str | None:
    """What is wrong with keeping the features at `place`, None if they fit and `keep` bytes of it are left."""
    free = free_space(place, root, device)
    if size.total <= min(SHARE * free, free - keep):
        return None
    where = {"disk": f"under {root}", "ram": "in memory", "device": f"on {device}"}[place]
    use = "checkpoints" if place == "disk" else "training"
    others = f" and {keep / 1e9:.2f} are kept for {use}" if keep else ""
    return f"the {size} do not fit {where}, where {free / 1e9:.2f} GB are free{others}"


def open_store(folder: Path) -> FeatureStore:
    """A whole cache folder, mapped into memory."""
    names = sorted(folder.glob("level_*.npy"))
    levels = tuple(torch.from_numpy(np.load(name, mmap_mode="c")) for name in names)
    return FeatureStore(levels=levels, masks=torch.from_numpy(np.load(folder / "masks.npy", mmap_mode="c")))


def memory_store(size: FeatureSize, place: str, device: torch.device) -> FeatureStore:
    """An empty store in memory or on the device."""
    where = device if place == "device" else torch.device("cpu")
    levels = tuple(torch.empty(size.count, *s, dtype=torch.float16, device=where) for s in size.shapes)
    return FeatureStore(levels=levels, masks=torch.empty(size.count, size.mask, dtype=torch.uint8))


def disk_store(size: FeatureSize, folder: Path) -> FeatureStore:
    """An empty store in a folder, as `open_store` reads it."""
    shapes = {f"level_{i}.npy": (np.float16, s) for i, s in enumerate(size.shapes)} | {
        "masks.npy": (np.uint8, (size.mask,))
    }
    made = [
        torch.from_numpy(np.lib.format.open_memmap(folder / name, mode="w+", dtype=kind, shape=(size.count, *shape)))
        for name, (kind, shape) in shapes.items()
    ]
    return FeatureStore(levels=tuple(made[:-1]), masks=made[-1])


def fill(store: FeatureStore, batches: Iterator[Batch], extract: Extract, device: torch.device) -> None:
    """Features in half precision, values beyond its range clamped, and masks."""
    start = 0
    for batch in batches:
        part = slice(start, start + len(batch.label))
        for target, level in zip(store.levels, extract(batch.image.to(device, non_blocking=True)), strict=True):
            target[part] = to_half(level).permute(0, 2, 3, 1)
        store.masks[part] = torch.from_numpy(np.packbits(batch.mask.flatten(1).numpy(), axis=1))
        start = part.stop


class NoRoom(UsageError):
    """Features cannot be kept where they should be; they can be computed anew instead."""


def allocate(folder: Path) -> None:
    """Have the disk set aside what the files of an empty store take: a write into a memory-mapped file on a full disk
    would kill the program.

    Raises:
        OSError: it has not that much.
    """
    for path in folder.glob("*.npy"):
        size = path.stat().st_size
        with path.open("r+b") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
                continue
            file.seek(0, os.SEEK_END)  # elsewhere by writing; the header's part is there
            start = path.read_bytes()[:128]
            file.seek(0)
            for place in range(0, size, BLOCK):
                file.write(bytes(min(BLOCK, size - place)))
            file.seek(0)
            file.write(start)


def sweep(root: Path) -> None:
    """Remove half-written folders whose writer is dead: at once where the system tells, else when they are old."""
    for old in root.glob("*.part"):
        with contextlib.suppress(OSError):  # another process has just finished it, or it is another user's
            if is_abandoned(old):
                shutil.rmtree(old, ignore_errors=True)
                lock_of(old).unlink(missing_ok=True)


def lock_of(part: Path) -> Path:
    """The lock of a half-written folder."""
    return part.with_name(part.name + LOCK)


def is_abandoned(part: Path) -> bool:
    """Whether nobody writes a half-written folder any more."""
    if lock_of(part).is_file():
        with seized(lock_of(part)) as (_, hold):
            if hold is not Hold.UNKNOWN:
                return hold is Hold.OURS
    return time.time() - part.stat().st_mtime > ABANDONED


def build_folder(
    folder: Path, size: FeatureSize, ordered: DataLoader, extract: Extract, *, device: torch.device, progress: Progress
) -> None:
    """Write the cache `folder`, which every user may read; another process may do the same at the same time.

    Raises:
        NoRoom: the disk is full, or the folder cannot be written.
    """
    part = folder.parent / f"{folder.name}.{secrets.token_hex(4)}.part"
    try:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            sweep(folder.parent)
            with seized(lock_of(part)):
                part.mkdir()
                store = disk_store(size, part)
                allocate(part)
                fill(store, progress(ordered, str(size)), extract, device)
                del store
                settle(part, folder)
        except OSError as error:
            raise NoRoom(f"--cache disk: cannot keep the {size} in {folder.parent}: {error.strerror}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            lock_of(part).unlink(missing_ok=True)


def settle(part: Path, folder: Path) -> None:
    """Move a whole folder to its place, unless another process was faster."""
    try:
        part.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise


def kept_store(folder: Path, size: FeatureSize) -> FeatureStore | None:
    """The cache `folder` if it is there and is what it should be; a damaged one is taken away, which is said.

    Raises:
        NoRoom: it is damaged, and not ours to take away.
    """
    if not folder.is_dir():
        return None
    with contextlib.suppress(OSError, ValueError, EOFError):
        store = open_store(folder)
        if [(len(v), v.dtype, tuple(v.shape[1:])) for v in (*store.levels, store.masks)] == size.layout:
            with contextlib.suppress(OSError):
                os.utime(folder)  # when it was last used
            return store
    print(f"{folder} is damaged: it is made anew", file=sys.stderr)
    try:
        take_away(folder)
    except OSError as error:
        raise NoRoom(f"--cache disk: {folder} cannot be replaced: {error.strerror}") from error
    return None


def take_away(folder: Path) -> None:
    """Remove a cache: out of its place first, as what is half gone must not be opened.

    Raises:
        OSError: it is not ours to remove.
    """
    gone = folder.rename(folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.part"))
    shutil.rmtree(gone, ignore_errors=True)  # what remains is swept later


def make_store(
    place: str,
    folder: Path,
    ordered: DataLoader,
    extract: Extract,
    *,
    device: torch.device,
    progress: Progress,
    keep: int = 0,
) -> FeatureStore:
    """Features of `ordered`'s images at `place` (disk, ram or device), read from `folder` where it is there.

    `keep` bytes of that place are left for other things.

    Raises:
        NoRoom: they do not fit.
    """
    size = FeatureSize.of(ordered.dataset, extract, device)  # type: ignore[arg-type]
    kept = kept_store(folder, size)
    if place == "disk" and kept is not None:
        return kept
    problem = check_space(size, place, folder.parent, device, keep)
    if problem:
        raise NoRoom(f"--cache {place}: {problem}; use --cache none, or another place")
    if place == "disk":
        build_folder(folder, size, ordered, extract, device=device, progress=progress)
        made = kept_store(folder, size)
        if made is None:
            raise NoRoom(f"--cache disk: {folder} is gone as soon as it is written; is it being cleared?")
        return made
    store = memory_store(size, place, device)
    if kept is not None:
        for target, source in zip((*store.levels, store.masks), (*kept.levels, kept.masks), strict=True):
            target.copy_(source)
    else:
        fill(store, progress(ordered, str(size)), extract, device)
    return store
