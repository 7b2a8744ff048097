"""What an evaluation knows of single images, and which of their score maps it keeps for pictures and report."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from utils.metrics import ClassResult, Curve
from utils.metrics.decisions import Decided

PER_KIND = 3  # pictures per class of false alarms, of misses, and of finds with the peak in the defect and beside it
HALF_MAX = 65504.0  # of half precision


@dataclass(frozen=True, kw_only=True)
class ImageResult:
    """One test image.

    Attributes:
        path: its file.
        score: the image score.
        concept: None without codebooks.
        peak: the highest place of the shown map, x and y as shares of its width and height.
        peak_value: the map's value there.
        hit: whether the peak lies in the mask; None without a defect or without a mask of it.
        p_value: share of normal images that score as high; None without thresholds in the checkpoint.
        threshold: image scores above it are alarms; None where neither checkpoint nor `within` gave any.
        defective: the verdict.
        high: 1 on the scale of the heat maps, where colour begins.
    """

    path: str
    class_name: str
    label: int
    score: float
    concept: int | None
    peak: tuple[float, float]
    peak_value: float
    hit: bool | None
    p_value: float | None = None
    threshold: float | None = None
    defective: bool | None = None
    high: float | None = None

    @property
    def group(self) -> Hashable:
        """What an album tells apart: see `Album`."""
        return self.class_name, self.label, self.hit

    def within(self, normal: NormalRange) -> ImageResult:
        """With the limits of its class, unless it has the checkpoint's."""
        if self.threshold is not None:
            return self
        limit = normal.threshold
        return replace(self, threshold=limit, high=normal.high, defective=self.score > limit)

    def verdict(self) -> str:
        """For people, in ASCII."""
        place = {None: "", True: ", peak in the defect", False: ", peak beside the defect"}[self.hit]
        said = "alarm" if self.defective else "no alarm"
        return f"{said}: score {self.score:#.4g}, threshold {self.threshold:#.4g}{place}"


@dataclass(frozen=True, kw_only=True)
class NormalRange:
    """What is normal in a class, from `count` of its normal images: `low`, 0 on the scale of the heat maps, `high`, 1
    on it, and `threshold`, above which an image score is an alarm."""

    low: float
    high: float
    threshold: float
    count: int

    def scaled(self, maps: NDArray, high: float | None = None) -> NDArray:
        """Score maps on the scale that all classes share: 0 is `low`, 1 is the class's `high`, or the image's own."""
        top = self.high if high is None else high
        return (maps - self.low) / max(top - self.low, 1e-12)


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Of a class: ROC curve of its images, and PRO curve up to AUPRO's limit."""

    roc: Curve
    pro: Curve


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Seven metrics per class and their mean, every image, each class's curves, and the shown maps of some images by
    their numbers (see `Album`). `extra`: by class, metrics of the data set's own."""

    classes: dict[str, ClassResult]
    mean: ClassResult
    images: tuple[ImageResult, ...]
    curves: dict[str, Curves]
    decided: Decided | None
    maps: Mapping[int, NDArray]
    extra: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Album:
    """The shown maps of the images that pictures and report will want, kept while an evaluation passes all of them.

    Args:
        wanted: numbers of images whose maps are kept in any case.

    Attributes:
        maps: by number, (H, W) in half precision: the wanted ones, and of each group those of the highest and of the
            lowest `PER_KIND` scores.
    """

    def __init__(self, wanted: Collection[int] = ()) -> None:
        self.wanted, self.maps = frozenset(wanted), dict[int, NDArray[np.float16]]()
        self._groups: dict[Hashable, list[tuple[float, int]]] = {}

    def add(self, number: int, group: Hashable, score: float, shown: NDArray) -> None:
        """Look at an image; what lies between the extremes of its group is forgotten."""
        self.maps[number] = shown.clip(-HALF_MAX, HALF_MAX).astype(np.float16)
        row = self._groups.setdefault(group, [])
        insort(row, (score, number))
        if len(row) > 2 * PER_KIND:
            _, left_out = row.pop(PER_KIND)
            if left_out not in self.wanted:
                del self.maps[left_out]


def joined_albums(
    images: Sequence[ImageResult], albums: Sequence[Mapping[int, NDArray]], wanted: Collection[int]
) -> dict[int, NDArray]:
    """The maps that one album of all `images` would have kept, from albums of parts of them; none from none."""
    if len(albums) == 1:
        return dict(albums[0])
    album = Album(wanted)
    for number, heat in sorted((pair for maps in albums for pair in maps.items()), key=lambda pair: pair[0]):
        image = images[number]
        album.add(number, image.group, image.score, heat)
    return album.maps


def first_of_each(keys: Sequence[Hashable], most: int) -> list[int]:
    """Numbers of the first few with each key."""
    seen: dict[Hashable, int] = {}
    found = []
    for number, key in enumerate(keys):
        seen[key] = seen.get(key, 0) + 1
        if seen[key] <= most:
            found.append(number)
    return found


def pick(images: Sequence[ImageResult]) -> dict[str, list[int]]:
    """Places of the worst false alarms (good, highest score first), the worst misses (defective, lowest first), the
    best finds (defective, highest first), and of those that score as high with the peak outside of the defect.

    No image is both a miss and a find.
    """
    order = sorted(range(len(images)), key=lambda i: images[i].score)
    good, bad = [i for i in order if not images[i].label], [i for i in order if images[i].label]
    misses = bad[: min(PER_KIND, len(bad) // 2)]
    rest = bad[len(misses) :][::-1]
    return {
        "alarms": good[::-1][:PER_KIND],
        "misses": misses,
        "finds": [i for i in rest if images[i].hit is not False][:PER_KIND],
        "astray": [i for i in rest if images[i].hit is False][:PER_KIND],
    }
