"""What a level's flow is conditioned on, and its 3x3 convolution, which uses what the condition is made of.

Almost all work of the flows is the first 3x3 convolution of each sub-network, and almost all of that convolution's
input is the condition. The condition has structure: one of K codes at each position, vectors that are constant over
the image, an encoding that is constant over the batch. As convolution is linear, it is the sum over these parts:

- codes: rows of a table (code x tap, K * 9 rows) that are looked up and added, nine for each position;
- vectors: nine products per image, added where the tap lies inside the image (zero padding cuts taps at the border);
- the encoding: one map, the same for all images;
- the straight-through gradient, which goes to the embedding as if it, and not its code, had been convolved.

`Condition.dense` is the same condition as one map; with `direct` it is convolved as such, which is the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
        if self.codes is not None:
            code, x = F.embedding(self.codes.indices, self.codes.codes).permute(0, 3, 1, 2), self.codes.through
            parts.append((torch.cat([x + (code[:, : x.shape[1]] - x).detach(), code[:, x.shape[1] :]], 1), 0))
        if self.map is not None:
            parts.append((self.map, 0))
        if self.position is not None:
            parts.append((self.position[None], starts[self.position_piece]))
        parts += [(part.vector[..., None, None], starts[part.piece]) for part in self.vectors]
        batch, channels = max(len(x) for x, _ in parts), sum(self.widths)
        grown = [
            F.pad(x.expand(batch, -1, *self.size), (0, 0, 0, 0, at, channels - at - x.shape[1])) for x, at in parts
        ]
        return torch.stack(grown).sum(0)

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, cache: TableCache) -> Tensor:
        """3x3 convolution of [`x` ; condition], zero padding 1.

        Args:
            x: (B, c, H, W), what is conditioned.
            weight: (n, c + C, 3, 3).
            bias: (n,).
            cache: belongs to `weight`.
        """
        if self.direct:
            return F.conv2d(torch.cat([x, self.dense().to(x.dtype)], 1), weight, bias, padding=1)
        # One split, so that backward joins the gradients of all pieces once.
        own, *pieces = weight.split([x.shape[1], *self.widths], 1)
        total = F.conv2d(x, own, bias, padding=1)
        if self.vectors:
            total = total + self._vectors(pieces)
        if self.position is not None:
            encoding, piece = self.position[None], pieces[self.position_piece]
            make = partial(F.conv2d, encoding, piece, padding=1)
            total = total + cache.get("position", (weight, encoding), make)
        if self.map is not None:
            total = total + F.conv2d(self.map, pieces[0], padding=1)
        if self.codes is not None:
            total = total + self._codes(self.codes, pieces, cache)
            if self.codes.through.requires_grad:
                start, width = x.shape[1], self.codes.through.shape[1]
                total = _StraightThrough.apply(total, self.codes.through, weight[:, start : start + width].detach())
        return total

    def _vectors(self, pieces: Sequence[Tensor]) -> Tensor:
        """The sum over taps inside the image of each tap's product with the vectors."""
        products = [torch.einsum("bv,nvij->bnij", part.vector, pieces[part.piece]) for part in self.vectors]
        total = sum(products[1:], products[0])
        rows, columns = (inside(length, total) for length in self.size)
        return torch.einsum("bnij,yi,xj->bnyx", total, rows, columns)

    def _codes(self, part: CodePart, pieces: Sequence[Tensor], cache: TableCache) -> Tensor:
        """The sum of nine table rows for each position; where positions are fewer than codes, the plain convolution."""
        b, h, w = part.indices.shape
        count = next(i for i in range(len(self.widths) + 1) if sum(self.widths[:i]) == part.codes.shape[1])
        wide = pieces[:count]
        if torch.is_grad_enabled() and b * h * w < len(part.codes):
            dense = F.embedding(part.indices, part.codes).permute(0, 3, 1, 2)
            maps = [F.conv2d(d, p, padding=1) for d, p in zip(dense.split(self.widths[:count], 1), wide, strict=True)]
            return sum(maps[1:], maps[0])
        table = cache.get("codes", (*wide, part.codes), partial(code_table, part.codes, wide))
        rows = F.embedding_bag(part.neighbours, table, mode="sum", padding_idx=len(table) - 1)
        return rows.view(b, h, w, -1).permute(0, 3, 1, 2)


def code_table(codes: Tensor, pieces: Sequence[Tensor]) -> Tensor:
    """Each code's product with each tap: `codes` (K, Q), pieces (n, Q_i, 3, 3) -> (9 K + 1, n), the last row zero."""
    n, tables = len(pieces[0]), []
    for part, piece in zip(codes.split([p.shape[1] for p in pieces], 1), pieces, strict=True):
        tables.append(torch.einsum("kq,nqt->tkn", part, piece.flatten(2)))
    return F.pad(sum(tables[1:], tables[0]).reshape(-1, n), (0, 0, 0, 1))


def inside(length: int, like: Tensor) -> Tensor:
    """(length, 3): 1 where the tap -1, 0 or +1 of a position lies inside 0..length-1."""
    place = torch.arange(length, device=like.device)[:, None] + torch.arange(-1, 2, device=like.device)
    return ((place >= 0) & (place < length)).to(like.dtype)
