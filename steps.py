"""Training steps: one gradient each, taken or dropped, and what a sub epoch of them comes to."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from datasets.features import FeatureBatch
from default import TrainConfig
from models.loss import loss_terms
from models.vqflow import VQFlow
from utils.run.device import autocast
from utils.run.distributed import averaged, joined, processes
from utils.run.schedule import learning_rate
from utils.run.text import printable

Model = VQFlow | DistributedDataParallel


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

    def add(self, files: Sequence[Sequence[str]], values: Sequence[float]) -> None:
        """A step that was taken: the `files` of each batch of its group, and `values` summed over these; all processes'
        batches are of the same size."""
        self.counted += len(files)
        self.images += processes() * sum(map(len, files))
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


def shared_by_all(flow: VQFlow) -> Model:
    """The flow as it is trained: of several processes each has a replica, whose gradients are averaged as they come.

    Buffers need no sending: what updates them, batch norms and codebooks, sees the batches of all processes.
    """
    if processes() == 1:
        return flow
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1x1 tensors, which have no order
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # before PyTorch 2.14
    options: dict[str, Any] = {name: False}
    return DistributedDataParallel(flow, gradient_as_bucket_view=True, **options)


class Ledger:
    """What became of each step, entered in a tally once it is known.

    On a device that computes by itself the host would stand still, and the device after it, if it asked at once; it
    asks `late` steps afterwards, when the answer has long been there.
    """

    def __init__(self, tally: Tally, late: int = 0) -> None:
        self.tally, self.late = tally, late
        self.open: deque[tuple[list[tuple[str, ...]], Callable[[], list[float]]]] = deque()

    @classmethod
    def of(cls, tally: Tally, optimizer: torch.optim.Optimizer) -> Ledger:
        """One step late where `take_step` need not wait: with a fused optimizer on CUDA."""
        kinds = {p.device.type for settings in optimizer.param_groups for p in settings["params"]}
        return cls(tally, late=int(kinds == {"cuda"} and bool(optimizer.defaults.get("fused"))))

    def enter(self, group: Sequence[FeatureBatch], values: Tensor) -> None:
        """A step was taken or dropped; `values` are what `take_step` gave."""
        self.tally.batches += len(group)
        self.open.append(([batch.path for batch in group], fetched(values)))

    def known(self, *, everything: bool = False) -> list[tuple[str, ...]]:
        """The files of each step that was dropped, nothing for others, of the steps that have become known since the
        last call. Only after `everything` the tally tells of all steps that the model has seen."""
        found = []
        while len(self.open) > (0 if everything else self.late):
            files, read = self.open.popleft()
            values = read()
            taken = all(map(math.isfinite, values))
            if taken:
                self.tally.add(files, values)
            found.append(() if taken else tuple(joined([name for names in files for name in names])))
        return found


def fetched(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy values to the host; the function waits for them and gives them."""
    if values.device.type != "cuda":
        return values.tolist
    here, done = torch.empty_like(values, device="cpu", pin_memory=True), torch.cuda.Event()
    here.copy_(values, non_blocking=True)
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return here.tolist()

    return read


def train_epoch(
    model: Model,
    batches: Iterable[FeatureBatch],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    start: float,
    step: float,
) -> EpochStats:
    """One sub epoch: see `training_steps`."""
    ledger = Ledger.of(Tally(), optimizer)
    for _ in training_steps(model, batches, optimizer, config, start=start, step=step, ledger=ledger):
        ledger.known()
    ledger.known(everything=True)
    return ledger.tally.stats(optimizer.param_groups[0]["lr"])


def training_steps(
    model: Model,
    batches: Iterable[FeatureBatch],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    start: float,
    step: float,
    ledger: Ledger,
) -> Iterator[None]:
    """Take a step with each --accumulate batches, and halt after it.

    Args:
        batches: those of a sub epoch that the tally of `ledger`, which is kept up, has not counted yet.
        start: share of the run that was done before the sub epoch.
        step: share that one batch adds.
    """
    model.train()
    began, tally = time.perf_counter(), ledger.tally
    for group in grouped(batches, config.accumulate):
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate(config, start + tally.batches * step)
        ledger.enter(group, take_step(model, group, optimizer, config, wait=not ledger.late))
        tally.seconds += time.perf_counter() - began
        yield
        began = time.perf_counter()


def take_step(
    model: Model, group: Sequence[FeatureBatch], optimizer: torch.optim.Optimizer, config: TrainConfig, *, wait: bool
) -> Tensor:
    """Learn from a group of batches: sums over them of loss, nll, commitment and gradient norm, (4,) on the device.

    If one of these is not finite nothing is learnt, codebooks and running statistics are as they were. Without `wait`
    the device decides that by itself, for which the optimizer must be a fused one.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    optimizer.zero_grad(set_to_none=True)
    rows = []
    for batch in group:
        with contextlib.nullcontext() if batch is group[-1] else unsent(model):
            rows.append(backward(model, batch, config, len(group)))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
    values = averaged(torch.cat([torch.stack(rows).sum(0), norm.detach().double()[None] * len(group)]))
    finite = values.isfinite().all()
    if not wait:
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # as PyTorch's scaler of gradients does
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif finite:
        optimizer.step()
        return values
    for buffer, before in buffers:
        buffer.copy_(torch.where(finite, buffer, before))
    return values


def unsent(model: Model) -> contextlib.AbstractContextManager:
    """Gradients are added up, but not yet sent to other processes."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()


def backward(model: Model, batch: FeatureBatch, config: TrainConfig, share: int) -> Tensor:
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
