"""The conditional flow of one level: FrEIA's AllInOneBlock, given its condition as an argument."""

from __future__ import annotations

import torch
from FrEIA.modules import AllInOneBlock
from torch import Tensor, nn
from torch.nn import functional as F

from models.condition import Condition, TableCache


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = F.layer_norm(
                x.permute(0, 2, 3, 1).to(self.weight.dtype), self.normalized_shape, self.weight, self.bias, self.eps
            )
        return y.permute(0, 3, 1, 2)


class Subnet(nn.Module):
    """Predicts a coupling's coefficients: 3x3 convolution n -> n, ChannelNorm, ReLU, 3x3 convolution n -> out.

    n counts the channels of the flow's passive half and of the condition.
    """

    def __init__(self, *, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.ln = ChannelNorm(channels)
        self.conv2 = nn.Conv2d(channels, out, 3, padding=1)
        self.cache = TableCache()

    def train(self, mode: bool = True) -> Subnet:
        self.cache.clear()
        return super().train(mode)

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """`x` (B, n - C, H, W) and a condition of C channels -> (B, out, H, W)."""
        hidden = condition.convolve(x, self.conv1.weight, self.conv1.bias, self.cache)
        return self.conv2(F.relu(self.ln(hidden), inplace=True))


class CouplingBlock(AllInOneBlock):
    """FrEIA 0.2's block (affine coupling, global affine, hard permutation) with two differences.

    The condition is an argument that knows how to convolve itself, and the log-determinant is kept per position,
    (B, H, W), because the place of a low likelihood is what anomaly detection looks for. The permutation is an index
    instead of a product with a permutation matrix. Parameters and checkpoints are FrEIA's.
    """

    def __init__(self, *, channels: int, condition: int, clamp: float) -> None:
        super().__init__(
            [(channels, 1, 1)], dims_c=[(condition, 1, 1)], affine_clamping=clamp,
            subnet_constructor=lambda n, out: Subnet(channels=n, out=out),
        )  # fmt: skip

    def coefficients(self, passive: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Log-scale and shift for the active half, each (B, floor(c/2), H, W)."""
        log_scale, shift = (0.1 * self.subnet(passive, condition).to(passive.dtype)).chunk(2, 1)
        return self.clamp * log_scale.tanh(), shift

    def forward(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, c, H, W) -> the same shape, and the log-determinant per position (B, H, W)."""
        passive, active = x.split(self.splits, dim=1)
        log_scale, shift = self.coefficients(passive, condition)
        y = torch.cat([passive, active * log_scale.exp() + shift], 1)
        scale = self.global_scale_activation(self.global_scale)
        order = self.w_perm[:, :, 0, 0].argmax(1)
        return (y * scale + self.global_offset)[:, order], log_scale.sum(1) + scale.log().sum()

    def inverse(self, y: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`, with minus its log-determinant."""
        scale = self.global_scale_activation(self.global_scale)
        order = self.w_perm_inv[:, :, 0, 0].argmax(1)
        x = (y[:, order] - self.global_offset) / scale
        passive, active = x.split(self.splits, dim=1)
        log_scale, shift = self.coefficients(passive, condition)
        x = torch.cat([passive, (active - shift) * (-log_scale).exp()], 1)
        return x, -log_scale.sum(1) - scale.log().sum()


class LevelFlow(nn.Module):
    """`blocks` coupling blocks, one after the other (paper, section 3.1: parallel flows)."""

    def __init__(self, *, channels: int, condition: int, blocks: int, clamp: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CouplingBlock(channels=channels, condition=condition, clamp=clamp) for _ in range(blocks)
        )

    def forward(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """(B, c, H, W) -> latents of the same shape and the log-determinant per position (B, H, W)."""
        local = x.new_zeros(())
        for block in self.blocks:
            x, change = block(x, condition)
            local = local + change
        return x, local

    def inverse(self, z: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`, with minus its log-determinant."""
        local = z.new_zeros(())
        for block in reversed(self.blocks):
            assert isinstance(block, CouplingBlock)
            z, change = block.inverse(z, condition)
            local = local + change
        return z, local
