"""The conditional flow of one level: FrEIA's AllInOneBlock, given its condition as an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from FrEIA.modules import AllInOneBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.condition import Condition
from models.conditioned import ConditionedConv2d
from models.winograd import Conv3x3
from utils.run.device import full_precision, product_dtype

# Of compiled code: levels, in training (the first block's input has no gradient) and not, one image and several, maps
# of one place and larger ones, with autocast and without.
VARIANTS = 3 * 3 * 2 * 2 * 2


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.eps)


def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the channels of (B, C, H, W), in the type of `x`: what backward keeps is no larger.

    Mean and deviation are computed in single precision at least.
    """
    return normalized_rows(x, weight, bias, eps).permute(0, 3, 1, 2)


def normalized_rows(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`normalize` with the channels last, (B, H, W, C)."""
    if x.device.type != "cpu":  # kernels there want one type, and compute in float32 all the same
        weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    with full_precision(x.device):
        return F.layer_norm(x.permute(0, 2, 3, 1), weight.shape, weight, bias, eps)


def activate(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the channels of (B, C, H, W), then ReLU, in the type of `x`.

    In place, but not on the view that `normalize` gives, of whose gradient autograd would make four copies.
    """
    return F.relu(normalized_rows(x, weight, bias, eps), inplace=True).permute(0, 3, 1, 2)


def coefficients(raw: Tensor, dtype: torch.dtype, clamp: float) -> tuple[Tensor, Tensor]:
    """Log-scale within +-`clamp` and shift, each (B, a, H, W), from what the sub-network says, `raw` (B, 2 a, H, W)."""
    log_scale, shift = (0.1 * raw.to(dtype)).chunk(2, 1)
    return clamp * log_scale.tanh(), shift


def couple(x: Tensor, raw: Tensor, split: int, clamp: float, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Affine coupling and global affine of FrEIA's AllInOneBlock.

    Args:
        x: (B, c, H, W), the passive half of `split` channels first.
        raw: (B, 2 (c - split), H, W), what the sub-network says.
        scale, offset: (1, c, 1, 1).

    Returns:
        (B, c, H, W), and the coupling's log-determinant per position (B, H, W).
    """
    log_scale, shift = coefficients(raw, x.dtype, clamp)
    y = torch.cat([x[:, :split], x[:, split:] * log_scale.exp() + shift], 1)
    return y * scale + offset, log_scale.sum(1)


def compiled(function: Callable, backend: str | Callable) -> Callable:
    """`function` for any number of images and places; each size of channels has code of its own.

    PyTorch would give up, and compute as if nothing were compiled, after eight variants. There are `VARIANTS`. It would
    also take eight images of maps of eight rows for a square that must stay one.
    """
    import torch._dynamo as compiler  # takes a second
    from torch.fx.experimental import _config as shapes

    shapes.use_duck_shape = False  # type: ignore[attr-defined]
    compiler.config.recompile_limit = max(compiler.config.recompile_limit, VARIANTS)
    return torch.compile(function, dynamic=True, backend=backend)


class Permutation(torch.autograd.Function):
    """Channels in a new order; backward is the order's inverse instead of a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.permute(0, 2, 3, 1).index_select(3, order).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (order,) = ctx.saved_tensors
        return grad.permute(0, 2, 3, 1).index_select(3, order.argsort()).permute(0, 3, 1, 2), None


class Subnet(nn.Module):
    """Predicts a coupling's coefficients: 3x3 convolution n -> n, ChannelNorm, ReLU, 3x3 convolution n -> out.

    n counts the channels of the flow's passive half and of the condition.
    """

    def __init__(self, *, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = ConditionedConv2d(channels, channels)
        self.ln = ChannelNorm(channels)
        self.conv2 = Conv3x3(channels, out)
        self.activate = activate

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """`x` (B, n - C, H, W) and a condition of C channels -> (B, out, H, W)."""
        hidden = self.conv1(x, condition).to(product_dtype(self.conv1.weight))  # between convolutions no larger
        return self.conv2(self.activate(hidden, self.ln.weight, self.ln.bias, self.ln.eps))


class CouplingBlock(AllInOneBlock):
    """FrEIA 0.2's block (affine coupling, global affine, hard permutation) with two differences.

    The condition is an argument, in parts, and the log-determinant is kept per position, (B, H, W), because the place
    of a low likelihood is what anomaly detection looks for. The permutation is an index instead of a product with a
    permutation matrix. Parameters and checkpoints are FrEIA's.
    """

    def __init__(self, *, channels: int, condition: int, clamp: float) -> None:
        super().__init__(
            [(channels, 1, 1)], dims_c=[(condition, 1, 1)], affine_clamping=clamp,
            subnet_constructor=lambda n, out: Subnet(channels=n, out=out),
        )  # fmt: skip
        self.couple = couple

    def compile_parts(self, backend: str | Callable = "inductor") -> None:
        """Compile what is neither a convolution nor a look-up; all blocks of one size share the compiled code."""
        self.couple = compiled(couple, backend)
        self.subnet.activate = compiled(activate, backend)

    def forward(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """(B, c, H, W) -> the same shape, and the log-determinant per position (B, H, W)."""
        raw = self.subnet(x[:, : self.splits[0]], condition)
        scale = self.global_scale_activation(self.global_scale)
        y, local = self.couple(x, raw, self.splits[0], self.clamp, scale, self.global_offset)
        return Permutation.apply(y, self.w_perm[:, :, 0, 0].argmax(1)), local + scale.log().sum()

    def inverse(self, y: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The inverse of `forward`, with minus its log-determinant."""
        scale = self.global_scale_activation(self.global_scale)
        order = self.w_perm_inv[:, :, 0, 0].argmax(1)
        x = (y[:, order] - self.global_offset) / scale
        passive, active = x.split(self.splits, dim=1)
        log_scale, shift = coefficients(self.subnet(passive, condition), passive.dtype, self.clamp)
        x = torch.cat([passive, (active - shift) * (-log_scale).exp()], 1)
        return x, -log_scale.sum(1) - scale.log().sum()


class LevelFlow(nn.Module):
    """`blocks` coupling blocks, one after the other (paper, section 3.1: parallel flows)."""

    def __init__(self, *, channels: int, condition: int, blocks: int, clamp: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CouplingBlock(channels=channels, condition=condition, clamp=clamp) for _ in range(blocks)
        )

    def forward(self, x: Tensor, condition: Condition, *, recompute: bool = False) -> tuple[Tensor, Tensor]:
        """(B, c, H, W) -> latents of the same shape and the log-determinant per position (B, H, W).

        With `recompute` the backward pass computes each block again instead of having kept its hidden layers.
        """
        local = x.new_zeros(())
        for block in self.blocks:
            if recompute and torch.is_grad_enabled():
                x, change = checkpoint(block, x, condition, use_reentrant=False, preserve_rng_state=False)
            else:
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
