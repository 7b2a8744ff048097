"""How far chance in the choice of test images moves the image metrics: percentile bootstrap over images.

Good and defective images are resampled apart, each in its own number (stratified: Davison and Hinkley, Bootstrap
Methods and their Application, 1997, section 3.2). How many of each there are is a choice of the data set's makers and
not a random outcome, AP and F1-max depend on it, and no resample is without one of the two.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
LEVEL = 0.95
CHUNK = 1 << 22  # values of one array while resampling
Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """95 % intervals of the image metrics: class -> metric -> (low, high), fractions, and those of the means."""

    resamples: int
    classes: dict[str, dict[str, Interval]]
    mean: dict[str, Interval]

    def row(self, name: str | None) -> dict[str, Interval]:
        """A class's intervals, the mean's for None."""
        return self.mean if name is None else self.classes.get(name, {})

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"level": LEVEL, "resamples": self.resamples, "classes": self.classes, "mean": self.mean}


def bootstrap(images: Mapping[str, tuple[ArrayLike, ArrayLike]], resamples: int, seed: int) -> Intervals:
    """Intervals for classes given as labels (N,) and scores (N,) of their images.

    A class's resamples depend on its name and `seed` alone. The mean over classes is taken resample by resample,
    without classes that lack good or defective images; these have no intervals.
    """
    drawn = {}
    for name, (labels, scores) in images.items():
        y, s = np.asarray(labels) > 0, np.asarray(scores, np.float64)
        if y.any() and not y.all():
            drawn[name] = resampled_metrics(y, s, resamples, np.random.default_rng([seed, zlib.crc32(name.encode())]))
    mean = np.mean(list(drawn.values()), 0) if drawn else np.zeros((0, 3))
    return Intervals(resamples=resamples, classes={n: percentiles(v) for n, v in drawn.items()}, mean=percentiles(mean))


def percentiles(draws: NDArray) -> dict[str, Interval]:
    """The middle 95 % of draws (R, 3); nothing for none."""
    if not len(draws):
        return {}
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {m: (float(a), float(b)) for m, a, b in zip(IMAGE_METRICS, low, high, strict=True)}


def resampled_metrics(labels: NDArray[np.bool_], scores: NDArray, resamples: int, rng: np.random.Generator) -> NDArray:
    """AUROC, AP and F1-max of each resample, (R, 3), for labels and scores (N,) with both labels present."""
    order = np.argsort(-scores, kind="stable")
    positive, last = labels[order], np.append(np.diff(scores[order]) != 0, True)
    parts = []
    step = max(CHUNK // len(scores), 1)
    for start in range(0, resamples, step):
        size = (min(step, resamples - start),)
        true, false = (
            np.cumsum(drawn_counts(chosen, size[0], rng), 1, dtype=np.float64)[:, last]
            for chosen in (positive, ~positive)
        )
        parts.append(curve_metrics(true, false))
    return np.concatenate(parts)


def drawn_counts(chosen: NDArray[np.bool_], resamples: int, rng: np.random.Generator) -> NDArray:
    """How often each image is in each resample, (R, N): as many draws with replacement as there are `chosen` (N,)."""
    counts = np.zeros((resamples, len(chosen)), np.int64)
    number = int(chosen.sum())
    counts[:, chosen] = rng.multinomial(number, np.full(number, 1 / number), size=resamples)
    return counts


def curve_metrics(true: NDArray, false: NDArray) -> NDArray:
    """(R, 3) for cumulative positives and negatives (R, K) at or above each distinct score, descending."""
    up, down = true[:, -1:], false[:, -1:]
    step_true, step_false = np.diff(true, prepend=0), np.diff(false, prepend=0)
    auroc = ((true - step_true / 2) * step_false).sum(1) / (up * down)[:, 0]
    precision = np.divide(true, true + false, out=np.zeros_like(true), where=true + false > 0)
    ap = (precision * step_true).sum(1) / up[:, 0]
    return np.stack([auroc, ap, (2 * true / (true + false + up)).max(1)], 1)
