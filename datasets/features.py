"""Features of a data set, batch by batch: computed each time, or once and read from a memory-mapped cache.

Both ways give the same batches in the same order; the cache holds half precision, so its values agree with computed
ones to a relative 2^-11.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.folder import Batch, ImageFolder
from default import UsageError

HALF_MAX = 65504.0
Extract = Callable[[Tensor], list[Tensor]]  # images (B, 3, H, W) -> pooled feature levels
Progress = Callable[[DataLoader, str], Iterator[Batch]]


@dataclass(frozen=True, kw_only=True)
class FeatureBatch:
    """Pooled feature levels (B, c_l, H_l, W_l) of some images; `mask` (B, H, W) bool, the others as in `Batch`."""

    features: list[Tensor]
    mask: Tensor
    label: Tensor
    class_index: Tensor
    path: tuple[str, ...]


class LiveFeatures:
    """Runs the extractor on each batch of the loader."""

    def __init__(self, loader: DataLoader, extract: Extract, device: torch.device) -> None:
        self.loader, self.extract, self.device = loader, extract, device

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.loader)

    def epoch(self, number: int) -> Iterator[FeatureBatch]:
        """One pass; a shuffled loader's order depends on its seed and on `number` alone."""
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(number)
        for batch in self.loader:
            batch = batch.to(self.device, non_blocking=True)
            yield FeatureBatch(
                features=self.extract(batch.image), mask=batch.mask, label=batch.label,
                class_index=batch.class_index, path=batch.path,
            )  # fmt: skip


class CachedFeatures:
    """Reads the batches of the loader's batch sampler from a cache folder written by `build_cache`."""

    def __init__(self, loader: DataLoader, folder: Path, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.dataset: ImageFolder = loader.dataset  # type: ignore[assignment]
        names = sorted(folder.glob("level_*.npy"))
        self.levels = [np.load(name, mmap_mode="r") for name in names]
        self.masks = np.load(folder / "masks.npy", mmap_mode="r")

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.loader)

    def epoch(self, number: int) -> Iterator[FeatureBatch]:
        """One pass; a shuffled loader's order depends on its seed and on `number` alone."""
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(number)  # type: ignore[union-attr]
        for indices in self.loader.batch_sampler:  # type: ignore[union-attr]
            yield self.read(indices)

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        """The images of these numbers, features in float32."""
        items = [self.dataset.items[i] for i in indices]
        side = self.dataset.mask_size
        masks = np.unpackbits(self.masks[indices], axis=1, count=side * side).reshape(-1, side, side)
        return FeatureBatch(
            features=[torch.from_numpy(level[indices]).to(self.device).float() for level in self.levels],
            mask=torch.from_numpy(masks.astype(bool)).to(self.device),
            label=torch.tensor([item.label for item in items], device=self.device),
            class_index=torch.tensor([item.class_index for item in items], device=self.device),
            path=tuple(str(item.path) for item in items),
        )


def cache_key(dataset: ImageFolder, **settings: object) -> str:
    """Which cache fits: the files with sizes and times, and all `settings` that the features depend on."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for item in dataset.items:
        for path in (item.path, item.mask_path):
            if path is not None:
                stat = path.stat()
                digest.update(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{item.label}\n".encode())
    return digest.hexdigest()[:20]


def cached_features(
    loader: DataLoader,
    ordered: DataLoader,
    extract: Extract,
    *,
    device: torch.device,
    root: Path,
    key: str,
    progress: Progress,
) -> CachedFeatures:
    """Features of `loader`'s batches from the cache `root`/`key`, which is first built from `ordered` if need be.

    `ordered` is a loader over the same data set, in order and complete. The cache is written beside its place and
    moved there when it is whole, so a half-written one is never used.

    Raises:
        UsageError: the disk is too small.
    """
    folder = root / key
    if not folder.is_dir():
        build_cache(ordered, extract, device=device, folder=folder, progress=progress)
    return CachedFeatures(loader, folder, device)


def build_cache(
    ordered: DataLoader, extract: Extract, *, device: torch.device, folder: Path, progress: Progress
) -> None:
    """Write the features of every image (float16, one .npy per level) and the masks (packed bits)."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir()
    count, start = len(ordered.dataset), 0  # type: ignore[arg-type]
    arrays: list[np.ndarray] = []
    try:
        for batch in progress(ordered, f"features of {count} images"):
            levels = [f.clamp(-HALF_MAX, HALF_MAX).half().cpu().numpy() for f in extract(batch.image.to(device))]
            masks = np.packbits(batch.mask.flatten(1).numpy(), axis=1)
            if not arrays:
                arrays = _allocate(part, count, levels, masks)
            for array, values in zip(arrays, [*levels, masks], strict=True):
                array[start : start + len(values)] = values
            start += len(masks)
        del arrays
        if not folder.is_dir():  # another process may have been faster
            part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _allocate(part: Path, count: int, levels: list[np.ndarray], masks: np.ndarray) -> list[np.ndarray]:
    """Files for all images, after a look at the disk."""
    need = sum(a[0].nbytes for a in [*levels, masks]) * count
    free = shutil.disk_usage(part).free
    if need > free * 0.95:
        raise UsageError(
            f"--pre-extract: the features of {count} images need {need / 1e9:.1f} GB under {part.parent}, where "
            f"{free / 1e9:.1f} GB are free; use another --work-dir, or --no-pre-extract"
        )
    names = [f"level_{i}.npy" for i in range(len(levels))] + ["masks.npy"]
    return [
        np.lib.format.open_memmap(part / name, mode="w+", dtype=a.dtype, shape=(count, *a.shape[1:]))
        for name, a in zip(names, [*levels, masks], strict=True)
    ]
