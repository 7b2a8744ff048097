"""The seven metrics of anomaly detection, exact or within 1e-4, in one pass over the images.

Image level and pixel level: AUROC (area under the receiver operating characteristic), AP (average precision: sum of
precision times step of recall, as in scikit-learn) and F1-max (highest 2PR / (P + R) over all thresholds). AUPRO
(Bergmann et al., IJCV 2021, section 5.3): the mean over ground-truth regions (8-connected components of the mask) of
the share of the region that is found, integrated over the false-positive rate from 0 to a limit and divided by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from utils.metrics.sketch import RankSketch, ascending, at_or_above, distinct, selected

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """Fractions in [0, 1]; NaN where a class lacks what the metric needs."""

    image_auroc: float
    image_ap: float
    image_f1max: float
    pixel_auroc: float
    pixel_ap: float
    pixel_f1max: float
    aupro: float

    @property
    def mad(self) -> float:
        """Mean of the seven (mAD: Zhang et al., ADer, arXiv 2406.03262), NaN where one of them is."""
        return sum(getattr(self, name) for name in METRICS) / len(METRICS)


METRICS = tuple(entry.name for entry in fields(ClassResult))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points of a curve, `x` and `y` in [0, 1], (K,)."""

    x: np.ndarray
    y: np.ndarray


def evaluate_maps(labels: Any, scores: Any, masks: Any, maps: Any, fpr_limit: float = 0.3) -> ClassResult:
    """All seven metrics of one class, from arrays or tensors.

    Args:
        labels: (N,), 1 defective.
        scores: (N,) image scores.
        masks: (N, H, W), true where defective.
        maps: (N, H, W) pixel scores.
        fpr_limit: AUPRO's limit, in (0, 1].

    Raises:
        ValueError: other shapes, NaN in scores or maps, or a limit out of range.
    """
    accumulator = ClassAccumulator(fpr_limit=fpr_limit)
    accumulator.update(labels=labels, scores=scores, masks=masks, maps=maps)
    return accumulator.compute()


def mean_results(results: Mapping[str, ClassResult]) -> ClassResult:
    """Mean over classes of each metric, NaN left out; NaN where no class has it."""
    return ClassResult(**{name: nanmean([getattr(r, name) for r in results.values()]) for name in METRICS})


def nanmean(values: list[float]) -> float:
    """Mean of the values that are not NaN, NaN if there are none."""
    there = [v for v in values if v == v]
    return sum(there) / len(there) if there else NAN


class ClassAccumulator:
    """Collects one class's images in memory of fixed size (plus two numbers an image).

    Accumulators of parts of the images, made in several processes, are joined by `merge`.
    """

    def __init__(self, *, fpr_limit: float = 0.3) -> None:
        if not 0 < fpr_limit <= 1:
            raise ValueError(f"fpr_limit: expected a number in (0, 1], but got {fpr_limit}")
        self.fpr_limit = fpr_limit
        self.labels: list[float] = []
        self.scores: list[float] = []
        self.regions = 0
        self.negative, self.positive = RankSketch(), RankSketch()
        self.outside, self.found = RankSketch(), RankSketch(columns=2)
        self._shared = True  # AUPRO is made of the same map as the pixel metrics

    def update(self, *, labels: Any, scores: Any, masks: Any, maps: Any, pro_maps: Any = None) -> None:
        """Add images: labels (N,), scores (N,), masks and maps (N, H, W); `pro_maps` where AUPRO has its own map.

        Raises:
            ValueError: other shapes, NaN, or `pro_maps` given for some updates only.
        """
        labels, scores, masks, maps = (torch.as_tensor(v) for v in (labels, scores, masks, maps))
        own = None if pro_maps is None or pro_maps is maps else torch.as_tensor(pro_maps)
        check(labels, scores, masks, maps, own)
        if self.labels and (own is None) != self._shared:
            raise ValueError("pro_maps: expected in every update or in none")
        self._shared = own is None
        self.labels += labels.flatten().tolist()
        self.scores += scores.flatten().double().tolist()
        maps = as_scores(maps)
        masks = as_masks(masks.to(maps.device))
        shares = self._region_shares(masks)
        self.negative.add(selected(maps, ~masks))
        if own is None:
            self.found.add(selected(maps, masks), shares)
        else:
            own = as_scores(own.to(maps.device))
            self.positive.add(selected(maps, masks))
            self.outside.add(selected(own, ~masks))
            self.found.add(selected(own, masks), shares)

    def _region_shares(self, masks: Tensor) -> Tensor:
        """For each pixel inside `masks`, in their order: its count 1 and its share of its region, (P, 2)."""
        shares = []
        for mask in masks.cpu().numpy():
            if mask.any():
                count, labelled, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
                self.regions += count - 1
                shares.append(1.0 / stats[labelled[mask], cv2.CC_STAT_AREA])
        flat = torch.from_numpy(np.concatenate(shares) if shares else np.zeros(0)).to(masks.device)
        return torch.stack([torch.ones_like(flat), flat], 1)

    def merge(self, other: ClassAccumulator) -> None:
        """Add the images of another accumulator."""
        if other.labels:
            if self.labels and self._shared != other._shared:
                raise ValueError("pro_maps: expected in both accumulators or in none")
            self._shared = other._shared
        self.labels += other.labels
        self.scores += other.scores
        self.regions += other.regions
        for name in ("negative", "positive", "outside", "found"):
            getattr(self, name).merge(getattr(other, name))

    def compute(self) -> ClassResult:
        """The seven metrics of all images so far."""
        image = self._image_counts()
        true, false = joined(self.found if self._shared else self.positive, self.negative)
        pixel = true[:, 0], false
        curve = self._region_curve(true[:, 1], false) if self._shared else self.pro_curve()
        return ClassResult(
            image_auroc=auroc(*image), image_ap=average_precision(*image), image_f1max=f1_max(*image),
            pixel_auroc=auroc(*pixel), pixel_ap=average_precision(*pixel), pixel_f1max=f1_max(*pixel),
            aupro=area_up_to(curve, self.fpr_limit),
        )  # fmt: skip

    def pro_curve(self) -> Curve:
        """False-positive rate and mean found share of the regions, over all thresholds, from (0, 0)."""
        true, false = joined(self.found, self.negative if self._shared else self.outside)
        return self._region_curve(true[:, 1], false)

    def _region_curve(self, found: Tensor, outside: Tensor) -> Curve:
        start = torch.zeros(1, dtype=torch.float64)
        if not self.regions or not len(outside) or outside[-1] == 0:
            return Curve(x=np.zeros(0), y=np.zeros(0))
        x, y = outside / outside[-1], found / self.regions
        return Curve(x=torch.cat([start, x.cpu()]).numpy(), y=torch.cat([start, y.cpu()]).clamp(max=1).numpy())

    def roc_curve(self) -> Curve:
        """False-positive and true-positive rate of the image scores, from (0, 0)."""
        true, false = self._image_counts()
        if not len(true) or true[-1] == 0 or false[-1] == 0:
            return Curve(x=np.zeros(0), y=np.zeros(0))
        start = torch.zeros(1, dtype=torch.float64)
        return Curve(x=torch.cat([start, false / false[-1]]).numpy(), y=torch.cat([start, true / true[-1]]).numpy())

    def _image_counts(self) -> tuple[Tensor, Tensor]:
        labels, scores = (torch.tensor(v, dtype=torch.float64) for v in (self.labels, self.scores))
        return ranked(scores[labels > 0], scores[labels <= 0])


