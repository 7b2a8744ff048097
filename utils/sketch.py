"""How much mass lies at or above every score, in memory that does not grow with the number of scores.

Up to `BUFFER` scores are kept as they are: small inputs are exact. Beyond that only boundaries are kept, and counting
between them is exact. Boundaries are dense in rank from the top: around the R-th highest score they are about
max(1, R / RESOLUTION) scores apart, whatever the distribution, as only the order of scores counts. Ties need one
boundary, however many they are. Where later scores crowd between two boundaries, new ones are put there; the mass
counted there before is taken to lie at the lower end. It was at most two gaps, and it takes twice that mass to split
a gap again, so that the relative error of a cumulative count is at most 2 (1 + 1/2 + 1/4 + ...) / RESOLUTION = 1.2e-4
in the worst case, for scores that arrive in the worst order, and none at a boundary that was there from the start. A
relative error e of both counts changes a precision p by at most 2 e p (1 - p), and an AUROC by at most e of what is
missing to 1.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RESOLUTION = 1 << 15
BUFFER = 1 << 21


class RankSketch:
    """A multiset of scores with one or more columns of non-negative mass, the first one their count.

    The default mass of a score is one. All tensors live where the scores do.
    """

    def __init__(self, columns: int = 1) -> None:
        self.columns = columns
        self._keys = torch.zeros(0)  # descending boundaries
        self._total = torch.zeros(0, columns, dtype=torch.float64)  # mass at or above each boundary
        self._thinned = False
        self._pending: list[tuple[Tensor, Tensor | None]] = []
        self._waiting = 0

    def add(self, values: Tensor, masses: Tensor | None = None) -> None:
        """Scores (N,), float32 or float64, and their masses (N, columns)."""
        if len(values):
            self._pending.append((values, masses))
            self._waiting += len(values)
        if self._waiting >= BUFFER:
            self._flush()

    def merge(self, other: RankSketch) -> None:
        """Add all mass of another sketch."""
        keys, masses = other.atoms()
        self._flush()
        if len(keys):
            self._insert(keys, masses.cumsum(0))
            self._thinned |= other._thinned

    def atoms(self) -> tuple[Tensor, Tensor]:
        """Descending distinct scores (K,) and the mass at each (K, columns), float64."""
        self._flush()
        return self._keys, torch.diff(self._total, dim=0, prepend=torch.zeros_like(self._total[:1]))

    def _flush(self) -> None:
        """Count what is pending."""
        if not self._pending:
            return
        values = torch.cat([v for v, _ in self._pending])
        if all(m is None for _, m in self._pending):
            values = sorted_descending(values)
            total = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)[:, None]
        else:
            values, order = values.sort(descending=True)
            ones = torch.ones(1, self.columns, dtype=torch.float64, device=values.device)
            masses = torch.cat([ones.expand(len(v), -1) if m is None else m.double() for v, m in self._pending])
            total = masses[order].cumsum(0)
        self._pending, self._waiting = [], 0
        last = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool, device=values.device)])
        self._insert(values[last], total[last])

    def _insert(self, keys: Tensor, total: Tensor) -> None:
        """Add descending distinct `keys` with their cumulative masses (K, columns)."""
        if len(self._keys):
            dtype = torch.promote_types(keys.dtype, self._keys.dtype)
            keys, old_keys, old_total = keys.to(dtype), self._keys.to(dtype), self._total
            extra = keys
            if self._thinned:
                both = old_total + at_or_above(keys, total, old_keys)
                gaps = torch.diff(_ideal(both), dim=0, prepend=torch.zeros_like(both[:1])).amax(1)
                wide = torch.cat([gaps > 2, torch.ones(1, dtype=torch.bool, device=gaps.device)])
                extra = keys[wide[torch.searchsorted(-old_keys, -keys)] & _chosen(total)]
            bounds = sorted_descending(torch.cat([old_keys, extra])).unique_consecutive()
            total = at_or_above(old_keys, old_total, bounds) + at_or_above(keys, total, bounds)
            keys = bounds
        if len(keys) > BUFFER:
            keep = _chosen(total)
            keys, total, self._thinned = keys[keep], total[keep], True
        self._keys, self._total = keys.clone(), total.clone()


def sorted_descending(values: Tensor) -> Tensor:
    """Sorted values; on the CPU by NumPy, whose vectorised sort is several times faster."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy())).flip(0)
    return values.sort(descending=True).values


def at_or_above(keys: Tensor, total: Tensor, bounds: Tensor) -> Tensor:
    """Mass at or above each of `bounds`, for cumulative masses `total` at descending `keys`."""
    place = torch.searchsorted(-keys, -bounds, right=True)
    return torch.cat([torch.zeros_like(total[:1]), total])[place]


def _ideal(total: Tensor) -> Tensor:
    """How many boundaries there should be down to each cumulative mass, by column.

    Counts: one a score among the highest RESOLUTION, then RESOLUTION each time the rank grows by a factor e. Other
    columns: 4 RESOLUTION in all.
    """
    rank = total[:, :1]
    dense = torch.where(rank <= RESOLUTION, rank, RESOLUTION * (1 + (rank / RESOLUTION).clamp(min=1).log()))
    rest = total[:, 1:] / total[-1:, 1:].clamp(min=1e-300) * (4 * RESOLUTION)
    return torch.cat([dense, rest], 1)


def _chosen(total: Tensor) -> Tensor:
    """Which boundaries to keep: the last of each ideal gap, those with the mass of a gap or more, the lowest of all."""
    gap = _ideal(total).floor()
    step = torch.diff(gap, dim=0)
    edge = torch.ones(1, dtype=torch.bool, device=gap.device)
    return torch.cat([(step > 0).any(1), edge]) | torch.cat([edge, (step > 1).any(1)])
