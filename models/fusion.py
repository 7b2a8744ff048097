"""The fusion flow: one two-sided affine coupling across all levels (MSFlow, arXiv 2308.15300; paper, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.condition import Condition
from models.conditioned import ConditionedConv2d
from models.flow import ChannelNorm
from utils.run.device import product_dtype

BOUND = 1e6  # outputs are clamped to +-BOUND, as in the released code

Levels = tuple[Tensor, ...]


class CrossNet(nn.Module):
    """Predicts log-scales and shifts of all levels from all levels and the top condition.

    Every level is averaged to the condition's size and concatenated with it; 3x3 convolution n -> n//4, ChannelNorm,
    ReLU, 3x3 convolution to all levels' channels, ReLU; each level's part is resized to the level
    (align_corners=True) and added to it; one 3x3 convolution per level gives the log-scale, another the shift.
    """

    def __init__(self, *, channels: Sequence[int], condition: int, out: Sequence[int]) -> None:
        super().__init__()
        n = sum(channels) + condition
        self.channels = list(channels)
        self.conv1 = ConditionedConv2d(n, max(n // 4, 1))
        self.norm = ChannelNorm(max(n // 4, 1))
        self.conv2 = nn.Conv2d(max(n // 4, 1), sum(channels), 3, padding=1)
        self.conv_s = nn.ModuleList(nn.Conv2d(c, o, 3, padding=1) for c, o in zip(channels, out, strict=True))
        self.conv_t = nn.ModuleList(nn.Conv2d(c, o, 3, padding=1) for c, o in zip(channels, out, strict=True))

    def forward(self, levels: Levels, condition: Condition) -> tuple[Levels, Levels]:
        """Levels (B, c_l, H_l, W_l) -> raw log-scales and shifts, each (B, o_l, H_l, W_l)."""
        pooled = torch.cat([averaged(x, condition.size) for x in levels], 1)
        dtype = product_dtype(self.conv1.weight)  # convolutions keep what they are given: once, and no larger
        hidden = F.relu(self.norm(self.conv1(pooled, condition).to(dtype)))
        cross = F.relu(self.conv2(hidden)).split(self.channels, 1)
        mixed = [(x + resize(part, x).to(x.dtype)).to(dtype) for x, part in zip(levels, cross, strict=True)]
        log_scales = tuple(conv(m).to(x.dtype) for conv, m, x in zip(self.conv_s, mixed, levels, strict=True))
        shifts = tuple(conv(m).to(x.dtype) for conv, m, x in zip(self.conv_t, mixed, levels, strict=True))
        return log_scales, shifts


def averaged(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, c, H, W) -> the means of equal parts of it, (B, c, *size).

    On CUDA the plain pooling adds gradients in the same order each time, the adaptive one does not.
    """
    parts = x.shape[2] // size[0], x.shape[3] // size[1]
    even = (parts[0] * size[0], parts[1] * size[1]) == x.shape[2:]
    ordered = even and torch.are_deterministic_algorithms_enabled()
    return F.avg_pool2d(x, parts) if ordered else F.adaptive_avg_pool2d(x, size)


def resize(x: Tensor, like: Tensor) -> Tensor:
    """Bilinear resize to the height and width of `like`, align_corners=True."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=True)


class FusionFlow(nn.Module):
    """A hard random permutation of each level's channels, then a two-sided coupling over all levels at once."""

    def __init__(self, *, channels: Sequence[int], condition: int, clamp: float) -> None:
        super().__init__()
        self.clamp = clamp
        first = [c // 2 for c in channels]
        second = [c - c // 2 for c in channels]
        for level, c in enumerate(channels):
            self.register_buffer(f"perm_{level}", torch.from_numpy(np.random.permutation(c)))
        self.first = first
        self.subnet_1 = CrossNet(channels=first, condition=condition, out=second)
        self.subnet_2 = CrossNet(channels=second, condition=condition, out=first)

    def permutation(self, level: int) -> Tensor:
        return getattr(self, f"perm_{level}")

    def log_scale(self, raw: Tensor) -> Tensor:
        """Soft clamp of a raw log-scale: clamp * 0.636 * atan(raw / clamp)."""
        return self.clamp * 0.636 * torch.atan(raw / self.clamp)

    def forward(self, levels: Levels, condition: Condition) -> tuple[Levels, Levels]:
        """Levels (B, c_l, H_l, W_l) -> the same shapes, and each level's log-determinant by place (B, H_l, W_l)."""
        split = [x[:, self.permutation(i)].tensor_split([self.first[i]], 1) for i, x in enumerate(levels)]
        x1, x2 = [s[0] for s in split], tuple(s[1] for s in split)
        raw_a, shift_a = self.subnet_2(x2, condition)
        log_a = [self.log_scale(r) for r in raw_a]
        y1 = tuple(s.exp() * x + t for s, x, t in zip(log_a, x1, shift_a, strict=True))
        raw_b, shift_b = self.subnet_1(y1, condition)
        log_b = [self.log_scale(r) for r in raw_b]
        y2 = [s.exp() * x + t for s, x, t in zip(log_b, x2, shift_b, strict=True)]
        out = tuple(torch.cat([a, b], 1).clamp(-BOUND, BOUND) for a, b in zip(y1, y2, strict=True))
        return out, tuple(a.sum(1) + b.sum(1) for a, b in zip(log_a, log_b, strict=True))

    def inverse(self, levels: Levels, condition: Condition) -> tuple[Levels, Levels]:
        """The inverse of `forward`, with minus its log-determinants."""
        split = [x.tensor_split([self.first[i]], 1) for i, x in enumerate(levels)]
        y1, y2 = tuple(s[0] for s in split), [s[1] for s in split]
        raw_b, shift_b = self.subnet_1(y1, condition)
        log_b = [self.log_scale(r) for r in raw_b]
        x2 = tuple((y - t) * (-s).exp() for s, y, t in zip(log_b, y2, shift_b, strict=True))
        raw_a, shift_a = self.subnet_2(x2, condition)
        log_a = [self.log_scale(r) for r in raw_a]
        x1 = [(y - t) * (-s).exp() for s, y, t in zip(log_a, y1, shift_a, strict=True)]
        out = tuple(
            torch.cat([a, b], 1)[:, self.permutation(i).argsort()] for i, (a, b) in enumerate(zip(x1, x2, strict=True))
        )
        return out, tuple(-a.sum(1) - b.sum(1) for a, b in zip(log_a, log_b, strict=True))
