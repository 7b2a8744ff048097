"""What a level's flow is conditioned on, and its 3x3 convolution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The condition of a level as a map, `dense` (B, C, H, W)."""

    dense: Tensor

    @property
    def channels(self) -> int:
        return self.dense.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the level."""
        return self.dense.shape[2], self.dense.shape[3]

    def convolve(self, weight: Tensor) -> Tensor:
        """3x3 convolution with `weight` (n, C, 3, 3), zero padding 1, no bias -> (B, n, H, W)."""
        return F.conv2d(self.dense, weight, padding=1)
