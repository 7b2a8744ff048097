"""What is said of an image at its own size: score and verdict, map and mask, peak and regions."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from engine import Answer


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The highest place of a map: column `x` and row `y` in pixels of the image, from 0, and its `value`."""

    x: int
    y: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Region:
    """A connected part of a mask: the box from column `x` and row `y` on, in pixels, and its highest place."""

    x: int
    y: int
    width: int
    height: int
    peak: Peak


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is said of an image of H x W pixels.

    Attributes:
        score: image score, higher where it is less normal.
        p_value: share of normal images that score as high or higher, in (0, 1].
        threshold: of the score.
        defective: the score is above it.
        map: (H, W) float32, the score of each place.
        pixel_threshold: of the map.
        mask: (H, W) bool, where the map is above it.
        peak: the map's highest place.
        regions: connected parts of the mask, the highest first.
        concept: number of the concept that the image has, None without codebooks.
        class_name: of a run with a model for each class, the one whose model has answered, else None.

    A model without thresholds gives None for `p_value`, `threshold`, `defective`, `pixel_threshold` and `mask`.
    """

    score: float
    p_value: float | None
    threshold: float | None
    defective: bool | None
    map: NDArray[np.float32]
    pixel_threshold: float | None
    mask: NDArray[np.bool_] | None
    peak: Peak
    regions: tuple[Region, ...]
    concept: int | None
    class_name: str | None


def prediction(answer: Answer, class_name: str | None) -> Prediction:
    """What a model answers, with a map of the image's size."""
    drawn = answer.map
    y, x = divmod(int(drawn.argmax()), drawn.shape[1])
    mask = None if answer.pixel_threshold is None else drawn > answer.pixel_threshold
    return Prediction(
        score=answer.score, p_value=answer.p_value, threshold=answer.threshold, defective=answer.defective,
        map=drawn, pixel_threshold=answer.pixel_threshold, mask=mask, peak=Peak(x=x, y=y, value=float(drawn[y, x])),
        regions=() if mask is None else regions_of(drawn, mask), concept=answer.concept, class_name=class_name,
    )  # fmt: skip


def normality(answer: Answer) -> tuple[float, float]:
    """Higher where a model finds an image more normal: by its p-value, then by how far the score is below the
    threshold, as a share of it."""
    assert answer.p_value is not None and answer.threshold is not None
    return answer.p_value, (answer.threshold - answer.score) / max(abs(answer.threshold), 1e-12)


def regions_of(values: NDArray, mask: NDArray[np.bool_]) -> tuple[Region, ...]:
    """The 8-connected parts of a mask (H, W), the one with the highest of `values` (H, W) first."""
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    places = ndimage.maximum_position(values, labels, range(1, count)) if count > 1 else []
    found = [
        Region(x=x, y=y, width=w, height=h, peak=Peak(x=int(px), y=int(py), value=float(values[py, px])))
        for (x, y, w, h), (py, px) in zip(boxes[1:, :4].tolist(), places, strict=True)
    ]
    return tuple(sorted(found, key=lambda region: -region.peak.value))
