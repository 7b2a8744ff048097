"""From a score to a decision whose false-alarm rate is known: conformal, on images that nothing was fitted to.

For n calibration images that are exchangeable with a new normal one, let p be (1 + the number of calibration scores at
or above the new one) / (n + 1). Then p is at most r for at most a share r of normal images, whatever the distribution
of scores (Vovk et al., Algorithmic Learning in a Random World, 2005, section 2.2).
Where a concept has calibration images enough it is compared with those alone (Mondrian: op. cit., section 4.5), so that
the rate holds for its images by themselves.

Too few images (n < 1 / rate - 1) say nothing about so low a rate. Then the threshold is extrapolated from a generalized
Pareto distribution of the highest scores (Pickands, 1975), fitted by probability-weighted moments (Hosking and Wallis,
Technometrics 29, 1987), and is called an estimate.

Scores of training images decide nothing with a guarantee. The memory could leave each of them out, which is
cross-conformal (Vovk, arXiv 1208.0806) and has a false-alarm rate of at most twice r, about r in practice (jackknife+,
Barber et al., Annals of Statistics 49, 2021, theorem 1); but the flow's part of a score has seen the image, and the sum
of both is not exchangeable with a new one's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from default import EvalConfig
from utils.metrics.decisions import rule_text

TAIL_SHARE, TAIL_LEAST = 0.25, 10  # of the scores, the highest ones that a tail is fitted to
RESAMPLES, LEVEL = 400, 0.95  # of an estimate's interval


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of some images, each (B,): `p_value` in (0, 1], the image score's `threshold`, whether the score is above it
    (`defective`), and the `pixel_threshold` of the shown map, above which a pixel is marked."""

    p_value: Tensor
    threshold: Tensor
    defective: Tensor
    pixel_threshold: Tensor


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What calibration images had, and under which scoring: plain values of a checkpoint.

    Attributes:
        scores, peaks: image scores and highest values of the shown map, of n images.
        concepts: their concepts, -1 without codebooks.
        scoring: the settings that a score depends on (`scoring_of`).
        unseen: nothing was fitted to the images; else they were trained on, and no rate is guaranteed.
    """

    scores: tuple[float, ...]
    peaks: tuple[float, ...]
    concepts: tuple[int, ...]
    scoring: Mapping[str, Any]
    unseen: bool

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "scores": list(self.scores), "peaks": list(self.peaks), "concepts": list(self.concepts),
            "scoring": dict(self.scoring), "unseen": self.unseen,
        }  # fmt: skip

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Calibrated:
        """The inverse of `plain`.

        Raises:
            KeyError, TypeError, ValueError: not what `plain` gives.
        """
        numbers = {name: tuple(float(v) for v in plain[name]) for name in ("scores", "peaks")}
        concepts = tuple(int(c) for c in plain["concepts"])
        if not len(numbers["scores"]) == len(numbers["peaks"]) == len(concepts) > 0:
            raise ValueError("expected as many scores as peaks and concepts")
        return cls(**numbers, concepts=concepts, scoring=dict(plain["scoring"]), unseen=bool(plain["unseen"]))


def scoring_of(config: EvalConfig, size: int) -> dict[str, Any]:
    """All that an image score and the shown map depend on, beside the model."""
    return {"image_score": config.image_score, "shown_score": config.shown_score, "top_k": config.top_k, "size": size}


class Decision(nn.Module):
    """Thresholds and p-values at one false-alarm rate.

    Categories of images have thresholds of their own; number 0 holds all concepts with too few calibration images.

    Args:
        calibrated: what calibration images had.
        rate: share of normal images that may be called defective, and of those with any marked pixel, in (0, 1).
    """

    def __init__(self, calibrated: Calibrated, rate: float) -> None:
        super().__init__()
        self.calibrated, self.rate = calibrated, rate
        scores, peaks, concepts = (np.array(v) for v in (calibrated.scores, calibrated.peaks, calibrated.concepts))
        own = categories(concepts, enough(rate))
        numbers = np.array([own.get(int(c), 0) for c in concepts])
        groups = [numbers == g for g in range(len(own) + 1)]
        self.counts = [int(group.sum()) for group in groups]
        table = np.full((len(groups), max(self.counts)), -np.inf)
        for row, group in zip(table, groups, strict=True):
            row[: group.sum()] = scores[group]
        category = np.zeros(max(int(concepts.max()) + 1, 1), np.int64)
        category[list(own)] = list(own.values())
        values = [[threshold(v[g], rate) if g.any() else math.nan for g in groups] for v in (scores, peaks)]
        self.category: Tensor
        self.scores: Tensor
        self.count: Tensor
        self.thresholds: Tensor
        self.pixel_thresholds: Tensor
        self.register_buffer("category", torch.from_numpy(category), persistent=False)
        self.register_buffer("scores", torch.from_numpy(table).float(), persistent=False)
        self.register_buffer("count", torch.tensor(self.counts), persistent=False)
        self.register_buffer("thresholds", torch.tensor(values[0]), persistent=False)
        self.register_buffer("pixel_thresholds", torch.tensor(values[1]), persistent=False)

    @property
    def basis(self) -> str:
        """Why the rate should hold, in words."""
        images = f"{self.images} normal images"
        if not self.calibrated.unseen:
            return f"no guarantee: {images} that were trained on; --holdout keeps some apart"
        if not self.guaranteed:
            return f"an estimate from the tail of {images}; {enough(self.rate)} would give a guarantee"
        kinds = len([n for n in self.counts if n])
        groups = f" in {kinds} groups" if kinds > 1 else ""
        return f"guaranteed for images like the {images}{groups} that nothing was fitted to"

    @property
    def images(self) -> int:
        """n, the calibration images of all categories."""
        return sum(self.counts)

    @property
    def guaranteed(self) -> bool:
        """Whether the rate follows from exchangeability alone; else the thresholds are estimates."""
        return self.calibrated.unseen and self.images >= enough(self.rate)

    def describe(self) -> str:
        """In a line: rate, threshold of the first category, and basis."""
        interval = None if self.guaranteed else self.interval()
        return rule_text(self.rate, float(self.thresholds[0]), interval, self.basis)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the first category's threshold where it is an estimate: parametric bootstrap of the tail."""
        numbers = [int(self.category[c]) if c >= 0 else 0 for c in self.calibrated.concepts]
        rows = [s for s, g in zip(self.calibrated.scores, numbers, strict=True) if g == 0]
        return tail_interval(np.array(rows), self.rate)

    def forward(self, scores: Tensor, concept: Tensor | None) -> Verdict:
        """Image scores (B,) and concepts (B,), None without codebooks -> `Verdict`."""
        known = self.category.shape[0] - 1
        row = torch.zeros_like(scores, dtype=torch.int64) if concept is None else concept
        row = torch.where(row <= known, self.category[row.clamp(max=known)], torch.zeros_like(row))
        above = (self.scores[row] >= scores[:, None]).sum(1)
        limit = self.thresholds[row]
        return Verdict(
            p_value=(1 + above) / (1 + self.count[row]), threshold=limit, defective=scores > limit,
            pixel_threshold=self.pixel_thresholds[row],
        )  # fmt: skip


