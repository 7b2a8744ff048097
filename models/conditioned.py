"""The 3x3 convolution of what is conditioned together with its condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.condition import Condition
from models.products import (
    Products,
    StraightThrough,
    as_map,
    borders,
    by_tap,
    looked_up,
    table_of,
    vector_products,
)
from models.winograd import convolve, worthwhile
from utils.run.device import full_precision, product_dtype


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A value and what it was made of: `sources`, which share memory with the originals, and their versions then.

    As they hold on to that memory, no other tensor can have come to lie there meanwhile.
    """

    value: Tensor
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]

    def is_of(self, sources: tuple[Tensor, ...]) -> bool:
        """Whether it is what would be made of `sources` now: the same memory, not written to since."""
        return (
            [place(s) for s in self.sources] == [place(s) for s in sources]
            and self.versions == tuple(s._version for s in sources)
        )  # fmt: skip


def place(x: Tensor) -> tuple[Any, ...]:
    """The memory that a tensor is a view of."""
    return x.device, x.data_ptr(), x.dtype, x.shape, x.stride()


class ConditionedConv2d(nn.Conv2d):
    """3x3 convolution, zero padding 1, of [x ; condition], in the form that suits what the condition is made of.

    A condition that is one map is joined with x and convolved directly: the reference. One with structure is convolved
    by its parts (`models/products.py`): by a table of products with its codes or, where there are no codes or fewer
    positions than codes, piece by piece.

    In evaluation what depends on weights, codes and encoding alone is kept, from `eval()` until `train()` or a forward
    that records gradients: a step may follow, and fused optimisers change weights without a new version. Any other
    change shows in a source's memory or version. (One through `.data` in place does not; autograd misses it, too.)
    Copies and pickles begin with nothing kept.

    Args:
        channels: channels of x and condition together, fastest in channels-last memory.
        out: output channels, n.
    """

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out, 3, padding=1)
        self._keeps = False
        self._kept: Kept | None = None

    def forward(self, x: Tensor, condition: Condition) -> Tensor:  # type: ignore[override]
        """`x` (B, c, H, W) and a condition of C channels -> (B, n, H, W)."""
        recorded, codes = torch.is_grad_enabled(), condition.codes
        if recorded:
            self._keep_nothing()
        if condition.is_map:
            assert condition.map is not None
            return super().forward(torch.cat([x, condition.map.to(x.dtype)], 1))
        if codes is None or (recorded and codes.indices.numel() < len(codes.codes)):
            total = self._by_pieces(x, condition)
        else:
            total = self._by_table(x, condition, recorded=recorded)
        if codes is not None and recorded and codes.through.requires_grad:
            weight = self.weight[:, x.shape[1] : x.shape[1] + codes.through.shape[1]].detach()
            quick = worthwhile(total, weight.transpose(0, 1))
            total = StraightThrough.apply(total, codes.through, weight, product_dtype(weight), quick)
        return total

    def _by_table(self, x: Tensor, condition: Condition, *, recorded: bool) -> Tensor:
        assert condition.codes is not None
        own, vectors = x.shape[1], [part.vector for part in condition.vectors]
        if recorded:
            weight, table, products = Products.apply(self.weight, condition, own, *vectors)
        else:
            weight, taps = self.weight[:, :own], by_tap(self.weight)
            with full_precision(self.weight.device):  # a few rows each: rounding the weights takes longer
                products = vector_products(condition, own, taps)
            position = () if condition.position is None else (condition.position,)
            make = partial(table_of, condition, self.weight, own, taps)
            table = self._kept_or_made((self.weight, condition.codes.codes, *position), make)
        return convolve(x, weight, self.bias) + looked_up(condition, table, products)

    def _by_pieces(self, x: Tensor, condition: Condition) -> Tensor:
        """Without a table: a plain convolution of the map, or of the codes where there are fewer positions than codes.

        One split of the weights, so that backward joins the gradients of all pieces once.
        """
        own, *pieces = self.weight.split([x.shape[1], *condition.widths], 1)
        total = F.conv2d(x, own, self.bias, padding=1).to(self.weight.dtype)
        for part in condition.vectors:
            products = torch.einsum("bv,nvij->bijn", part.vector, pieces[part.piece]).flatten(1, 2)
            total = total + as_map(borders(condition.size, products) @ products, condition.size)
        if condition.position is not None:
            encoding, piece = condition.position[None], pieces[condition.position_piece]
            total = total + self._kept_or_made((self.weight, encoding), partial(F.conv2d, encoding, piece, padding=1))
        dense = condition.map
        if condition.codes is not None:
            dense = F.embedding(condition.codes.indices, condition.codes.codes).permute(0, 3, 1, 2)
        if dense is not None:
            at = 0
            for piece in pieces:
                if at < dense.shape[1]:
                    total = total + F.conv2d(dense[:, at : at + piece.shape[1]], piece, padding=1)
                at += piece.shape[1]
        return total

    def _kept_or_made(self, sources: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, which depends on `sources` alone; in full precision if it is kept, as it serves any later.

        Traced and inference tensors have no versions.
        """
        if not self._keeps or torch.compiler.is_compiling() or any(s.is_inference() for s in sources):
            return make()
        kept = self._kept  # read once: another thread may put its own there
        if kept is None or not kept.is_of(sources):
            aliases, versions = tuple(s.detach() for s in sources), tuple(s._version for s in sources)
            with full_precision(self.weight.device):
                kept = self._kept = Kept(value=make(), sources=aliases, versions=versions)
        return kept.value

    def _keep_nothing(self) -> None:
        self._keeps, self._kept = False, None

    def train(self, mode: bool = True) -> ConditionedConv2d:
        if mode:
            self._keep_nothing()
        self._keeps = not mode
        return super().train(mode)

    def __getstate__(self) -> Mapping[str, Any]:
        return self.__dict__ | {"_kept": None}
