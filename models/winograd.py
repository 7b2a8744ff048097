"""3x3 convolutions of large maps on a CPU with a quarter of the multiplications: Winograd's F(4x4, 3x3).

Lavin and Gray, Fast Algorithms for Convolutional Neural Networks, arXiv 1509.09308, section 4.1. The map is cut into
windows of 6x6 that overlap by two; with V = B' d B of a window d and U = G w G' of a weight w, its 4x4 outputs are
A' (U * V) A, and all windows and channels together make 36 matrix products. Exact but for rounding, which is about
five times that of the direct sum (7e-6 instead of 1.4e-6 of the largest output, with a thousand channels).

T counts the windows of some images, C channels in, N channels out; maps lie channels-last in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from utils.run.device import product_dtype

TILE, POINTS = 4, 6  # outputs and inputs of a window's side
WEIGHT = (
    (1 / 4, 0.0, 0.0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6), (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6), (0.0, 0.0, 1.0),
)  # fmt: skip  # G
CHANNELS = 48  # harmonic sum of channels in and out above which the products outweigh the transforms
PLACES = 2048  # positions in a training batch above which they outweigh the weight's transform
EVALUATED = 512  # positions of an image in evaluation: what is said of it must not depend on its batch
AT_ONCE = 128  # windows that are transformed at once, so that buffers stay small and products large enough


def worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether `x` (B, C, H, W) had better be convolved with `weight` (N, C, 3, 3) in this way.

    Graphs that are traced for other programs keep plain convolutions.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or product_dtype(weight) != torch.float32:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    out, channels = weight.shape[:2]
    if out * channels < CHANNELS * (out + channels):
        return False
    places = x.shape[2] * x.shape[3]
    return x.shape[0] * places >= PLACES if torch.is_grad_enabled() else places >= EVALUATED


class Winograd(torch.autograd.Function):
    """The convolution of `x` (B, C, H, W), zero padding 1, with a weight (N, C, 3, 3) and a bias (N,) or none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        found = multiplied(x, weight_points(weight).permute(1, 2, 0))
        return (found if bias is None else found.add_(bias)).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            transposed(grad, weight) if needed[0] else None,
            weight_gradient(x, grad) if needed[1] else None,
            grad.sum((0, 2, 3)) if needed[2] else None,
        )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution with zero padding 1 in the way that is quicker: (B, C, H, W), (N, C, 3, 3) -> (B, N, H, W)."""
    return Winograd.apply(x, weight, bias) if worthwhile(x, weight) else F.conv2d(x, weight, bias, padding=1)


class Conv3x3(nn.Conv2d):
    """3x3 convolution with zero padding 1, in the way that is quicker."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, H, W)."""
        return convolve(x, self.weight, self.bias)


