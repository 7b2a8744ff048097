"""Products of a 3x3 convolution's weight with what a condition is made of, and their gradients.

As convolution is linear, that of [x ; condition] is the sum over parts:

- codes: rows of a table (a row for each tap and code) that are looked up and added, nine for each position;
- vectors: nine products per image, added where the tap lies inside the image (zero padding cuts taps at the border);
- the encoding: one map, the same for all images, whose positions are further rows of the table;
- the straight-through gradient, which goes to the embedding as if it, and not its code, had been convolved.

A product may be computed in the lower precision that autocast asks for, like any convolution. Tables and sums are in
the precision of the weight: thousands of positions choose one row, and a gradient of that many bfloat16 terms stops
growing at 256.

Below, n counts the convolution's output channels, `own` the channels of x, which come first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from models.condition import TAPS, Condition
from models.winograd import transposed
from utils.run.device import full_precision, product_dtype


def by_tap(weight: Tensor) -> Tensor:
    """(n, C, 3, 3) -> (9, C, n), a view of channels-last memory."""
    return weight.permute(2, 3, 1, 0).flatten(0, 1)


def as_map(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H W, n) -> (B, n, H, W), channels-last."""
    return rows.unflatten(1, size).permute(0, 3, 1, 2)


def inside(length: int, like: Tensor) -> Tensor:
    """(length, 3): 1 where the tap -1, 0 or +1 of a position lies inside 0..length-1."""
    place = torch.arange(length, device=like.device)[:, None] + torch.arange(-1, 2, device=like.device)
    return ((place >= 0) & (place < length)).to(like.dtype)


def borders(size: tuple[int, int], like: Tensor) -> Tensor:
    """(H W, 9): 1 where a tap of a position lies inside the image."""
    rows, columns = (inside(length, like) for length in size)
    return (rows[:, None, :, None] * columns[None, :, None, :]).reshape(-1, TAPS)


def table_of(condition: Condition, weight: Tensor, own: int, taps: Tensor) -> Tensor:
    """The table that `table_rows` points into, (9 K + 1 [+ H W], n), from products in the precision of `taps`.

    `taps` (9, own + C, n) is `weight` by tap.
    """
    assert condition.codes is not None
    codes = condition.codes.codes
    k, q = codes.shape
    places = condition.size[0] * condition.size[1] if condition.position is not None else 0
    table = weight.new_empty(TAPS * k + 1 + places, len(weight))
    near = table[: TAPS * k].view(TAPS, k, -1)
    multiply_into(near, codes.to(taps.dtype).expand(TAPS, -1, -1), taps[:, own : own + q])
    table[TAPS * k] = 0
    if condition.position is not None:
        at = own + condition.start(condition.position_piece)
        piece = weight[:, at : at + len(condition.position)].to(taps.dtype)
        made = F.conv2d(condition.position[None].to(taps.dtype), piece, padding=1)
        table[TAPS * k + 1 :] = made[0].permute(1, 2, 0).flatten(0, 1)
    return table


def vector_products(condition: Condition, own: int, taps: Tensor) -> Tensor | None:
    """The sum over vectors of their products with each tap, (B, 9, n)."""
    made = []
    for part in condition.vectors:
        at = own + condition.start(part.piece)
        vector = part.vector.to(taps.dtype).expand(TAPS, -1, -1)
        made.append(torch.bmm(vector, taps[:, at : at + vector.shape[2]]))
    return sum(made[1:], made[0]).transpose(0, 1) if made else None


def looked_up(condition: Condition, table: Tensor, products: Tensor | None) -> Tensor:
    """The rows of each position and the vectors' products at its taps inside the image, (B, n, H, W)."""
    assert condition.codes is not None
    codes = condition.codes
    with full_precision(table.device):
        rows = F.embedding_bag(codes.rows, table, mode="sum", padding_idx=TAPS * len(codes.codes)).view(
            len(codes.indices), -1, table.shape[1]
        )
        if products is not None:
            near = borders(condition.size, rows).expand(len(rows), -1, -1)
            rows = torch.baddbmm(rows, near, products.to(rows.dtype).expand(len(rows), -1, -1))
    return as_map(rows, condition.size)


class Products(torch.autograd.Function):
    """All products of a weight with what it is convolved with: the own part, the table, the vectors' products.

    They are linear in the weight. Backward writes their gradients into one buffer instead of joining one for each.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, condition: Condition, own: int, *vectors: Tensor) -> Any:
        ctx.condition, ctx.own, ctx.dtype = condition, own, product_dtype(weight)
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)
        with full_precision(weight.device):
            taps = by_tap(weight).to(ctx.dtype)
            kept = weight[:, :own].clone(memory_format=torch.channels_last)
            return kept, table_of(condition, weight, own, taps), vector_products(condition, own, taps)

    @staticmethod
    def backward(ctx: Any, own: Tensor, table: Tensor, products: Tensor | None) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        condition, start = ctx.condition, ctx.own
        k, q = condition.codes.codes.shape
        table = table.to(ctx.dtype)  # its sums over positions are done
        grad = torch.empty_like(weight, memory_format=torch.channels_last)
        taps, end = by_tap(grad).transpose(1, 2), start + q
        grad[:, :start] = own
        near = table[: TAPS * k].view(TAPS, k, -1).transpose(1, 2)
        multiply_into(taps[..., start:end], near, condition.codes.codes.to(ctx.dtype).expand(TAPS, -1, -1))
        grad[:, end:].zero_()
        if condition.position is not None:
            at, encoding = start + condition.start(condition.position_piece), condition.position[None].to(ctx.dtype)
            shape = (len(weight), encoding.shape[1], 3, 3)
            place = as_map(table[TAPS * k + 1 :][None], condition.size)
            grad[:, at : at + shape[1]] += conv2d_weight(encoding, shape, place, padding=1)
        found: list[Tensor | None] = []
        for number, part in enumerate(condition.vectors):
            assert products is not None
            at, near = start + condition.start(part.piece), products.transpose(0, 1).to(ctx.dtype)  # (9, B, n)
            width = part.vector.shape[1]
            vector = part.vector.to(ctx.dtype).expand(TAPS, -1, -1)
            multiply_into(taps[..., at : at + width], near.transpose(1, 2), vector, add=True)
            back = None
            if ctx.needs_input_grad[3 + number]:
                mine = by_tap(weight)[:, at : at + width].transpose(1, 2).to(near.dtype)
                back = torch.bmm(near, mine).sum(0).to(part.vector.dtype)
            found.append(back)
        return (grad, None, None, *found)


class StraightThrough(torch.autograd.Function):
    """The identity on its first argument; backward also convolves back to `through`, in precision `dtype`.

    `quick`: in the way of `models/winograd.py`.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, through: Tensor, weight: Tensor, dtype: torch.dtype, quick: bool) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtypes, ctx.quick = (dtype, through.dtype), quick
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        (weight,), (dtype, through) = ctx.saved_tensors, ctx.dtypes
        if ctx.quick:
            return grad, transposed(grad, weight), None, None, None
        back = F.conv_transpose2d(grad.to(dtype), weight.to(dtype), padding=1).to(through)
        return grad, back, None, None, None


def multiply_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False) -> None:
    """Write or add `a` (9, r, s) times `b` (9, s, t) into `out` (9, r, t), without a copy where all are of one type."""
    if a.dtype == out.dtype:
        torch.baddbmm(out, a, b, beta=float(add), out=out)
    elif add:
        out += torch.bmm(a, b)
    else:
        out.copy_(torch.bmm(a, b))