def enough(rate: float) -> int:
    """The fewest calibration images that say anything about a rate: the least n with 1 / (n + 1) <= rate."""
    return math.ceil(1 / rate - 1 - 1e-9)


def categories(concepts: NDArray[np.int64], least: int) -> dict[int, int]:
    """Concept -> its category 1, 2, ..., for concepts with `least` images; all others share category 0.

    Category 0 must have `least` images too, unless it has all: the smallest of the others join it until it has.
    """
    counts = {int(c): int(n) for c, n in zip(*np.unique(concepts[concepts >= 0], return_counts=True), strict=True)}
    alone = sorted((c for c, n in counts.items() if n >= least), key=lambda c: (-counts[c], c))
    while alone and len(concepts) - sum(counts[c] for c in alone) < least:
        alone.pop()
    return {c: number + 1 for number, c in enumerate(sorted(alone))}


def threshold(scores: NDArray, rate: float) -> float:
    """The value above which p <= rate: the k-th highest of n scores, k = floor(rate (n + 1)); an estimate for k = 0."""
    k = math.floor(rate * (len(scores) + 1) + 1e-9)
    return float(np.sort(scores)[-k]) if k else tail_threshold(scores, rate)


def tail_threshold(scores: NDArray, rate: float) -> float:
    """Score that a share `rate` of normal images exceeds, from the tail's generalized Pareto distribution.

    With fewer than four scores, or equal ones, the highest of them.
    """
    tail = Tail.of(scores)
    return float(scores.max()) if tail is None else max(tail.quantile(rate), float(scores.max()))


def tail_interval(scores: NDArray, rate: float) -> tuple[float, float]:
    """95 % interval of `tail_threshold`; the highest score and infinity where there is no tail to speak of."""
    tail = Tail.of(scores)
    if tail is None:
        return float(scores.max()), math.inf
    draws, rng = [], np.random.default_rng(0)
    for _ in range(RESAMPLES):
        again = Tail.fitted(tail.start, tail.drawn(rng), tail.share)
        draws.append(math.inf if again is None else again.quantile(rate))
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class Tail:
    """The `count` excesses over `start` of a `share` of all scores: generalized Pareto with `shape` and `scale`."""

    start: float
    share: float
    count: int
    shape: float
    scale: float

    @classmethod
    def of(cls, scores: NDArray) -> Tail | None:
        """Of the highest scores; None for fewer than four, or if they are all the same."""
        ordered = np.sort(scores)[::-1]
        size = min(max(round(TAIL_SHARE * len(ordered)), TAIL_LEAST), len(ordered) - 1)
        if size < 3:
            return None
        return cls.fitted(float(ordered[size]), ordered[:size] - ordered[size], size / len(ordered))

    @classmethod
    def fitted(cls, start: float, excesses: NDArray, share: float) -> Tail | None:
        """By probability-weighted moments a_0 = E X and a_1 = E X (1 - F(X)); Hosking and Wallis, equation 4."""
        ordered = np.sort(excesses)
        place = (np.arange(1, len(ordered) + 1) - 0.35) / len(ordered)
        first, second = float(ordered.mean()), float((ordered * (1 - place)).mean())
        if first - 2 * second <= 1e-12 * max(first, 1e-300):
            return None
        shape, scale = 2 - first / (first - 2 * second), 2 * first * second / (first - 2 * second)
        return cls(start=start, share=share, count=len(ordered), shape=shape, scale=scale)

    def quantile(self, rate: float) -> float:
        """The score that a share `rate` of all exceeds."""
        return self.start + self.excess(rate / self.share)

    def excess(self, part: float | NDArray) -> Any:
        """What a share `part` of the excesses exceeds."""
        if abs(self.shape) < 1e-9:
            return -self.scale * np.log(part)
        return self.scale / self.shape * (part**-self.shape - 1)

    def drawn(self, rng: np.random.Generator) -> NDArray:
        """As many random excesses."""
        return self.excess(rng.uniform(size=self.count))


def split_in_two(classes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Numbers of the images that units come from, and of those whose scores decide, from each image's class, in turn.

    The two share no image. A single image gives units alone.
    """
    order = sorted(range(len(classes)), key=lambda n: (classes[n], n))
    return sorted(order[::2]), sorted(order[1::2])
