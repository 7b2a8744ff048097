"""AU-sPRO, the saturated per-region overlap of MVTec LOCO AD (Bergmann et al., IJCV 130, 2022, section 4).

A region A of saturation s is found to min(|found pixels of A| / s, 1): where a defect may be marked in several places,
s pixels of it are enough. The mean over all regions is integrated over the false-positive rate, of all pixels that no
region holds, from 0 to a limit, and divided by the limit. At any threshold the found pixels of a region are its
highest, so that s of them weigh 1 / s each and the rest nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from utils.metrics.seven import Curve, area_up_to, as_scores, joined, selected
from utils.metrics.sketch import RankSketch


def saturation(area: int, threshold: float, *, relative: bool) -> int:
    """Pixels that saturate a region of `area` pixels: a share of it, or a number; one at least."""
    return max(int(threshold * area) if relative else min(int(threshold), area), 1)


class SproAccumulator:
    """Collects images of one kind of defect, and the good ones, in memory of fixed size."""

    def __init__(self) -> None:
        self.regions = 0
        self.free, self.found = RankSketch(), RankSketch(columns=2)

    def add(self, heat: Tensor, regions: Sequence[tuple[Tensor, int]] = ()) -> None:
        """An image's score map (H, W), and the mask (H, W) bool and saturation in pixels of each of its regions.

        Raises:
            ValueError: a mask of another shape, or an empty one.
        """
        heat = as_scores(heat).cpu()
        marked = torch.zeros(heat.shape, dtype=torch.bool)
        for mask, saturated in regions:
            if mask.shape != heat.shape or not mask.any():
                raise ValueError(f"regions: expected masks of shape {tuple(heat.shape)} with pixels in them")
            marked |= mask
            self._add_region(selected(heat, mask), saturated)
        self.free.add(selected(heat, ~marked))

    def _add_region(self, values: Tensor, saturated: int) -> None:
        masses = torch.ones(len(values), 2, dtype=torch.float64)
        masses[:, 1] = (torch.arange(len(values)) < saturated).double() / saturated
        self.found.add(values.sort(descending=True).values, masses)
        self.regions += 1

    def merge(self, other: SproAccumulator) -> None:
        """Add what another one holds."""
        self.regions += other.regions
        self.free.merge(other.free)
        self.found.merge(other.found)

    def curve(self) -> Curve:
        """False-positive rate and mean sPRO over all thresholds, from (0, 0); empty without regions."""
        true, false = joined(self.found, self.free)
        if not self.regions or not len(false) or not false[-1] > 0:
            return Curve(x=np.zeros(0), y=np.zeros(0))
        start = torch.zeros(1, dtype=torch.float64)
        x, y = torch.cat([start, false / false[-1]]), torch.cat([start, true[:, 1] / self.regions])
        return Curve(x=x.numpy(), y=y.clamp(max=1).numpy())

    def area(self, limit: float) -> float:
        """Area under the curve up to a false-positive rate, divided by it; NaN without regions."""
        return area_up_to(self.curve(), limit)
