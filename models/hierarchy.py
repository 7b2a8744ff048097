"""Hierarchical quantization: the image's concept, then a pattern at each position (paper, sections 3.2 and 3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.codebook import Codebook
from models.condition import CodePart, Condition, VectorPart
from models.norm import BatchNorm1d, BatchNorm2d

LEVELS = 3  # levels with a flow; the top one follows them


@dataclass(frozen=True, kw_only=True)
class ConditionSet:
    """Conditions of the three levels and of the top, and what they were made of.

    `concept` (B, D) with the straight-through gradient, `concept_index` (B,) or None without codebooks, `maps` four
    conditions, `patterns` four index maps (B, H_l, W_l) or none, `commitment` the sum over all codebooks.
    """

    concept: Tensor
    concept_index: Tensor | None
    maps: tuple[Condition, ...]
    patterns: tuple[Tensor, ...]
    commitment: Tensor


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """`kind`: "residual", "naive", "concept" (CPC only) or "none" (no codebooks); `concepts` and `patterns`: codes of
    the CPC and of each CSPC; `released`: released codebook updates."""

    kind: str
    concepts: int
    patterns: int
    released: bool = False

    def concept_codebook(self, dim: int, *, fixed: bool = False) -> Codebook | None:
        """The CPC for concepts of size `dim`, if there is one."""
        if self.kind == "none":
            return None
        return Codebook(codes=self.concepts, dim=dim, released=self.released, fixed=fixed)

    def pattern_codebooks(self, dim: int) -> list[Codebook]:
        """The CSPCs of the levels and of the top for patterns of size `dim`; none without patterns."""
        count = LEVELS + 1 if self.kind in ("residual", "naive") else 0
        return [Codebook(codes=self.patterns, dim=dim, released=self.released) for _ in range(count)]


def mlp(width: int, *sizes: int) -> nn.Sequential:
    """Linear, BN, ReLU for each size; 1x1 convolutions with `width` 2, linear layers with `width` 0."""
    layer = (lambda a, b: nn.Conv2d(a, b, 1)) if width == 2 else nn.Linear
    norm = BatchNorm2d if width == 2 else BatchNorm1d
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [layer(a, b), norm(b), nn.ReLU()]
    return nn.Sequential(*layers)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is remembered must also serve in training
def position_encoding(
    channels: int, height: int, width: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Tensor:
    """Sine/cosine encoding (channels, height, width): the first half encodes the column, the second the row.

    Inside a half even channels are sines, odd ones cosines, with frequencies exp(-ln(1e4) 2i / half) (Vaswani et al.,
    arXiv 1706.03762, section 3.5, in two dimensions). Remembered for each size where it is used, so that no forward
    but the first copies it to a device, and convolutions know it again.
    """
    half = channels // 2
    frequency = torch.exp(torch.arange(0, half, 2) * -(math.log(1e4) / half))[:, None]

    def encode(length: int) -> Tensor:
        angle = torch.arange(length) * frequency
        return torch.stack([angle.sin(), angle.cos()], 1).flatten(0, 1)  # (half, length)

    column = encode(width)[:, None, :].expand(half, height, width)
    row = encode(height)[:, :, None].expand(half, height, width)
    return torch.cat([column, row]).to(device, dtype)


class PrincipalComponents(nn.Module):
    """Projection (B, c) -> (B, D) to the first principal components of what it was fitted to; zeros beyond c."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.components: Tensor
        self.register_buffer("components", torch.eye(channels, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.components.dtype) @ self.components

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take the principal directions of x (N, c), the strongest first."""
        centred = (x - x.mean(0)).double().cpu()
        directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)
        count = min(self.components.shape)
        self.components.zero_()[:, :count] = directions[:, :count].to(self.components)


class Hierarchy(nn.Module):
    """Features of four levels -> the conditions of the flows.

    Args:
        channels: channels of the four feature levels, the top one last.
        dim: D, size of a concept.
        positions: P, channels of the position encoding, 0 for none.
        quantization: what is quantized, and by which codebooks.
        sizes: channels to which each level's condition is projected, None for no projection.
        direct: hand conditions out as dense maps, the reference for their convolution by parts.
        pooled: a concept is told by the principal components of the top level's mean, found by `seed` and then fixed,
            instead of a trained network: it stays what it was when the codes were placed.
    """

    def __init__(
        self, *, channels: Sequence[int], dim: int, positions: int, quantization: Quantization,
        sizes: Sequence[int] | None = None, direct: bool = False, pooled: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.positions, self.quantize, self.direct = positions, quantization.kind, direct
        wide = dim + positions if self.quantize == "residual" else dim
        top = channels[-1]
        self.semantic_mlp = PrincipalComponents(top, dim) if pooled else mlp(0, top, dim, dim)
        self.semantic_encoder = mlp(2, top, wide)
        self.upsamplers = nn.ModuleList(nn.Conv2d(wide, wide, 1) for _ in range(LEVELS))
        self.feature_mlps = nn.ModuleList(mlp(2, c, wide, wide) for c in channels)
        self.cpc = quantization.concept_codebook(dim, fixed=pooled)
        self.cspc = nn.ModuleList(quantization.pattern_codebooks(dim + positions))
        full = dim + positions + dim
        self.projections = nn.ModuleList(nn.Conv2d(full, size, 1) for size in (*sizes, sizes[-1])) if sizes else None
        self.condition_channels = tuple(sizes[min(i, 2)] if sizes else full for i in range(LEVELS + 1))

    def semantics(self, top: Tensor) -> Tensor:
        """s (B, D): what the whole image is."""
        return self.semantic_mlp(top.mean((2, 3)))

    def concept_index(self, top: Tensor) -> Tensor | None:
        """The concept's index (B,) of images by their top level, None without codebooks."""
        return self.cpc.nearest(self.semantics(top).float()) if self.cpc is not None else None

    def embeddings(self, features: Sequence[Tensor]) -> list[Tensor]:
        """g_l (B, D', H_l, W_l) of the three levels and the top."""
        r = self.semantic_encoder(features[-1])
        embedded = [f(h) for f, h in zip(self.feature_mlps, features, strict=True)]
        for level, up in enumerate(self.upsamplers):
            size = embedded[level].shape[-2:]
            embedded[level] = embedded[level] + up(F.interpolate(r, size=size, mode="bilinear", align_corners=False))
        return embedded

    def pattern_input(self, embedded: Tensor, concept: Tensor) -> Tensor:
        """What a CSPC quantizes, (B, D + P, H, W): the residual to [PE ; p], or [g ; PE] (naive)."""
        b, _, h, w = embedded.shape
        spread = concept[..., None, None].expand(-1, -1, h, w)
        encoding = [self.encoding(embedded).expand(b, -1, h, w)] if self.positions else []
        if self.quantize == "residual":
            return embedded - torch.cat([*encoding, spread], 1)
        return torch.cat([embedded, *encoding], 1)

    def encoding(self, like: Tensor) -> Tensor:
        """The position encoding for the map `like`, (P, H, W), in single precision at least."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        return position_encoding(self.positions, *like.shape[-2:], dtype, like.device)

    def condition(self, level: int, embedded: Tensor, concept: Tensor) -> tuple[Condition, Tensor | None, Tensor]:
        """Condition, pattern indices (B, H, W) and commitment of one level.

        Channels: [pattern condition (D + P) ; p (D)]. The pattern condition is [PE ; p] + code (residual), the code
        of [g ; PE] (naive), or [g ; PE] itself. With residual quantization the gradient of p inside the pattern
        condition vanishes, because the quantized residual is g - [PE ; p] to the straight-through gradient.
        """
        positions = (self.positions,) if self.positions else ()
        encoding = self.encoding(embedded) if self.positions else None
        dim, last = concept.shape[1], len(positions) + 1
        whole = VectorPart(vector=concept, piece=last)
        size = (embedded.shape[2], embedded.shape[3])
        if not self.cspc:
            parts = Condition(
                size=size, widths=(dim, *positions, dim), map=embedded, position=encoding, position_piece=1,
                vectors=(whole,),
            )  # fmt: skip
            return self.handed_out(level, parts), None, embedded.new_zeros(())
        out = self.cspc[level](self.pattern_input(embedded, concept).permute(0, 2, 3, 1))
        if self.quantize == "naive":
            codes = CodePart.make(out.indices, out.codes, embedded, placed=False)
            parts = Condition(size=size, widths=(dim, *positions, dim), codes=codes, vectors=(whole,))
        else:
            base = VectorPart(vector=concept.detach(), piece=last - 1)
            codes = CodePart.make(out.indices, out.codes, embedded, placed=encoding is not None)
            parts = Condition(
                size=size, widths=(*positions, dim, dim), codes=codes, position=encoding, vectors=(base, whole)
            )
        return self.handed_out(level, parts), out.indices, out.commitment

    def handed_out(self, level: int, condition: Condition) -> Condition:
        """`condition` by its parts, or as one map where that is asked for or it is projected to fewer channels."""
        if self.projections is None:
            return Condition.of_map(condition.dense()) if self.direct else condition
        return Condition.of_map(self.projections[level](condition.dense()))

    def forward(self, features: Sequence[Tensor]) -> ConditionSet:
        """Features (B, c_l, H_l, W_l) of the three levels and the top -> their conditions."""
        concept, index, commitment = self.semantics(features[-1]), None, features[-1].new_zeros(())
        if self.cpc is not None:
            out = self.cpc(concept)
            concept, index, commitment = out.quantized, out.indices, out.commitment
        maps, patterns = [], []
        for level, embedded in enumerate(self.embeddings(features)):
            made, indices, loss = self.condition(level, embedded, concept)
            maps.append(made)
            commitment = commitment + loss
            if indices is not None:
                patterns.append(indices)
        return ConditionSet(
            concept=concept, concept_index=index, maps=tuple(maps), patterns=tuple(patterns), commitment=commitment
        )

    def codebooks(self) -> dict[str, Codebook]:
        """All codebooks by name: cpc, cspc_0 .. cspc_top."""
        named = {f"cspc_{i if i < LEVELS else 'top'}": book for i, book in enumerate(self.cspc)}
        return {name: book for name, book in ({"cpc": self.cpc} | named).items() if isinstance(book, Codebook)}

    @torch.no_grad()
    def seed(self, batches: Sequence[Sequence[Tensor]], *, samples: int = 16384) -> None:
        """Place all codes in the embeddings of `batches` (each: the four feature levels), concepts first."""
        if isinstance(self.semantic_mlp, PrincipalComponents):
            self.semantic_mlp.fit(torch.cat([f[-1].mean((2, 3)) for f in batches]))
        if self.cpc is None:
            return
        semantics = [self.semantics(f[-1]) for f in batches]
        self.cpc.seed(torch.cat(semantics))
        if not self.cspc:
            return
        share = max(samples // len(batches), 1)
        picked: list[list[Tensor]] = [[] for _ in self.cspc]
        for features, s in zip(batches, semantics, strict=True):
            concept = self.cpc.embed[self.cpc.nearest(s.float())].to(s)
            for level, embedded in enumerate(self.embeddings(features)):
                flat = self.pattern_input(embedded, concept).permute(0, 2, 3, 1).flatten(0, 2)
                picked[level].append(flat[torch.randperm(len(flat), device=flat.device)[:share]].clone())
        for book, rows in zip(self.cspc, picked, strict=True):
            book.seed(torch.cat(rows))  # type: ignore[operator]
