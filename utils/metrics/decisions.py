"""How often decisions are right: false alarms and finds, with exact binomial intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy.stats import binomtest

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Rate:
    """`hits` of `count` images."""

    hits: int
    count: int

    @classmethod
    def of(cls, found: Sequence[bool]) -> Rate:
        return cls(hits=sum(found), count=len(found))

    def interval(self) -> tuple[float, float]:
        """95 % interval of the share (Clopper and Pearson, Biometrika 26, 1934); 0 to 1 for no images."""
        if not self.count:
            return 0.0, 1.0
        found = binomtest(self.hits, self.count).proportion_ci(LEVEL)
        return float(found.low), float(found.high)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"images": self.hits, "of": self.count, "interval": list(self.interval())}

    def __str__(self) -> str:
        low, high = self.interval()
        share = f"{self.hits / self.count:.1%}, 95 % interval {low:.1%} to {high:.1%}" if self.count else "none"
        return f"{self.hits} of {self.count} ({share})"


@dataclass(frozen=True, kw_only=True)
class Decided:
    """Test images under the thresholds of a checkpoint.

    Attributes:
        rate: the false-alarm rate that was asked for.
        calibration: images that the thresholds come from.
        basis: why the rate should hold, in words.
        threshold: of image scores, of the largest group of concepts.
        interval: 95 % interval of a threshold that is an estimate, else None.
        false_alarms, found: good images called defective, and defective ones, of each class.
    """

    rate: float
    calibration: int
    basis: str
    threshold: float
    interval: tuple[float, float] | None
    false_alarms: Mapping[str, Rate]
    found: Mapping[str, Rate]

    @classmethod
    def joined(cls, parts: Sequence[Decided]) -> Decided | None:
        """Of several models, each with classes of its own; the basis is that of the one with the fewest images."""
        if not parts:
            return None
        least = min(parts, key=lambda part: part.calibration)
        alarms = {name: rate for part in parts for name, rate in part.false_alarms.items()}
        found = {name: rate for part in parts for name, rate in part.found.items()}
        return replace(least, false_alarms=alarms, found=found)

    @staticmethod
    def total(rates: Iterable[Rate]) -> Rate:
        """Of all classes together."""
        every = list(rates)
        return Rate(hits=sum(r.hits for r in every), count=sum(r.count for r in every))

    def plain(self) -> dict[str, Any]:
        """For results.json."""
        kinds = {"false_alarms": self.false_alarms, "found": self.found}
        return {
            "false_alarm_rate": self.rate, "calibration_images": self.calibration, "basis": self.basis,
            "threshold": self.threshold, "threshold_interval": self.interval,
            "classes": {kind: {name: r.plain() for name, r in rates.items()} for kind, rates in kinds.items()},
            **{kind: self.total(rates.values()).plain() for kind, rates in kinds.items()},
        }  # fmt: skip

    def __str__(self) -> str:
        alarms, found = self.total(self.false_alarms.values()), self.total(self.found.values())
        rule = rule_text(self.rate, self.threshold, self.interval, self.basis)
        return f"{rule}: {alarms} good images alarmed, {found} defective ones found"


def rule_text(rate: float, threshold: float, interval: tuple[float, float] | None, basis: str) -> str:
    """How it is decided, with the 95 % interval of a threshold that is an estimate."""
    span = "" if interval is None else f" ({interval[0]:.4g} to {interval[1]:.4g})"
    return f"decision at a false-alarm rate of {rate:.2%}, threshold {threshold:.4g}{span}, {basis}"
