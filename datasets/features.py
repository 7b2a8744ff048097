"""Features of a data set, batch by batch: computed each time, or once and read from a cache.

Both ways give the same batches in the same order; the cache holds half precision, so its values agree with computed
ones to a relative 2^-11.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datasets.cache import Extract, FeatureStore
from datasets.folder import Batch, ImageFolder


@dataclass(frozen=True, kw_only=True)
class FeatureBatch:
    """Pooled feature levels (B, c_l, H_l, W_l) of some images; `mask` (B, H, W) bool, the others as in `Batch`."""

    features: list[Tensor]
    mask: Tensor
    label: Tensor
    class_index: Tensor
    path: tuple[str, ...]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors in it."""
        for entry in fields(self):
            value = getattr(self, entry.name)
            yield from (v for v in (value if entry.name == "features" else [value]) if isinstance(v, Tensor))


class LiveFeatures:
    """Runs the extractor on each batch of the loader."""

    def __init__(self, loader: DataLoader, extract: Extract, device: torch.device) -> None:
        self.loader, self.extract, self.device = loader, extract, device

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.loader)

    def epoch(self, number: int, skipped: int = 0) -> Iterator[FeatureBatch]:
        """One pass; a shuffled loader's order depends on its seed and on `number` alone. It can leave out its first
        `skipped` batches without reading them."""
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(number, skipped * (self.loader.batch_size or 1))
        return prefetched(map(self._features, iter(self.loader)), self.device)

    def _features(self, batch: Batch) -> FeatureBatch:
        batch = batch.to(self.device, non_blocking=True)
        return FeatureBatch(
            features=self.extract(batch.image), mask=batch.mask, label=batch.label,
            class_index=batch.class_index, path=batch.path,
        )  # fmt: skip


class CachedFeatures:
    """Reads the batches of the loader's batch sampler from a store."""

    def __init__(self, loader: DataLoader, store: FeatureStore, device: torch.device) -> None:
        self.loader, self.store, self.device = loader, store, device
        self.dataset: ImageFolder = loader.dataset  # type: ignore[assignment]

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self.loader)

    def epoch(self, number: int, skipped: int = 0) -> Iterator[FeatureBatch]:
        """One pass; a shuffled loader's order depends on its seed and on `number` alone. It can leave out its first
        `skipped` batches without reading them."""
        if hasattr(self.loader.sampler, "set_epoch"):
            self.loader.sampler.set_epoch(number, skipped * (self.loader.batch_size or 1))  # type: ignore[union-attr]
        return prefetched(map(self.read, self.loader.batch_sampler), self.device)  # type: ignore[arg-type]

    def read(self, indices: Sequence[int]) -> FeatureBatch:
        """The images of these numbers, features in float32, channels-last."""
        items = [self.dataset.items[i] for i in indices]
        side, rows = self.dataset.mask_size, torch.tensor(indices)
        masks = np.unpackbits(self.store.masks[rows].numpy(), axis=1, count=side * side).reshape(-1, side, side)
        return FeatureBatch(
            features=[self._send(level[rows.to(level.device)]).float().permute(0, 3, 1, 2) for level in self.levels],
            mask=self._send(torch.from_numpy(masks.astype(bool))),
            label=self._send(torch.tensor([item.label for item in items])),
            class_index=self._send(torch.tensor([item.class_index for item in items])),
            path=tuple(str(item.path) for item in items),
        )

    @property
    def levels(self) -> tuple[Tensor, ...]:
        return self.store.levels

    def _send(self, value: Tensor) -> Tensor:
        """To the device; to CUDA through pinned memory, so that the copy does not stop the program."""
        if self.device.type == "cuda" and value.device.type == "cpu":
            value = value.pin_memory()
        return value.to(self.device, non_blocking=True)


def prefetched(batches: Iterator[FeatureBatch], device: torch.device) -> Iterator[FeatureBatch]:
    """On CUDA the next batch is read and copied on a stream of its own while the current one is worked on.

    What the main stream was told before must be done by then: it may have filled the store, or loaded the extractor.
    """
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)

    def following() -> FeatureBatch | None:
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            return next(batches, None)

    coming = following()
    while coming is not None:
        current, main = coming, torch.cuda.current_stream(device)
        main.wait_stream(side)
        for tensor in current.tensors():
            if tensor.device.type == "cuda":
                tensor.record_stream(main)
        coming = following()
        yield current
