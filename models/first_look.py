"""What a model learns before its first step: channel statistics, the start of our codebooks, memory and context."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from models.context import Context, Moments, concept_of
from models.detector import Detector
from models.memory import Choice, Remembering
from models.vqflow import ChannelStatistics, VQFlow

SEED_IMAGES = 512  # images in which the codes are placed at the start


@torch.no_grad()
def first_look(
    detector: Detector, passes: Callable[[], Iterable[Sequence[Tensor]]], *, images: int, batch_size: int
) -> None:
    """One of `passes` over kept features of all `images` training images, and another one for a context.

    Codes are placed in the embeddings of up to `SEED_IMAGES` random images, in batches of about `batch_size`.
    """
    flow, memory, context = detector.flow, detector.scorer.memory, detector.scorer.context
    seeded = flow.config.codebooks == "seeded" and (flow.config.quantize_enable or flow.config.semantics == "pooled")
    remembering = Remembering(memory, images=images, size=flow.config.memory) if memory is not None else None
    if not (flow.config.standardize or seeded or remembering or context):
        return
    statistics, choice, chosen = ChannelStatistics(len(flow.channels)), Choice(images=images, size=SEED_IMAGES), []
    for kept in passes():
        pooled = flow.pool(kept)
        statistics.add(pooled)
        if seeded or context is not None:
            rows = choice.rows(pooled[0])
            chosen += [[h[row] for h in pooled] for row in rows]
        if remembering is not None:
            remembering.add(kept)
    if flow.config.standardize:
        flow.set_statistics(statistics)
    order = [chosen[i] for i in torch.randperm(len(chosen)).tolist()]
    samples = [flow.standardize(part) for part in stacked(order, batch_size)]
    if seeded:
        flow.train()
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


def stacked(rows: list[list[Tensor]], size: int) -> Iterator[list[Tensor]]:
    """Images' levels as batches of at most `size`, as equal as can be."""
    count = -(-len(rows) // size)
    for number in range(count):
        part = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        yield [torch.stack(level) for level in zip(*part, strict=True)]
