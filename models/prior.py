"""The mixed-Gaussian prior: every concept has its own Gaussian in latent space (paper, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.run.device import full_precision

UNIT = math.log(math.e - 1)  # softplus(UNIT) = 1


class MixedGaussian(nn.Module):
    """Maps each level's latents from N(shift(p), scale(p)^2) to N(0, I), p being the image's concept (B, dim).

    z <- (z - shift) / scale. Ours: scale = softplus(linear(p) + UNIT), positive and near one at the start, and
    -H W sum(log scale) is counted. "released": the published scale sqrt(linear(p)^2 + 1e-8), its log-determinant left
    out as in the released code (method section 6).
    """

    def __init__(self, *, dim: int, channels: Sequence[int], released: bool = False) -> None:
        super().__init__()
        self.released = released
        self.shift = nn.ModuleList(nn.Linear(dim, c) for c in channels)
        self.scale = nn.ModuleList(nn.Linear(dim, c) for c in channels)
        if not released:
            for layer in [*self.shift, *self.scale]:
                nn.init.normal_(layer.weight, std=1e-3)
                nn.init.zeros_(layer.bias)

    def parameters_of(self, level: int, concept: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale of a level, each (B, c_l)."""
        with full_precision(concept.device):
            concept = concept.to(torch.promote_types(concept.dtype, torch.float32))  # without codebooks it may be less
            shift, raw = self.shift[level](concept), self.scale[level](concept)
        scale = (raw.square() + 1e-8).sqrt() if self.released else F.softplus(raw + UNIT)
        return shift, scale

    def forward(self, level: int, z: Tensor, concept: Tensor) -> tuple[Tensor, Tensor]:
        """Standardized latents (B, c_l, H, W) and the log-determinant per position, (B, 1, 1)."""
        shift, scale = self.parameters_of(level, concept)
        local = -scale.log().sum(1) if not self.released else torch.zeros_like(scale[:, 0])
        return (z - shift[..., None, None]) / scale[..., None, None], local[:, None, None]

    def inverse(self, level: int, z: Tensor, concept: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`, with minus its log-determinant."""
        shift, scale = self.parameters_of(level, concept)
        local = scale.log().sum(1) if not self.released else torch.zeros_like(scale[:, 0])
        return z * scale[..., None, None] + shift[..., None, None], local[:, None, None]
