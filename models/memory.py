"""A memory of normal features: how far a place is from the nearest one (PatchCore, arXiv 2106.08265, section 3).

A second opinion beside the flow. A flow tells how likely a feature is under a smooth density; a memory tells whether
anything like it was ever seen. Their mistakes differ (EXPERIMENTS.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEVELS = (1, 2)  # texture and parts; finer levels repeat everywhere, coarser ones blur small defects
CHUNK = 4096  # places compared at a time


class Memory(nn.Module):
    """`size` vectors drawn at random from places of the training images, the same number from each.

    A vector holds the features of levels 1 and 2, each averaged over its 3x3 neighbourhood, on level 1's grid.
    """

    def __init__(self, *, size: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.size = size
        self.vectors: Tensor
        self.register_buffer("vectors", torch.zeros(size, sum(channels[level] for level in LEVELS)))

    @staticmethod
    def embed(features: Sequence[Tensor]) -> Tensor:
        """Features (B, c_l, H_l, W_l) of all levels -> (B, H, W, C) on level 1's grid."""
        grid = features[LEVELS[0]].shape[-2:]
        local = [F.avg_pool2d(features[level], 3, 1, 1) for level in LEVELS]
        same = [h if h.shape[-2:] == grid else F.interpolate(h, size=grid, mode="bilinear") for h in local]
        return torch.cat(same, 1).permute(0, 2, 3, 1)

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]], images: int) -> None:
        """Fill the memory from `batches` of features of `images` images in all; places repeat if they are too few."""
        share = -(-self.size // images)
        drawn = []
        for features in batches:
            for places in self.embed(features).flatten(1, 2).float():
                drawn.append(places[torch.randperm(len(places), device=places.device)[:share]])
        found = torch.cat(drawn)
        order = torch.randperm(len(found), device=found.device)
        self.vectors.copy_(found[order.repeat(-(-self.size // len(found)))[: self.size]])

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Euclidean distance to the nearest vector at each place of level 1's grid, (B, H, W)."""
        places = self.embed(features).float()
        norms, flat = self.vectors.square().sum(1), places.flatten(0, 2)
        nearest = [(norms - 2 * part @ self.vectors.T).amin(1) for part in flat.split(CHUNK)]
        return (torch.cat(nearest) + flat.square().sum(1)).clamp(min=0).sqrt().view(places.shape[:3])
