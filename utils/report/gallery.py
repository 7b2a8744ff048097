"""The pictures of a report, on a scale that comes from normal images.

Knows neither models nor data sets: `Look` says what a model finds in normal images, `Show` shows test images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.metrics import NAN
from utils.report.images import PER_KIND, ImageResult, NormalRange
from utils.report.plots import heat_overlay, triptych

NORMAL_IMAGES = 32  # per class
KINDS = ("alarms", "misses", "finds", "astray")
QUANTILE = 0.99  # of the image scores of normal images: the label-free threshold
PIXEL_QUANTILE = 0.999  # of the pixels of normal images: 1 on the scale of the heat maps
SIDE = 320  # of a picture, in pixels
BYTES = 5_200_000  # of all pictures of a report; base64 makes 7 MB of them
LEVELS, STEP = 64, 0.02  # side of the map that tells values under the pointer, and what a step of its bytes is worth
SAMPLED = 128  # a map's pixels that are looked at, per side
MOST_OUTLINES = 100  # of one mask, the largest ones
CHUNK = 16  # images looked at together


@dataclass(frozen=True, kw_only=True)
class Views:
    """Of some images: the shown score maps `heat` (N, M, M), and the image `scores` (N,)."""

    heat: NDArray
    scores: NDArray


@dataclass(frozen=True, kw_only=True)
class Shot:
    """An `image` (S, S, 3) uint8, RGB, its `mask` (M, M) bool, and the shown score map `heat` (M, M)."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    heat: NDArray


Look = Callable[[Sequence[int]], Views]  # numbers of images in a data set
Show = Callable[[int], Shot]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and its heat map as JPEG files, and the outlines of its mask as an SVG path in a square of side
    `side`; the path is empty without defect or mask. `levels`: the map's bytes, row by row, in units of `STEP`."""

    name: str
    result: ImageResult
    image: bytes
    heat: bytes
    outline: str
    side: int
    levels: bytes


def chunks(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), CHUNK):
        yield numbers[start : start + CHUNK]


def spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most `most` of the numbers, evenly spaced and always the same."""
    count = min(len(numbers), most)
    return [numbers[i * len(numbers) // count] for i in range(count)]


def normal_range(look: Look, numbers: Sequence[int], most: int) -> NormalRange:
    """Look at `most` of a class's normal images: the median and the `PIXEL_QUANTILE` of their pixels, and the
    `QUANTILE` of their image scores."""
    chosen = spread(numbers, most)
    pixels, scores = [], []
    for chunk in chunks(chosen):
        views = look(chunk)
        step = max(1, views.heat.shape[1] // SAMPLED)
        pixels.append(views.heat[:, ::step, ::step].flatten())
        scores.append(views.scores)
    low, high = np.quantile(np.concatenate(pixels), (0.5, PIXEL_QUANTILE))
    threshold = float(np.quantile(np.concatenate(scores), QUANTILE))
    return NormalRange(low=float(low), high=float(high), threshold=threshold, count=len(chosen))


def f1_threshold(good: Sequence[float], bad: Sequence[float]) -> float:
    """The image score from which on F1 is highest if images count as defective; NaN without good or bad ones."""
    if not len(good) or not len(bad):
        return NAN
    candidates = np.unique([*good, *bad])
    found, alarms = (len(v) - np.searchsorted(np.sort(v), candidates) for v in (bad, good))
    return float(candidates[(2 * found / (found + alarms + len(bad))).argmax()])


def take_pictures(show: Show, images: Mapping[int, ImageResult], normal: NormalRange, share: int) -> list[Picture]:
    """Pictures of images by their numbers in the data set; `share` is the number of classes that share `BYTES`."""
    most = BYTES // (share * len(KINDS) * PER_KIND * 2)
    pictures: list[Picture] = []
    for number, result in images.items():
        shot = show(number)
        scaled = normal.scaled(shot.heat, result.high)
        pictures.append(Picture(
            name="/".join(Path(result.path).parts[-2:]), result=result, side=len(shot.mask),
            image=jpeg(shot.image, most), heat=jpeg(heat_overlay(shot.image, scaled), most),
            outline=outline(shot.mask), levels=levels(scaled),
        ))  # fmt: skip
    return pictures


def drawn(shot: Shot, result: ImageResult, normal: NormalRange) -> NDArray[np.uint8]:
    """The picture that goes into `pictures/`."""
    scaled = normal.scaled(shot.heat, result.high)
    return triptych(
        shot.image, scaled, shot.mask, peak=result.peak, caption=result.verdict(), alarm=bool(result.defective)
    )


def levels(scaled: NDArray) -> bytes:
    """A map (M, M) on the heat maps' scale as `LEVELS` rows of bytes (M if that is less): the highest value of each
    cell in units of `STEP`, 0 to 255 of them."""
    side = min(len(scaled), LEVELS)
    edges = np.arange(side) * len(scaled) // side
    highest = np.maximum.reduceat(np.maximum.reduceat(scaled, edges, 0), edges, 1)
    return (highest / STEP).round().clip(0, 255).astype(np.uint8).tobytes()


def jpeg(picture: NDArray[np.uint8], most: int) -> bytes:
    """RGB (S, S, 3) as a JPEG file of at most `most` bytes if there is a quality and a size that gives it."""
    bgr = cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    data = b""
    for side, quality in ((SIDE, 85), (SIDE, 70), (SIDE, 50), (SIDE // 2, 60), (SIDE // 4, 50), (SIDE // 8, 40)):
        side = min(side, len(bgr))
        small = cv2.resize(bgr, (side, side), interpolation=cv2.INTER_AREA) if side < len(bgr) else bgr
        data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
        if len(data) <= most:
            break
    return data


def outline(mask: NDArray[np.bool_]) -> str:
    """The outlines of a mask (S, S) as an SVG path, exact to half a pixel of a picture of 320."""
    found, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    found = sorted(found, key=cv2.contourArea, reverse=True)[:MOST_OUTLINES]
    lines = [cv2.approxPolyDP(c, len(mask) / SIDE / 2, closed=True)[:, 0] for c in found]
    return "".join("M" + " ".join(f"{x + 0.5:g},{y + 0.5:g}" for x, y in line) + "Z" for line in lines)
