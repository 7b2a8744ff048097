"""Batches of images: shuffled by seed and epoch alone, read by worker processes if wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from datasets.folder import ImageFolder, Sample, collate
from default import UsageError
from utils.run.distributed import processes, rank
from utils.run.stop import end_with_parent, quietly_started


class EpochSampler(Sampler[int]):
    """A permutation that depends on `seed` and the epoch set by `set_epoch`, not on what was drawn before; without its
    first `skipped` numbers.

    Of several processes the first one gets the first `size` numbers of each batch, and so on: as many each.
    """

    def __init__(self, count: int, seed: int, size: int = 1) -> None:
        self.seed, self.size, self.epoch, self.skipped = seed, size, 0, 0
        self.count, self.batches = count, count // (size * processes())

    def set_epoch(self, epoch: int, skipped: int = 0) -> None:
        self.epoch, self.skipped = epoch, skipped

    def __len__(self) -> int:
        return self.batches * self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.count, generator=generator)[: len(self) * processes()]
        own = order.view(self.batches, processes(), self.size)[:, rank()].flatten()
        yield from own[self.skipped :].tolist()


class Guarded(torch.utils.data.Dataset):
    """Hands the user's errors through worker processes as values, which `collate_guarded` raises in the main one."""

    def __init__(self, dataset: ImageFolder) -> None:
        self.dataset, self.items = dataset, dataset.items
        self.input_size, self.mask_size = dataset.input_size, dataset.mask_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample | str:
        try:
            return self.dataset[index]
        except UsageError as error:
            return str(error)


def collate_guarded(samples: list[Any]) -> Any:
    """A batch, or the first error's text."""
    errors = [s for s in samples if isinstance(s, str)]
    return errors[0] if errors else collate(samples)


class ImageLoader(DataLoader):
    """A DataLoader whose unreadable images end in a `UsageError` that names the file, whatever process read them.

    Its worker processes stay from pass to pass, until `end_workers`; a later pass starts new ones.
    """

    def __iter__(self) -> Any:
        for batch in quietly_started(super().__iter__):
            if isinstance(batch, str):
                raise UsageError(batch)
            yield batch

    def end_workers(self) -> None:
        """End the worker processes, each of which holds a copy of the program's libraries."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]  # PyTorch has no public way
            self._iterator = None


def begin_worker(parent: int, _: int) -> None:
    """What a worker process does first; it is given its number."""
    end_with_parent(parent)


def resolve_workers(workers: int | None, device_type: str) -> int:
    """`workers`, or its default: none on the CPU (the cores compute), up to 8 with a GPU."""
    if workers is not None:
        return workers
    return 0 if device_type == "cpu" else min(8, os.cpu_count() or 1)


def _loader(dataset: ImageFolder, workers: int, pin_memory: bool, **options: Any) -> ImageLoader:
    return ImageLoader(
        Guarded(dataset),
        num_workers=workers,
        collate_fn=collate_guarded,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=partial(begin_worker, os.getpid()) if workers else None,
        generator=torch.Generator(),  # a loader draws a seed per pass: not from the stream of the model's choices
        **options,
    )


def train_loader(
    dataset: ImageFolder, *, batch_size: int, workers: int, seed: int, pin_memory: bool = False
) -> ImageLoader:
    """Shuffled batches, the last partial one dropped; of all images where a batch would hold more than there are.

    Of several processes each gets its part of every batch.
    """
    batch_size = min(batch_size, len(dataset)) // processes()
    sampler = EpochSampler(len(dataset), seed, batch_size)
    return _loader(dataset, workers, pin_memory, batch_size=batch_size, sampler=sampler, drop_last=True)


def ordered_loader(
    dataset: ImageFolder,
    *,
    batch_size: int,
    workers: int,
    numbers: Sequence[int] | None = None,
    pin_memory: bool = False,
) -> ImageLoader:
    """All images in order, or those of these numbers."""
    return _loader(dataset, workers, pin_memory, batch_size=batch_size, sampler=numbers)


def grouped_loader(dataset: ImageFolder, groups: Sequence[Sequence[int]], *, workers: int) -> ImageLoader:
    """The images of these numbers, batch by batch."""
    return _loader(dataset, workers, False, batch_sampler=groups)