def tiles(size: Sequence[int]) -> tuple[int, int]:
    """Windows in a column and in a row of a map of `size` (H, W)."""
    return -(-size[0] // TILE), -(-size[1] // TILE)


def into_points(d: Sequence[Tensor], out: Tensor) -> None:
    """Write B' d of six slices into `out`, six of the same shape."""
    a, b = torch.sub(d[4], d[2], alpha=4), torch.sub(d[3], d[1], alpha=4)
    torch.add(a, b, out=out[1])
    torch.sub(a, b, out=out[2])
    torch.sub(a, d[2], out=out[0]).add_(d[0], alpha=4)
    torch.sub(d[4], d[2], out=a)
    torch.sub(d[3], d[1], out=b)
    torch.add(a, b, alpha=2, out=out[3])
    torch.sub(a, b, alpha=2, out=out[4])
    torch.sub(d[5], d[3], out=out[5]).sub_(b, alpha=4)


def from_points(m: Tensor, out: Tensor) -> None:
    """Write A' m of six slices into `out`, four of the same shape."""
    a, b, c, d = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    out[0].copy_(torch.add(a, c).add_(m[0]))
    out[1].copy_(torch.add(b, d, alpha=2))
    out[2].copy_(a.add_(c, alpha=4))
    out[3].copy_(b.add_(d, alpha=8).add_(m[5]))


def to_points(y: Sequence[Tensor], out: Tensor) -> None:
    """Write A y of four slices into `out`, six of the same shape: the transpose of `from_points`."""
    a, b = y[0] + y[2], y[1] + y[3]
    out[0].copy_(y[0])
    torch.add(a, b, out=out[1])
    torch.sub(a, b, out=out[2])
    torch.add(y[0], y[2], alpha=4, out=a)
    torch.add(y[1], y[3], alpha=4, out=b)
    torch.add(a, b, alpha=2, out=out[3])
    torch.sub(a, b, alpha=2, out=out[4])
    out[5].copy_(y[3])


def padded(x: Tensor, before: int) -> Tensor:
    """(B, C, H, W) -> (B, H', W', C) that holds whole windows, zeros around it, `before` of them first."""
    b, c, h, w = x.shape
    rows, columns = (TILE * n + 2 * before for n in tiles((h, w)))
    wide = x.new_zeros(b, rows, columns, c)
    wide[:, before : before + h, before : before + w] = x.permute(0, 2, 3, 1)
    return wide


def transformed(wide: Tensor, size: tuple[int, int], into: Callable[..., None], count: int, out: Tensor) -> Tensor:
    """Write the points (6 columns, 6 rows, B, rows, columns, C) of all windows of `wide` into `out`, (36, T, C).

    `into` makes six of `count` slices that lie `TILE` apart.
    """
    (down, across), (b, _, columns, c) = size, wide.shape
    rows = wide.new_empty(POINTS, down, columns, c)
    points = out.view(POINTS, POINTS, b, down, across, c)
    for image in range(b):
        into([wide[image, i : i + TILE * (down - 1) + 1 : TILE] for i in range(count)], rows)
        into([rows[:, :, j : j + TILE * (across - 1) + 1 : TILE] for j in range(count)], points[:, :, image])
    return out


def windows(x: Tensor, out: Tensor) -> Tensor:
    """V of all windows of `x` (B, C, H, W), zero padding 1, in `out` (36, T, C)."""
    return transformed(padded(x, 1), tiles(x.shape[2:]), into_points, POINTS, out)


def outputs_back(grad: Tensor, out: Tensor) -> Tensor:
    """A y A' of the gradients y of all windows' outputs, `grad` (B, N, H, W), in `out` (36, T, N)."""
    return transformed(padded(grad, 0), tiles(grad.shape[2:]), to_points, TILE, out)


def outputs(points: Tensor, batch: int, size: tuple[int, int]) -> Tensor:
    """(36, T, N) -> the map that they are the points of, (B, H, W, N)."""
    (down, across), n = tiles(size), points.shape[2]
    points = points.view(POINTS, POINTS, batch, down, across, n)
    half = points.new_empty(TILE, POINTS, batch, down, across, n)
    from_points(points, half)
    whole = points.new_empty(batch, down, TILE, across, TILE, n)
    from_points(half.transpose(0, 1), whole.permute(2, 4, 0, 1, 3, 5))
    return whole.view(batch, TILE * down, TILE * across, n)[:, : size[0], : size[1]]


def weight_matrix(like: Tensor) -> Tensor:
    """(36, 9): from a weight's taps to its points, the columns' first."""
    g = torch.tensor(WEIGHT, dtype=like.dtype)
    return torch.einsum("ia,jb->jiab", g, g).reshape(POINTS * POINTS, 9)


def weight_points(weight: Tensor, *, turned: bool = False) -> Tensor:
    """U of (N, C, 3, 3), or of it `turned` by half a circle, (N, 36, C)."""
    rows, matrix = weight.permute(0, 2, 3, 1).flatten(1, 2), weight_matrix(weight)
    return torch.bmm((matrix.flip(1) if turned else matrix).expand(len(rows), -1, -1), rows)


def at_once(x: Tensor) -> int:
    """Images whose windows are transformed together, a divisor of those that there are."""
    down, across = tiles(x.shape[2:])
    fitting = [n for n in range(1, len(x) + 1) if len(x) % n == 0 and n * down * across <= AT_ONCE]
    return max(fitting, default=1)


def room(x: Tensor, images: int) -> Tensor:
    """For the points of so many images of `x` (B, C, H, W), (36, T, C)."""
    down, across = tiles(x.shape[2:])
    return x.new_empty(POINTS * POINTS, images * down * across, x.shape[1])


def multiplied(x: Tensor, points: Tensor) -> Tensor:
    """`x` (B, C, H, W), zero padding 1, convolved with the weight of `points` (36, C, N) -> (B, H, W, N)."""
    size, step = (x.shape[2], x.shape[3]), at_once(x)
    found, mine = x.new_empty(len(x), *size, points.shape[2]), room(x, step)
    theirs = x.new_empty(*mine.shape[:2], points.shape[2])
    for first in range(0, len(x), step):
        torch.bmm(windows(x[first : first + step], mine), points, out=theirs)
        found[first : first + step] = outputs(theirs, step, size)
    return found


def transposed(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the convolution's input, (B, C, H, W), from `grad` (B, N, H, W) and (N, C, 3, 3)."""
    return multiplied(grad, weight_points(weight, turned=True).transpose(0, 1)).permute(0, 3, 1, 2)


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """The gradient of the weight, (N, C, 3, 3), from the input (B, C, H, W) and `grad` (B, N, H, W)."""
    n, c, step = grad.shape[1], x.shape[1], at_once(x)
    total, mine, theirs = x.new_zeros(POINTS * POINTS, n, c), room(x, step), room(grad, step)
    for first in range(0, len(x), step):
        part = slice(first, first + step)
        back, seen = outputs_back(grad[part], theirs), windows(x[part], mine)
        torch.baddbmm(total, back.transpose(1, 2), seen, out=total)
    taps = weight_matrix(x).T @ total.view(POINTS * POINTS, n * c)
    return taps.view(3, 3, n, c).permute(2, 3, 0, 1)