def area_up_to(curve: Curve, limit: float) -> float:
    """Area under a curve from 0 to `limit` by trapezoids, divided by `limit`; NaN for an empty curve."""
    if not len(curve.x):
        return NAN
    inside = curve.x <= limit
    x = np.append(curve.x[inside], limit)
    y = np.append(curve.y[inside], np.interp(limit, curve.x, curve.y))
    return float(np.trapezoid(y, x) / limit)


def check(labels: Tensor, scores: Tensor, masks: Tensor, maps: Tensor, own: Tensor | None) -> None:
    """Raise `ValueError` for shapes that do not fit and for NaN."""
    count = len(labels)
    if labels.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores: expected shape ({count},) like labels, but got {tuple(scores.shape)}")
    if maps.ndim != 3 or len(maps) != count:
        raise ValueError(f"maps: expected shape ({count}, H, W), but got {tuple(maps.shape)}")
    for name, value in (("masks", masks), ("pro_maps", own)):
        if value is not None and value.shape != maps.shape:
            raise ValueError(f"{name}: expected shape {tuple(maps.shape)} like maps, but got {tuple(value.shape)}")
    for name, value in (("scores", scores), ("maps", maps), ("pro_maps", own)):
        if value is not None and bool(torch.isnan(value).any()):
            raise ValueError(f"{name}: expected numbers, but got NaN")


def as_masks(masks: Tensor) -> Tensor:
    """True where defective: above 0.5 for floating-point masks, above 0 for integers."""
    if masks.dtype == torch.bool:
        return masks
    return masks > 0.5 if masks.dtype.is_floating_point else masks > 0


def as_scores(maps: Tensor) -> Tensor:
    """Double precision stays; all else becomes float32, which holds half precision exactly.

    MPS has no double precision to count in, so that its maps are counted on the CPU.
    """
    maps = maps.cpu() if maps.device.type == "mps" else maps
    return maps if maps.dtype == torch.float64 else maps.float()


def ranked(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """How many positive and negative scores are at or above each distinct score, descending, (K,) float64 each."""
    sketches = RankSketch(), RankSketch()
    for sketch, scores in zip(sketches, (positive, negative), strict=True):
        sketch.add(scores)
    true, false = joined(*sketches)
    return true[:, 0], false


def joined(positive: RankSketch, negative: RankSketch) -> tuple[Tensor, Tensor]:
    """Cumulative masses of both at or above each boundary of either, from the highest on, (K, columns) and (K,)."""
    (up, true), (down, false) = positive.cumulative(), negative.cumulative()
    up, true, down = up.double().to(down.device), true.to(down.device), down.double()
    bounds = distinct(ascending(torch.cat([up, down])))
    return at_or_above(up, true, bounds), at_or_above(down, false, bounds)[:, 0]


def without_both(true: Tensor, false: Tensor) -> bool:
    return not len(true) or not true[-1] > 0 or not false[-1] > 0


def auroc(true: Tensor, false: Tensor) -> float:
    """Area under the ROC curve by trapezoids: ties count one half. NaN without positives or negatives."""
    if without_both(true, false):
        return NAN
    zero = torch.zeros(1, dtype=torch.float64, device=true.device)
    return float(torch.trapezoid(torch.cat([zero, true / true[-1]]), torch.cat([zero, false / false[-1]])))


def average_precision(true: Tensor, false: Tensor) -> float:
    """Sum over thresholds of precision times the step of recall. NaN without positives or negatives."""
    if without_both(true, false):
        return NAN
    steps = torch.diff(true, prepend=torch.zeros(1, dtype=torch.float64, device=true.device))
    return float((true / (true + false) * steps).sum() / true[-1])


def f1_max(true: Tensor, false: Tensor) -> float:
    """Highest F1 = 2 TP / (2 TP + FP + FN) over all thresholds. NaN without positives or negatives."""
    return NAN if without_both(true, false) else float((2 * true / (true + false + true[-1])).max())
