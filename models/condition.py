"""What a level's flow is conditioned on, as plain data.

Almost all work of the flows is the first 3x3 convolution of each sub-network, and almost all of that convolution's
input is the condition. The condition has structure: one of K codes at each position, vectors that are constant over
the image, an encoding that is constant over the batch. `models/conditioned.py` convolves it by these parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

TAPS = 9


@dataclass(frozen=True, kw_only=True)
class CodePart:
    """Codes at each position: `indices` (B, H, W), `codes` (K, Q), on the first Q channels.

    `through` (B, T, H, W) gets the straight-through gradient of the first T <= Q channels. `rows` (B H W, 9 or 10) are
    what each position looks up in a table of products (see `table_rows`).
    """

    indices: Tensor
    codes: Tensor
    through: Tensor
    rows: Tensor

    @classmethod
    def make(cls, indices: Tensor, codes: Tensor, through: Tensor, *, placed: bool) -> CodePart:
        """With its rows worked out, once for all convolutions of a level; `placed`: there is an encoding as well."""
        return cls(indices=indices, codes=codes, through=through, rows=table_rows(indices, len(codes), placed=placed))


def table_rows(indices: Tensor, codes: int, *, placed: bool) -> Tensor:
    """The rows of a table of products that each position of `indices` (B, H, W) adds up, (B H W, 9), or 10 if `placed`.

    The table has a row for each tap and code (tap * `codes` + code), one of zeros for taps outside the image, and, if
    `placed`, one for each place of the image, where the encoding's products stand.
    """
    b, h, w = indices.shape
    outside = TAPS * codes
    padded = F.pad(indices, (1, 1, 1, 1), value=outside)
    taps = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    rows = torch.stack([(t + k * codes).clamp(max=outside) for k, t in enumerate(taps)], -1).reshape(b * h * w, TAPS)
    if not placed:
        return rows
    place = torch.arange(outside + 1, outside + 1 + h * w, device=indices.device)
    return torch.cat([rows, place.repeat(b)[:, None]], 1)


@dataclass(frozen=True, kw_only=True)
class VectorPart:
    """`vector` (B, V), constant over the image, on the channels of piece number `piece`."""

    vector: Tensor
    piece: int


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A condition on a map of `size` (H, W): a sum of parts on channels that are divided into pieces.

    Attributes:
        widths: channels of the pieces; their sum is C.
        codes: codes on the first pieces.
        map: (B, M, H, W) on the first pieces, where nothing is quantized.
        position: (P, H, W), the encoding, on piece number `position_piece`.
        vectors: vectors that are constant over the image; they may share a piece with other parts and add to them.
    """

    size: tuple[int, int]
    widths: tuple[int, ...]
    codes: CodePart | None = None
    map: Tensor | None = None
    position: Tensor | None = None
    position_piece: int = 0
    vectors: tuple[VectorPart, ...] = ()

    @classmethod
    def of_map(cls, dense: Tensor) -> Condition:
        """A condition without structure: one map (B, C, H, W)."""
        return cls(size=(dense.shape[2], dense.shape[3]), widths=(dense.shape[1],), map=dense)

    @property
    def is_map(self) -> bool:
        """Whether it is one map and nothing else."""
        return self.codes is None and self.position is None and not self.vectors

    def start(self, piece: int) -> int:
        """The first channel of a piece."""
        return sum(self.widths[:piece])

    def dense(self) -> Tensor:
        """The condition as one map (B, C, H, W)."""
        parts = []
        if self.position is not None:
            parts.append((self.position[None], self.start(self.position_piece)))
        if self.codes is not None:
            code, x = F.embedding(self.codes.indices, self.codes.codes).permute(0, 3, 1, 2), self.codes.through
            parts.append((torch.cat([x + (code[:, : x.shape[1]] - x).detach(), code[:, x.shape[1] :]], 1), 0))
        if self.map is not None:
            parts.append((self.map, 0))
        parts += [(part.vector[..., None, None], self.start(part.piece)) for part in self.vectors]
        batch, channels = parts[-1][0].shape[0], sum(self.widths)  # the encoding alone, put first, has a batch of one
        grown = [
            F.pad(x.expand(batch, -1, *self.size), (0, 0, 0, 0, at, channels - at - x.shape[1])) for x, at in parts
        ]
        return torch.stack(grown).sum(0)
