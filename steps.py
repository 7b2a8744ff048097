"""Training steps: one gradient each, taken or dropped, and what a sub epoch of them comes to."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from datasets.features import FeatureBatch
from default import TrainConfig
from models.loss import loss_terms
from models.vqflow import VQFlow
from utils.run.device import autocast
from utils.run.schedule import learning_rate
from utils.run.text import printable


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """Means over a sub epoch: `loss` and `nll` in nats per image (with noise, and batch statistics in the norms),
    `commitment`, `grad_norm` before clipping, NaN if every step was dropped; the last learning rate `lr`; `images` and
    `seconds`."""

    loss: float
    nll: float
    commitment: float
    grad_norm: float
    lr: float
    images: int
    seconds: float


@dataclass(kw_only=True)
class Tally:
    """What the steps of a sub epoch have come to so far: `batches` that were passed, of which `counted` were learnt
    from, `images` in these, `sums` over them of loss, nll, commitment and gradient norm, and `seconds`."""

    batches: int = 0
    counted: int = 0
    images: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 4)
    seconds: float = 0.0

    def add(self, group: Sequence[FeatureBatch], values: Sequence[float]) -> None:
        """A step that was taken, its `values` summed over the batches of its group."""
        self.counted += len(group)
        self.images += sum(len(batch.path) for batch in group)
        self.sums = [a + b for a, b in zip(self.sums, values, strict=True)]

    def stats(self, lr: float) -> EpochStats:
        loss, nll, commitment, norm = (s / self.counted if self.counted else math.nan for s in self.sums)
        return EpochStats(
            loss=loss, nll=nll, commitment=commitment, grad_norm=norm, lr=lr, images=self.images, seconds=self.seconds
        )


@dataclass(kw_only=True)
class Place:
    """How far a meta epoch is: `sub` epochs of it are finished, `tally` tells of the next one; `closing` when all are
    and codes are reassigned. `dropped` holds the files of each step that was left out, `streak` of them in a row."""

    sub: int = 0
    tally: Tally = field(default_factory=Tally)
    closing: bool = False
    dropped: list[list[str]] = field(default_factory=list)
    streak: int = 0

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Place:
        """The inverse of `asdict`."""
        return cls(**{**plain, "tally": Tally(**plain["tally"])})

    def note(self, files: Sequence[str]) -> None:
        """A step was taken, or dropped with these files."""
        self.streak = self.streak + 1 if files else 0
        if files:
            self.dropped.append([printable(name) for name in files])


def train_epoch(
    model: VQFlow,
    batches: Iterable[FeatureBatch],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    start: float,
    step: float,
) -> EpochStats:
    """One sub epoch: see `training_steps`."""
    tally = Tally()
    for _ in training_steps(model, batches, optimizer, config, start=start, step=step, tally=tally):
        pass
    return tally.stats(optimizer.param_groups[0]["lr"])


def training_steps(
    model: VQFlow,
    batches: Iterable[FeatureBatch],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    start: float,
    step: float,
    tally: Tally,
) -> Iterator[tuple[str, ...]]:
    """Take a step with each --accumulate batches; gives the files of those that it dropped, nothing for others.

    Args:
        batches: those of a sub epoch that `tally`, which is kept up, has not counted yet.
        start: share of the run that was done before the sub epoch.
        step: share that one batch adds.
    """
    model.train()
    began = time.perf_counter()
    for group in grouped(batches, config.accumulate):
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate(config, start + tally.batches * step)
        values = take_step(model, group, optimizer, config)
        tally.batches += len(group)
        if values is not None:
            tally.add(group, values)
        tally.seconds += time.perf_counter() - began
        yield () if values is not None else tuple(path for batch in group for path in batch.path)
        began = time.perf_counter()


def take_step(
    model: VQFlow, group: Sequence[FeatureBatch], optimizer: torch.optim.Optimizer, config: TrainConfig
) -> list[float] | None:
    """Learn from a group of batches: sums over them of loss, nll, commitment and gradient norm.

    If one of these is not finite nothing is learnt, codebooks and running statistics are as they were, and None is
    given.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    optimizer.zero_grad(set_to_none=True)
    rows = [backward(model, batch, config, len(group)) for batch in group]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    values = torch.cat([torch.stack(rows).sum(0), norm.detach().double()[None] * len(group)]).tolist()
    if not all(map(math.isfinite, values)):
        for buffer, before in buffers:
            buffer.copy_(before)
        return None
    optimizer.step()
    return values


def backward(model: VQFlow, batch: FeatureBatch, config: TrainConfig, share: int) -> Tensor:
    """Add a batch's gradients, divided by `share`; its loss, nll and commitment (3,)."""
    with autocast(batch.label.device, config.amp_enable):
        output = model(batch.features, noise=config.noise)
        terms = loss_terms(output, config.quantize_weight)
    (terms.total / share).backward()
    return torch.stack([terms.total, terms.nll, terms.commitment]).detach().double()


def grouped(batches: Iterable[FeatureBatch], size: int) -> Iterator[list[FeatureBatch]]:
    """`size` batches at a time; the last group may be smaller."""
    running = iter(batches)
    while group := list(islice(running, size)):
        yield group
