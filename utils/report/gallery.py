"""Which images a report shows, and their pictures on a scale that comes from normal images.

Knows neither models nor data sets: `Look` shows images by their numbers, with what a model says of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.metrics import NAN
from utils.report.plots import heat_overlay

NORMAL_IMAGES = 32  # per class
PER_KIND = 3  # pictures per class of false alarms, of misses and of finds
KINDS = ("alarms", "misses", "finds")
QUANTILE = 0.99  # of the image scores of normal training images: the label-free threshold
PIXEL_QUANTILE = 0.999  # of the pixel scores of normal training images: 1 on the scale of the heat maps
HOT = 2.5  # value of the hottest colour; colour begins at 1
SIDE = 320  # of a picture, in pixels
BYTES = 6_500_000  # of all pictures of a report; base64 makes 8.7 MB of them
SAMPLED = 128  # a map's pixels that are looked at, per side
MOST_OUTLINES = 100  # of one mask, the largest ones
CHUNK = 16  # images looked at together


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """One test image: its file, class, label, image score, concept (None without codebooks), and what was decided:
    p-value, threshold and verdict (None without thresholds); `hit`: the shown map's peak lies in the mask, None without
    a mask."""

    path: str
    class_name: str
    label: int
    score: float
    concept: int | None
    p_value: float | None = None
    threshold: float | None = None
    defective: bool | None = None
    hit: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Views:
    """Some images: RGB `images` (N, S, S, 3) uint8, `masks` (N, M, M) bool, image `scores` (N,) float, and two score
    maps (N, M, M): `heat`, which heat maps show, by which images can be compared, and `pixel`, of the pixel metrics."""

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    heat: NDArray
    pixel: NDArray
    scores: NDArray


Look = Callable[[Sequence[int]], Views]  # numbers of images in a data set


@dataclass(frozen=True, kw_only=True)
class NormalRange:
    """What is normal in a class, from `count` of its training images: `low` and `high`, the median and the
    `PIXEL_QUANTILE` of the pixel scores, and `threshold`, the `QUANTILE` of the image scores."""

    low: float
    high: float
    threshold: float
    count: int

    def scaled(self, maps: NDArray) -> NDArray:
        """Pixel scores on the scale that all classes share: 0 is `low`, 1 is `high`."""
        return (maps - self.low) / max(self.high - self.low, 1e-12)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An image and its heat map as JPEG files, and the outlines of its mask as an SVG path in a square of side
    `side`; the path is empty without defect or mask."""

    name: str
    score: float
    image: bytes
    heat: bytes
    outline: str
    side: int


def chunks(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), CHUNK):
        yield numbers[start : start + CHUNK]


def spread(numbers: Sequence[int], most: int) -> list[int]:
    """At most `most` of the numbers, evenly spaced and always the same."""
    count = min(len(numbers), most)
    return [numbers[i * len(numbers) // count] for i in range(count)]


def normal_range(look: Look, numbers: Sequence[int]) -> NormalRange:
    """Look at (a subset of) a class's normal training images."""
    chosen = spread(numbers, NORMAL_IMAGES)
    pixels, scores = [], []
    for chunk in chunks(chosen):
        views = look(chunk)
        step = max(1, views.heat.shape[1] // SAMPLED)
        pixels.append(views.heat[:, ::step, ::step].flatten())
        scores.append(views.scores)
    low, high = np.quantile(np.concatenate(pixels), (0.5, PIXEL_QUANTILE))
    threshold = float(np.quantile(np.concatenate(scores), QUANTILE))
    return NormalRange(low=float(low), high=float(high), threshold=threshold, count=len(chosen))


def pick(labels: Sequence[int], scores: Sequence[float]) -> dict[str, list[int]]:
    """Places of the worst false alarms (good, highest score first), the worst misses (defective, lowest first) and the
    best finds (defective, highest first); no image is both a miss and a find."""
    order = np.argsort(scores, kind="stable").tolist()
    good, bad = [i for i in order if not labels[i]], [i for i in order if labels[i]]
    misses = bad[: min(PER_KIND, len(bad) // 2)]
    finds = bad[len(misses) :][::-1][:PER_KIND]
    return {"alarms": good[::-1][:PER_KIND], "misses": misses, "finds": finds}


def f1_threshold(good: Sequence[float], bad: Sequence[float]) -> float:
    """The image score from which on F1 is highest if images count as defective; NaN without good or bad ones."""
    if not len(good) or not len(bad):
        return NAN
    candidates = np.unique([*good, *bad])
    found, alarms = (len(v) - np.searchsorted(np.sort(v), candidates) for v in (bad, good))
    return float(candidates[(2 * found / (found + alarms + len(bad))).argmax()])


def take_pictures(look: Look, images: Mapping[int, ImageResult], normal: NormalRange, share: int) -> list[Picture]:
    """Pictures of images by their numbers in the data set; `share` is the number of classes that share `BYTES`."""
    most = BYTES // (share * len(KINDS) * PER_KIND * 2)
    pictures: list[Picture] = []
    for chunk in chunks(list(images)):
        views = look(chunk)
        levels = (normal.scaled(views.heat) - 1) / (HOT - 1)
        for number, image, mask, level in zip(chunk, views.images, views.masks, levels, strict=True):
            pictures.append(Picture(
                name="/".join(Path(images[number].path).parts[-2:]), score=images[number].score, side=len(mask),
                image=jpeg(image, most), heat=jpeg(heat_overlay(image, level), most), outline=outline(mask),
            ))  # fmt: skip
    return pictures


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
