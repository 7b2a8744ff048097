"""What a detector says of test images, in the size in which it is compared: that of squares, or the images' own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets.features import FeatureBatch
from datasets.folder import ImageFolder
from datasets.geometry import Stitch
from default import EvalConfig
from models.detector import Detector
from models.scorer import image_scores
from utils.run.distributed import processes, rank

Maps = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is said of the images of a `batch`: image `scores` (B,), concepts (B,), and the maps (B, H, W) that are
    wanted, by their scores' names. The batch's masks have the maps' size."""

    batch: FeatureBatch
    scores: Tensor
    concept: Tensor | None
    maps: Maps


def judged(detector: Detector, batches: Iterable[FeatureBatch], config: EvalConfig) -> Iterator[Judged]:
    """Batch by batch."""
    wanted = {config.pixel_score, config.pro_score, config.shown_score}
    for batch in batches:
        judgement = detector.judge(batch.features)
        scores = image_scores(getattr(judgement.maps, config.image_score), config.top_k)
        maps = {name: getattr(judgement.maps, name) for name in sorted(wanted)}
        yield Judged(batch=batch, scores=scores, concept=judgement.output.concept, maps=maps)


def stitched(
    detector: Detector, batches: Iterable[FeatureBatch], config: EvalConfig, test: ImageFolder
) -> Iterator[Judged]:
    """Image by image from batches of this process's tiles (see `Stage.test_features`), with maps and masks of the
    image's own size, or of --eval-size; the score is that of the tile with the highest one."""
    rows = ((found, row) for found in judged(detector, batches, config) for row in range(len(found.scores)))
    tiles = ((number, box) for number in range(rank(), len(test), processes()) for box in test.boxes(number))
    target = (config.eval_size, config.eval_size) if isinstance(config.eval_size, int) else None
    for number, group in groupby(zip(rows, tiles, strict=True), key=lambda entry: entry[1][0]):
        parts: dict[str, Stitch] = {}
        best: Judged | None = None
        for (found, row), (_, box) in group:
            one = single(found, row)
            for name, heat in one.maps.items():
                part = parts.setdefault(name, Stitch(test.place(number).size, test.geometry.overlap, target))
                part.add(array(heat[0]), box)
            best = one if best is None or one.scores > best.scores else best
        assert best is not None
        yield with_maps(best, test.marks(number, target), {name: part.map for name, part in parts.items()})


def single(found: Judged, row: int) -> Judged:
    """An image of a batch by itself, without its features."""
    one, batch = slice(row, row + 1), found.batch
    return Judged(
        batch=replace(
            batch, features=[], mask=batch.mask[one], label=batch.label[one], class_index=batch.class_index[one],
            path=batch.path[one],
        ),
        scores=found.scores[one], concept=None if found.concept is None else found.concept[one],
        maps={name: heat[one] for name, heat in found.maps.items()},
    )  # fmt: skip


def measured(found: Judged, test: ImageFolder | None, first: int, config: EvalConfig) -> Iterator[Judged]:
    """The same with masks and maps of the size in which metrics are made, without what is padded: one by one where
    images have different sizes. `first` is the number of the batch's first image in `test`."""
    if test is None or test.geometry.tile is not None or not (config.eval_size == "native" or test.geometry.pads):
        yield found
        return
    for row in range(len(found.scores)):
        one, place = single(found, row), test.place(first + row)
        if config.eval_size == "native":
            seen = place.seen(place.size)
            mask, maps = test.marks(first + row), {n: place.drawn(array(v[0]))[seen] for n, v in one.maps.items()}
        else:
            mask, maps = place.part(array(one.batch.mask[0])), {n: place.part(array(v[0])) for n, v in one.maps.items()}
        yield with_maps(one, mask, maps)


def of_image(heat: Tensor, test: ImageFolder | None, number: int) -> Tensor:
    """A map (H, W) of the whole of an image of `test`, of any size."""
    if test is None or test.geometry.whole or test.geometry.tile is not None:
        return heat
    return torch.from_numpy(test.place(number).drawn(array(heat)))


def array(values: Tensor) -> NDArray:
    """In memory; floating point in single precision."""
    return (values.float() if values.is_floating_point() else values).cpu().numpy()


def with_maps(one: Judged, mask: NDArray[np.bool_], maps: Mapping[str, NDArray]) -> Judged:
    """An image with another mask and other maps, each (H, W)."""
    marks, *others = (
        torch.from_numpy(np.ascontiguousarray(values))[None].to(one.scores.device) for values in (mask, *maps.values())
    )
    return replace(one, batch=replace(one.batch, mask=marks), maps=dict(zip(maps, others, strict=True)))
