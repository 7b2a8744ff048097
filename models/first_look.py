"""What a model learns before its first step: channel statistics, the start of our codebooks, the memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from models.detector import Detector
from models.memory import Choice, Remembering
from models.vqflow import ChannelStatistics

SEED_IMAGES = 512  # images in which the codes are placed at the start


@torch.no_grad()
def first_look(detector: Detector, batches: Iterable[Sequence[Tensor]], *, images: int, batch_size: int) -> None:
    """One pass over kept features of all `images` training images.

    Codes are placed in the embeddings of up to `SEED_IMAGES` random images, in batches of about `batch_size`.
    """
    flow, memory = detector.flow, detector.scorer.memory
    seeded = flow.config.codebooks == "seeded" and flow.config.quantize_enable
    remembering = Remembering(memory, images=images, size=flow.config.memory) if memory is not None else None
    if not (flow.config.standardize or seeded or remembering):
        return
    statistics, choice, chosen = ChannelStatistics(len(flow.channels)), Choice(images=images, size=SEED_IMAGES), []
    for kept in batches:
        pooled = flow.pool(kept)
        statistics.add(pooled)
        if seeded:
            rows = choice.rows(pooled[0])
            chosen += [[h[row] for h in pooled] for row in rows]
        if remembering is not None:
            remembering.add(kept)
    if flow.config.standardize:
        flow.set_statistics(statistics)
    if seeded:
        flow.train()
        order = [chosen[i] for i in torch.randperm(len(chosen)).tolist()]
        flow.hierarchy.seed([flow.standardize(part) for part in stacked(order, batch_size)])
    if remembering is not None:
        remembering.finish(*flow.statistics())


def stacked(rows: list[list[Tensor]], size: int) -> Iterator[list[Tensor]]:
    """Images' levels as batches of at most `size`, as equal as can be."""
    count = -(-len(rows) // size)
    for number in range(count):
        part = rows[number * len(rows) // count : (number + 1) * len(rows) // count]
        yield [torch.stack(level) for level in zip(*part, strict=True)]
