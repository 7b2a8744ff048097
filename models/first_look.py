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
    placed = seeded or context is not None
    remembering = Remembering(memory, images=images, size=flow.config.memory) if memory is not None else None
    if not (flow.config.standardize or placed or remembering):
        return
    statistics, choice, chosen = ChannelStatistics(len(flow.channels)), Choice(images=images, size=SEED_IMAGES), []
    for kept in passes():
        pooled = flow.pool(kept)
        statistics.add(pooled)
        if shared():
            continue
        if placed:
            rows = choice.rows(pooled[0])
            chosen += [[h[row] for h in pooled] for row in rows]
        if remembering is not None:
            remembering.add(kept)
    if flow.config.standardize:
        flow.set_statistics(of_all(statistics, flow.statistics()[0]) if shared() else statistics)
    if shared():
        assert again is not None
        if placed:
            chosen = [list(row) for kept in again(only_chosen(choice)) for row in zip(*flow.pool(kept), strict=True)]
        if remembering is not None:
            for kept in again(only_chosen(remembering.choice)):
                remembering.add(kept)
    order = [chosen[i] for i in torch.randperm(len(chosen)).tolist()]
    samples = [flow.standardize(part) for part in stacked(order, batch_size)]
    if seeded:
        flow.train()
        with alone():  # the same in all processes
            flow.hierarchy.seed(samples)
    if remembering is not None:
        remembering.finish(*flow.statistics())
    if context is not None:
        for level, parts in zip(context.surrounded, zip(*samples, strict=True), strict=True):
            level.set_basis(torch.cat(parts))
        fit_context(context, flow, passes())


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
