"""What a level's flow is conditioned on, and its 3x3 convolution, which uses what the condition is made of.

Almost all work of the flows is the first 3x3 convolution of each sub-network, and almost all of that convolution's
input is the condition. The condition has structure: one of K codes at each position, vectors that are constant over
the image, an encoding that is constant over the batch. As convolution is linear, it is the sum over these parts:

- codes: rows of a table (tap x code, 9 K rows) that are looked up and added, nine for each position;
- vectors: nine products per image, added where the tap lies inside the image (zero padding cuts taps at the border);
- the encoding: one map, the same for all images, whose positions are further rows of the table;
- the straight-through gradient, which goes to the embedding as if it, and not its code, had been convolved.

`Condition.dense` is the same condition as one map; with `direct` it is convolved as such, which is the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

TAPS = 9


@dataclass(frozen=True, kw_only=True)
class CodePart:
    """Codes at each position: `indices` (B, H, W), `codes` (K, Q), on the first Q channels.

    `through` (B, T, H, W) gets the straight-through gradient of the first T <= Q channels. `neighbours` (B H W, 9) are
    the table's rows for each position, K * 9 standing for a tap outside the image.
    """

    indices: Tensor
    codes: Tensor
    through: Tensor
    neighbours: Tensor

    @classmethod
    def make(cls, indices: Tensor, codes: Tensor, through: Tensor) -> CodePart:
        """With the neighbours worked out; all blocks of a level share them."""
        b, h, w = indices.shape
        outside = TAPS * len(codes)
        padded = F.pad(indices, (1, 1, 1, 1), value=outside)
        taps = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
        rows = torch.stack([(t + k * len(codes)).clamp(max=outside) for k, t in enumerate(taps)], -1)
        return cls(indices=indices, codes=codes, through=through, neighbours=rows.reshape(b * h * w, TAPS))


@dataclass(frozen=True, kw_only=True)
class VectorPart:
    """`vector` (B, V), constant over the image, on the channels of piece number `piece`."""

    vector: Tensor
    piece: int


class TableCache:
    """Keeps what depends on weights and codes alone while no gradients are recorded.

    A kept value is used only as long as its sources are unchanged: same memory, same version, same shape.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Any, Tensor]] = {}

    def get(self, name: str, sources: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        if torch.is_grad_enabled():
            return make()
        key = tuple((s.data_ptr(), s._version, s.shape, s.dtype, s.device) for s in sources)
        if name not in self._kept or self._kept[name][0] != key:
            self._kept[name] = (key, make())
        return self._kept[name][1]

    def clear(self) -> None:
        self._kept.clear()


class _StraightThrough(torch.autograd.Function):
    """The identity on its first argument; backward also convolves back to `through`."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, through: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = through.dtype
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        return grad, F.conv_transpose2d(grad, weight.to(grad.dtype), padding=1).to(ctx.dtype), None


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A condition on a map of `size` (H, W): a sum of parts on channels that are divided into pieces.

    Attributes:
        widths: channels of the pieces; their sum is C.
        codes: codes on the first pieces.
        map: (B, M, H, W) on the first piece, where nothing is quantized.
        position: (P, H, W), the encoding, on piece number `position_piece`.
        vectors: vectors that are constant over the image; they may share a piece with other parts and add to them.
        direct: convolve the dense map instead of the parts.
    """

    size: tuple[int, int]
    widths: tuple[int, ...]
    codes: CodePart | None = None
    map: Tensor | None = None
    position: Tensor | None = None
    position_piece: int = 0
    vectors: tuple[VectorPart, ...] = ()
    direct: bool = False

    def dense(self) -> Tensor:
        """The condition as one map (B, C, H, W)."""
        starts = [sum(self.widths[:i]) for i in range(len(self.widths))]
        parts = []
        if self.position is not None:
            parts.append((self.position[None], starts[self.position_piece]))
        if self.codes is not None:
            code, x = F.embedding(self.codes.indices, self.codes.codes).permute(0, 3, 1, 2), self.codes.through
            parts.append((torch.cat([x + (code[:, : x.shape[1]] - x).detach(), code[:, x.shape[1] :]], 1), 0))
        if self.map is not None:
            parts.append((self.map, 0))
        parts += [(part.vector[..., None, None], starts[part.piece]) for part in self.vectors]
        batch, channels = parts[-1][0].shape[0], sum(self.widths)  # the encoding alone, put first, has a batch of one
        grown = [
            F.pad(x.expand(batch, -1, *self.size), (0, 0, 0, 0, at, channels - at - x.shape[1])) for x, at in parts
        ]
        return torch.stack(grown).sum(0)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, cache: TableCache) -> Tensor:
        """3x3 convolution of [`x` ; condition], zero padding 1.

        Args:
            x: (B, c, H, W), what is conditioned.
            weight: (n, c + C, 3, 3), fastest in channels-last memory.
            bias: (n,).
            cache: belongs to `weight`.
        """
        if self.direct:
            return F.conv2d(torch.cat([x, self.dense().to(x.dtype)], 1), weight, bias, padding=1)
        if self.codes is None:
            return self._by_pieces(x, weight, bias, cache)
        part, recorded = self.codes, torch.is_grad_enabled()
        if recorded and part.indices.numel() < len(part.codes):
            total = self._by_pieces(x, weight, bias, cache)
        else:
            vectors = [v.vector for v in self.vectors]
            if recorded:
                own, table, products = _Products.apply(weight, self, x.shape[1], *vectors)
            else:
                taps = by_tap(weight)
                own, products = weight[:, : x.shape[1]], self.products(taps, x.shape[1])
                table = cache.get("table", self._sources(weight), partial(self.table, taps, weight, x.shape[1]))
            total = F.conv2d(x, own, bias, padding=1) + self._looked_up(table, products)
        if part.through.requires_grad and recorded:
            start, width = x.shape[1], part.through.shape[1]
            total = _StraightThrough.apply(total, part.through, weight[:, start : start + width].detach())
        return total

    def _by_pieces(self, x: Tensor, weight: Tensor, bias: Tensor | None, cache: TableCache) -> Tensor:
        """Without a table: a plain convolution of the map, or of the codes where there are fewer positions than codes.

        One split of the weights, so that backward joins the gradients of all pieces once.
        """
        own, *pieces = weight.split([x.shape[1], *self.widths], 1)
        total = F.conv2d(x, own, bias, padding=1)
        for part in self.vectors:
            products = torch.einsum("bv,nvij->bijn", part.vector, pieces[part.piece]).flatten(1, 2)
            total = total + as_map(self.borders(products) @ products, self.size)
        if self.position is not None:
            encoding, piece = self.position[None], pieces[self.position_piece]
            make = partial(F.conv2d, encoding, piece, padding=1)
            total = total + cache.get("position", (weight, encoding), make)
        dense = self.map
        if self.codes is not None:
            dense = F.embedding(self.codes.indices, self.codes.codes).permute(0, 3, 1, 2)
        if dense is not None:
            at = 0
            for piece in pieces:
                if at < dense.shape[1]:
                    total = total + F.conv2d(dense[:, at : at + piece.shape[1]], piece, padding=1)
                at += piece.shape[1]
        return total

    def _looked_up(self, table: Tensor, products: Tensor | None) -> Tensor:
        """The rows of each position and the vectors' products at its taps inside the image, (B, n, H, W)."""
        assert self.codes is not None
        outside = TAPS * len(self.codes.codes)
        rows = F.embedding_bag(self.rows, table, mode="sum", padding_idx=outside).view(
            len(self.codes.indices), -1, table.shape[1]
        )
        if products is not None:
            borders = self.borders(products).expand(len(rows), -1, -1)
            rows = torch.baddbmm(rows, borders, products.to(rows.dtype).expand(len(rows), -1, -1))
        return as_map(rows, self.size)

    @cached_property
    def rows(self) -> Tensor:
        """The table's rows for each position, (B H W, 9), or (B H W, 10) with the encoding's."""
        assert self.codes is not None
        near, first = self.codes.neighbours, TAPS * len(self.codes.codes) + 1
        if self.position is None:
            return near
        place = torch.arange(first, first + self.size[0] * self.size[1], device=near.device)
        return torch.cat([near, place.repeat(len(self.codes.indices))[:, None]], 1)

    def borders(self, like: Tensor) -> Tensor:
        """(H W, 9): 1 where a tap of a position lies inside the image."""
        rows, columns = (inside(length, like) for length in self.size)
        return (rows[:, None, :, None] * columns[None, :, None, :]).reshape(-1, TAPS)

    def _start(self, piece: int, own: int) -> int:
        """The first channel of a piece, after `own` channels of what is conditioned."""
        return own + sum(self.widths[:piece])

    def _sources(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What the table depends on."""
        assert self.codes is not None
        return (weight, self.codes.codes) + (() if self.position is None else (self.position,))

    def table(self, taps: Tensor, weight: Tensor, own: int) -> Tensor:
        """Each code's product with each tap, a row of zeros, and the encoding's convolution: (9 K + 1 [+ H W], n)."""
        assert self.codes is not None
        k, q = self.codes.codes.shape
        count = TAPS * k + 1 + (self.size[0] * self.size[1] if self.position is not None else 0)
        table = taps.new_empty(count, taps.shape[2])
        codes = self.codes.codes.to(taps.dtype).expand(TAPS, -1, -1)
        torch.bmm(codes, taps[:, own : own + q], out=table[: TAPS * k].view(TAPS, k, -1))
        table[TAPS * k] = 0
        if self.position is not None:
            at = self._start(self.position_piece, own)
            piece = weight[:, at : at + len(self.position)]
            made = F.conv2d(self.position[None], piece, padding=1)
            table[TAPS * k + 1 :] = made[0].permute(1, 2, 0).flatten(0, 1)
        return table

    def products(self, taps: Tensor, own: int) -> Tensor | None:
        """The sum over vectors of their products with each tap, (B, 9, n)."""
        made = []
        for part in self.vectors:
            at = self._start(part.piece, own)
            vector = part.vector.to(taps.dtype).expand(TAPS, -1, -1)
            made.append(torch.bmm(vector, taps[:, at : at + vector.shape[2]]))
        return sum(made[1:], made[0]).transpose(0, 1) if made else None


class _Products(torch.autograd.Function):
    """All products of a weight with what it is convolved with: the own part, the table, the vectors' products.

    They are linear in the weight. Backward writes their gradients into one buffer instead of joining one for each.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, condition: Condition, own: int, *vectors: Tensor) -> Any:
        ctx.condition, ctx.own = condition, own
        ctx.save_for_backward(weight)
        taps = by_tap(weight)
        if torch.is_autocast_enabled(weight.device.type):
            taps = taps.to(torch.get_autocast_dtype(weight.device.type))
        kept = weight[:, :own].clone(memory_format=torch.channels_last)
        products = condition.products(taps, own)
        ctx.set_materialize_grads(False)
        return kept, condition.table(taps, weight, own), products

    @staticmethod
    def backward(ctx: Any, own: Tensor, table: Tensor, products: Tensor | None) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        condition, start = ctx.condition, ctx.own
        codes = condition.codes.codes
        k, q = codes.shape
        grad = torch.empty_like(weight, memory_format=torch.channels_last)
        taps, end = by_tap(grad).transpose(1, 2), start + q
        grad[:, :start] = own
        near = table[: TAPS * k].view(TAPS, k, -1).transpose(1, 2)
        _product(taps[..., start:end], near, codes, add=False)
        grad[:, end:].zero_()
        if condition.position is not None:
            at, encoding = condition._start(condition.position_piece, start), condition.position[None]
            shape = (len(weight), encoding.shape[1], 3, 3)
            place = as_map(table[TAPS * k + 1 :][None], condition.size).to(encoding.dtype)
            grad[:, at : at + shape[1]] += conv2d_weight(encoding, shape, place, padding=1)
        found: list[Tensor | None] = []
        for number, part in enumerate(condition.vectors):
            assert products is not None
            at, near = condition._start(part.piece, start), products.transpose(0, 1)  # (9, B, n)
            width = part.vector.shape[1]
            _product(taps[..., at : at + width], near.transpose(1, 2), part.vector, add=True)
            back = None
            if ctx.needs_input_grad[3 + number]:
                mine = by_tap(weight)[:, at : at + width].transpose(1, 2).to(near.dtype)
                back = torch.bmm(near, mine).sum(0).to(part.vector.dtype)
            found.append(back)
        return (grad, None, None, *found)


def _product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """Write or add `a` (9, n, R) times `b` (R, V) into the view `out` (9, n, V), without a copy of one precision."""
    b = b.to(a.dtype).expand(TAPS, -1, -1)
    if a.dtype == out.dtype:
        torch.baddbmm(out, a, b, beta=float(add), out=out)
    elif add:
        out += torch.bmm(a, b)
    else:
        out.copy_(torch.bmm(a, b))


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
