"""What a model learns before its first step: channel statistics, the start of our codebooks, memory and context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from models.context import Context, Moments, concept_of
from models.detector import Detector
from models.memory import Choice, Remembering
from models.vqflow import ChannelStatistics, VQFlow
from utils.run.distributed import alone, shared, summed

SEED_IMAGES = 512  # images in which the codes are placed at the start
Again = Callable[[Sequence[int]], Iterable[Sequence[Tensor]]]


@torch.no_grad()
def first_look(
    detector: Detector,
    passes: Callable[[], Iterable[Sequence[Tensor]]],
    *,
    images: int,
    batch_size: int,
    again: Again | None = None,
) -> None:
    """One of `passes` over kept features of all `images` training images, and another one for a context.

    Codes are placed in the embeddings of up to `SEED_IMAGES` random images, in batches of about `batch_size`.

    Of several processes each passes its share, and their sums are added up. What is kept of single images they do not
    send each other: there are few of them, and each process looks at them `again` by their numbers.
    """
    flow, memory, context = detector.flow, detector.scorer.memory, detector.scorer.context
    seeded = flow.config.codebooks == "seeded" and (flow.config.quantize_enable or flow.config.semantics == "pooled")
    remembering = Remembering(memory, images=images, size=flow.config.memory) if memory is not None else None
    sample = Sample(flow, images) if seeded or context is not None else None
    keepers = [keeper for keeper in (sample, remembering) if keeper is not None]
    if not (flow.config.standardize or keepers):
        return
    statistics = ChannelStatistics(len(flow.channels))
    for kept in passes():
        statistics.add(flow.pool(kept))
        for keeper in () if shared() else keepers:
            keeper.add(kept)
    if flow.config.standardize:
        flow.set_statistics(of_all(statistics, flow.statistics()[0]) if shared() else statistics)
    if shared():
        assert again is not None
        for keeper in keepers:
            for kept in again(only_chosen(keeper.choice)):
                keeper.add(kept)
    if sample is not None:
        start(detector, list(sample.batches(batch_size)), seeded)
    if remembering is not None:
        remembering.finish(*flow.statistics())
    if context is not None:
        fit_context(context, flow, passes())


class Sample:
    """Features of up to `SEED_IMAGES` of `images` images, as the flow pools them."""

    def __init__(self, flow: VQFlow, images: int) -> None:
        self.flow, self.choice = flow, Choice(images=images, size=SEED_IMAGES)
        self.rows: list[list[Tensor]] = []

    def add(self, kept: Sequence[Tensor]) -> None:
        """The next images."""
        rows = self.choice.rows(kept[0])
        if len(rows):
            self.rows += map(list, zip(*self.flow.pool([h[rows] for h in kept]), strict=True))

    def batches(self, size: int) -> Iterator[list[Tensor]]:
        """Standardized ones, of at most `size` images, in random order."""
        order = [self.rows[i] for i in torch.randperm(len(self.rows)).tolist()]
        return (self.flow.standardize(part) for part in stacked(order, size))


def start(detector: Detector, samples: Sequence[Sequence[Tensor]], seeded: bool) -> None:
    """Codes, if they are `seeded`, and a context's principal directions, where the samples are."""
    if seeded:
        detector.flow.train()
        with alone():  # the same in all processes
            detector.flow.hierarchy.seed(samples)
    if detector.scorer.context is not None:
        for level, parts in zip(detector.scorer.context.surrounded, zip(*samples, strict=True), strict=True):
            level.set_basis(torch.cat(parts))


@torch.no_grad()
def fit_context(context: Context, flow: VQFlow, batches: Iterable[Sequence[Tensor]]) -> None:
    """Fit a context to kept features of training images, whose concepts are known by now."""
    moments = [Moments(level) for level in context.surrounded]
    for kept in batches:
        features = flow.standardize(kept)
        concept = concept_of(flow.hierarchy.concept_index(features[-1]), features[-1])
        for level, h in zip(moments, features, strict=True):
            level.add(h, concept)
    for level in moments:
        level.fit()


def of_all(statistics: ChannelStatistics, channels: Sequence[Tensor]) -> ChannelStatistics:
    """With the sums of all processes; one that has seen no image has zeros (c_l,), of the shapes of `channels`."""
    counts = torch.tensor(statistics.count, dtype=torch.float64, device=channels[0].device)
    statistics.count = [int(count) for count in summed(counts).tolist()]
    zeros = [torch.zeros_like(level, dtype=torch.float64) for level in channels]
    statistics.total = [summed(zero + v) for zero, v in zip(zeros, statistics.total, strict=True)]
    statistics.squares = [summed(zero + v) for zero, v in zip(zeros, statistics.squares, strict=True)]
    return statistics


def only_chosen(choice: Choice) -> list[int]:
    """The numbers of the chosen images; the next ones that come are those alone."""
    numbers = choice.chosen.nonzero().flatten().tolist()
    choice.chosen = torch.ones(len(numbers), dtype=torch.bool)
    return numbers


def stacked(rows: list[list[Tensor]], size: int) -> Iterator[list[Tensor]]:
    """Images' levels as batches of at most `size`, as equal as can be."""
    count = -(-len(rows) // size)
    for number in range(count):
        part = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        yield [torch.stack(level) for level in zip(*part, strict=True)]
