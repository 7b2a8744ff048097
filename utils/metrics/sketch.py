"""How much mass lies at or above every score, in memory of fixed size (but for a logarithm of their number).

Up to `BUFFER` scores (a sixteenth of them where they have masses) are kept as they are: small inputs are exact. Beyond
that only boundaries are kept, and counting between them is exact. Boundaries are dense in rank from the top: around the
R-th highest score they are about max(1, R / RESOLUTION) scores apart, whatever the distribution, as only the order of
scores counts. Ties need one boundary, however many they are. Where later scores crowd between two boundaries, new ones
are put there; the mass counted there before is taken to lie at the lower end. It was at most two gaps, and it takes
twice that mass to split a gap again, so that the relative error of a cumulative count is at most
2 (1 + 1/2 + 1/4 + ...) / RESOLUTION = 1.2e-4 in the worst case, for scores that arrive in the worst order, and none at
a boundary that was there from the start. A relative error e of both counts changes a precision p by at most
2 e p (1 - p), and an AUROC by at most e of what is missing to 1.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

RESOLUTION = 1 << 15
BUFFER = 1 << 21


class RankSketch:
    """A multiset of scores with one or more columns of non-negative mass, the first one their count.

    The default mass of a score is one. All tensors live where the scores do. Inside, scores are negated, so that the
    ascending order of keys starts at the highest score.
    """

    def __init__(self, columns: int = 1) -> None:
        self.columns = columns
        self._keys = torch.zeros(0)  # ascending negated boundaries
        self._total = torch.zeros(0, columns, dtype=torch.float64)  # mass at or above each boundary
        self._thinned = False
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        self._waiting = 0

    def add(self, values: Tensor, masses: Tensor | None = None) -> None:
        """Scores (N,), float32 or float64, and their masses (N, columns)."""
        if len(values):
            self._pending.append((values, masses))
            self._waiting += len(values)
        if self._waiting >= self.buffer:
            self._flush()

    @property
    def buffer(self) -> int:
        """How many scores are kept as they are, about the same number of bytes with and without masses."""
        return BUFFER if self.columns == 1 else BUFFER // 16

    def merge(self, other: RankSketch) -> None:
        """Add all mass of another sketch."""
        self._flush()
        other._flush()
        if len(other._keys):
            self._insert(other._keys, other._total)
            self._thinned |= other._thinned

    def cumulative(self) -> tuple[Tensor, Tensor]:
        """Ascending negated distinct scores (K,) and the mass at or above each (K, columns), float64."""
        self._flush()
        return self._keys, self._total

    def _flush(self) -> None:
        """Count what is pending."""
        if not self._pending:
            return
        keys = torch.cat([v for v, _ in self._pending]).neg_()
        total = None  # one a score
        if all(m is None for _, m in self._pending):
            keys = ascending(keys)
        else:
            keys, order = keys.sort()
            ones = torch.ones(1, self.columns, dtype=torch.float64, device=keys.device)
            masses = torch.cat([ones.expand(len(v), -1) if m is None else m.double() for v, m in self._pending])
            total = masses[order].cumsum(0)
        self._pending, self._waiting = [], 0
        self._insert(keys, total)

    def _insert(self, keys: Tensor, total: Tensor | None) -> None:
        """Add ascending `keys`, ties among them, with their cumulative masses (K, columns), None for 1, 2, 3, ..."""
        dtype = torch.promote_types(keys.dtype, self._keys.dtype) if len(self._keys) else keys.dtype
        keys, old_keys, old_total = keys.to(dtype), self._keys.to(keys.device, dtype), self._total.to(keys.device)
        thin = self._thinned or count_distinct(keys) > self.buffer
        extra = keys[_chosen(total, keys)] if thin else keys
        if self._thinned:
            both = old_total + at_or_above(keys, total, old_keys)
            gaps = torch.diff(_ideal(both), dim=0, prepend=torch.zeros_like(both[:1])).amax(1)
            wide = torch.cat([gaps > 2, torch.ones(1, dtype=torch.bool, device=gaps.device)])
            extra = extra[wide[torch.searchsorted(old_keys, extra)]]
        bounds = distinct(ascending(torch.cat([old_keys, extra])) if len(old_keys) else extra)
        total = at_or_above(old_keys, old_total, bounds) + at_or_above(keys, total, bounds)
        if len(bounds) > self.buffer:
            keep = _chosen(total, bounds)
            bounds, total, thin = bounds[keep], total[keep], True
        self._keys, self._total, self._thinned = bounds, total, thin


def ascending(values: Tensor) -> Tensor:
    """Sorted values, in the same memory; on the CPU by NumPy, whose vectorised sort is several times faster."""
    if values.device.type == "cpu":
        values.numpy().sort()
        return values
    return values.sort().values


def selected(values: Tensor, mask: Tensor) -> Tensor:
    """`values[mask]`; on the CPU by NumPy, which is ten times faster."""
    if values.device.type == "cpu":
        return torch.from_numpy(values.numpy()[mask.numpy()])
    return values[mask]


def count_distinct(keys: Tensor) -> int:
    """Different values among sorted ones."""
    if keys.device.type == "cpu":
        values = keys.numpy()
        return int(np.count_nonzero(values[1:] != values[:-1])) + min(len(values), 1)
    return int((keys[1:] != keys[:-1]).sum()) + min(len(keys), 1)


def distinct(keys: Tensor) -> Tensor:
    """Sorted values without repetition."""
    first = torch.ones(min(len(keys), 1), dtype=torch.bool, device=keys.device)
    return selected(keys, torch.cat([first, keys[1:] != keys[:-1]]))


def at_or_above(keys: Tensor, total: Tensor | None, bounds: Tensor) -> Tensor:
    """Mass (B, columns) at or above each of `bounds`, for cumulative masses `total` at `keys` (None: 1, 2, 3, ...).

    `keys` and `bounds` are negated and ascend.
    """
    place = torch.searchsorted(keys, bounds, right=True)
    if total is None:
        return place[:, None].double()
    if not len(keys):
        return total.new_zeros(len(bounds), total.shape[1])
    return torch.where(place[:, None] > 0, total[(place - 1).clamp(min=0)], 0.0)


def _ideal(total: Tensor) -> Tensor:
    """How many boundaries there should be down to each cumulative mass, by column.

    Counts: one a score among the highest RESOLUTION, then RESOLUTION each time the rank grows by a factor e. Other
    columns: 4 RESOLUTION in all.
    """
    rank = total[:, :1]
    dense = torch.where(rank <= RESOLUTION, rank, RESOLUTION * (1 + (rank / RESOLUTION).clamp(min=1).log()))
    rest = total[:, 1:] / total[-1:, 1:].clamp(min=1e-300) * (4 * RESOLUTION)
    return torch.cat([dense, rest], 1)


def _targets(last: Tensor, column: int) -> Tensor:
    """The inverse of `_ideal`: cumulative masses at which it is a whole number, for totals (columns,)."""
    if column:
        return (
            last[column] * torch.arange(1, 4 * RESOLUTION, dtype=torch.float64, device=last.device) / (4 * RESOLUTION)
        )
    steps = math.ceil(RESOLUTION * (1 + math.log(max(float(last[0]) / RESOLUTION, 1))))
    number = torch.arange(1, steps + 1, dtype=torch.float64, device=last.device)
    masses = torch.where(number <= RESOLUTION, number, RESOLUTION * (number / RESOLUTION - 1).exp())
    return masses[masses < last[0]]


def _chosen(total: Tensor | None, keys: Tensor) -> Tensor:
    """Indices of the keys to keep as boundaries, ascending, for cumulative masses (K, columns) or None for 1, 2, 3, ...

    The last of each ideal gap, those with the mass of a gap or more, the highest and the lowest of all.
    """
    kept = [torch.tensor([0, len(keys) - 1], device=keys.device)]
    last = torch.tensor([len(keys)], dtype=torch.float64, device=keys.device) if total is None else total[-1]
    for column in range(len(last)):
        goals = _targets(last, column)
        place = goals.ceil().long() - 1 if total is None else torch.searchsorted(total[:, column].contiguous(), goals)
        kept += [(place - 1).clamp(min=0), place[1:][place[1:] == place[:-1]]]
    return distinct(ascending(torch.cat(kept)))
