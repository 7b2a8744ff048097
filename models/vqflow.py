"""VQ-Flow: features -> quantized conditions -> level flows -> mixed Gaussian -> fusion flow -> latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from default import ModelConfig
from models.flow import LevelFlow
from models.fusion import FusionFlow
from models.hierarchy import LEVELS, Hierarchy, Quantization
from models.prior import MixedGaussian
from utils.run.distributed import normal_like


@dataclass(frozen=True, kw_only=True)
class VQFlowOutput:
    """What the model says of a batch.

    Attributes:
        latents: three maps (B, c_l, H_l, W_l), N(0, I) for normal images.
        log_det: (B,) log-determinant of the whole transformation.
        local_log_det: three maps (B, H_l, W_l): each level's share of `log_det`, by place.
        commitment: scalar, sum over the codebooks.
        concept: (B,) index of the concept, or None without codebooks.
        patterns: four index maps (B, H_l, W_l), or none.
    """

    latents: tuple[Tensor, ...]
    log_det: Tensor
    local_log_det: tuple[Tensor, ...]
    commitment: Tensor
    concept: Tensor | None
    patterns: tuple[Tensor, ...]

    @property
    def nll(self) -> Tensor:
        """(B,) sum_l 1/2 ||z_l||^2 - log|det J|, in nats, without the constant dims/2 ln(2 pi)."""
        return sum(z.float().square().sum((1, 2, 3)) for z in self.latents) / 2 - self.log_det  # type: ignore[operator]

    @property
    def nll_per_dim(self) -> Tensor:
        """(B,) `nll` divided by the number of dimensions, float64 on the CPU."""
        return self.nll.detach().cpu().double() / self.dims

    @property
    def dims(self) -> int:
        """Dimensions of the modelled features of one image."""
        return sum(z[0].numel() for z in self.latents)


class VQFlow(nn.Module):
    """The trained part of the detector; the frozen extractor and the scorer stand beside it.

    Features come in three states: as the extractor gives them; *kept*, as a cache holds them (`keep`: pooled, unless a
    memory or a context wants all places); and *pooled* for the flows (`pool`).

    Args:
        config: its own part of the configuration.
        channels: channels of the four feature levels, the top one last.
        strides: strides of the levels; levels finer than the top are pooled by two. Default: 4, 8, 16, 32.
        recompute: the backward pass computes the flows' blocks again instead of keeping their hidden layers.
    """

    def __init__(
        self,
        config: ModelConfig,
        channels: Sequence[int],
        strides: Sequence[int] = (4, 8, 16, 32),
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.config, self.channels, self.strides = config, tuple(channels), tuple(strides)
        self.hierarchy = Hierarchy(
            channels=channels, dim=config.dim_cpc, positions=config.positions, quantization=quantization_of(config),
            sizes=config.condition_sizes, direct=config.conditioning == "direct", pooled=config.semantics == "pooled",
        )  # fmt: skip
        sizes = self.hierarchy.condition_channels
        self.level_flows = nn.ModuleList(
            LevelFlow(channels=c, condition=sizes[i], blocks=config.blocks[i], clamp=config.clamp)
            for i, c in enumerate(channels[:LEVELS])
        )
        released = config.objective == "released"
        self.prior = (
            MixedGaussian(dim=config.dim_cpc, channels=channels[:LEVELS], released=released)
            if config.mixed_gaussian
            else None
        )
        self.fusion = FusionFlow(channels=channels[:LEVELS], condition=sizes[-1], clamp=config.clamp)
        for level, c in enumerate(channels):
            self.register_buffer(f"mean_{level}", torch.zeros(c))
            self.register_buffer(f"std_{level}", torch.ones(c))

    def compile_flows(self, backend: str | Callable = "inductor") -> None:
        """Compile the parts of the flows that gain by it (`torch.compile`); parameters and checkpoints stay."""
        for flow in self.level_flows:
            for block in flow.blocks:  # type: ignore[union-attr]
                block.compile_parts(backend)  # type: ignore[operator]

    def keep(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The four levels as the extractor gave them, as a cache keeps them (`ModelConfig.kept_pool`)."""
        return pool_features(features, self.strides, self.config.kept_pool)

    def pool(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """Kept levels, pooled where that was left to the flows, in single precision at least."""
        levels = [h.float() if h.dtype == torch.float16 else h for h in kept]
        return pool_features(levels, self.strides, self.config.pool_type) if self.config.all_places else levels

    def statistics(self) -> tuple[list[Tensor], list[Tensor]]:
        """Each level's channel means and standard deviations (c_l,), as `set_statistics` stored them."""
        named, levels = dict(self.named_buffers(recurse=False)), range(len(self.channels))
        return [named[f"mean_{i}"] for i in levels], [named[f"std_{i}"] for i in levels]

    def standardize(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Subtract each channel's mean and divide by its standard deviation; kept or pooled levels."""
        rows = zip(features, *self.statistics(), strict=True)
        return [(h - mean[:, None, None]) / std[:, None, None] for h, mean, std in rows]

    def forward(self, kept: Sequence[Tensor], noise: float = 0.0) -> VQFlowOutput:
        """Kept levels -> `VQFlowOutput`; `noise` is the deviation of Gaussian noise added to standardized features."""
        features = self.standardize(self.pool(kept))
        if noise:
            features = [h + noise * normal_like(h) for h in features]
        conditions = self.hierarchy(features)
        levels: list[tuple[Tensor, Tensor]] = []
        for level in reversed(range(LEVELS)):  # backward begins with the largest maps and the smallest gradients
            flow = self.level_flows[level]
            z, change = flow(features[level], conditions.maps[level], recompute=self.recompute)
            if self.prior is not None:
                z, extra = self.prior(level, z, conditions.concept)
                change = change + extra
            levels.insert(0, (z, change - getattr(self, f"std_{level}").log().sum()))
        latents, local = zip(*levels, strict=True)
        fused, changes = self.fusion(latents, conditions.maps[LEVELS])
        local = tuple(a + b for a, b in zip(local, changes, strict=True))
        return VQFlowOutput(
            latents=fused, log_det=sum(a.sum((1, 2)) for a in local), local_log_det=local,  # type: ignore[arg-type]
            commitment=conditions.commitment, concept=conditions.concept_index, patterns=conditions.patterns,
        )  # fmt: skip

    @torch.no_grad()
    def set_statistics(self, statistics: ChannelStatistics) -> None:
        """Standardize from now on by what was added up in `statistics`."""
        for i, (mean, std) in enumerate(statistics.mean_std()):
            getattr(self, f"mean_{i}").copy_(mean)
            getattr(self, f"std_{i}").copy_(std.clamp(min=1e-3 * float(std.mean()) + 1e-8))


class ChannelStatistics:
    """Adds up each level's channels over images and places, in double precision where the device has it."""

    def __init__(self, levels: int) -> None:
        self.count, self.total, self.squares = [0] * levels, [torch.zeros(())] * levels, [torch.zeros(())] * levels

    @torch.no_grad()
    def add(self, pooled: Sequence[Tensor]) -> None:
        """Pooled levels (B, c_l, H_l, W_l) of some images."""
        for i, h in enumerate(pooled):
            h = h.double() if h.device.type != "mps" else h.float()
            self.count[i] += h.numel() // h.shape[1]
            self.total[i] = self.total[i].to(h) + h.sum((0, 2, 3))
            self.squares[i] = self.squares[i].to(h) + h.square().sum((0, 2, 3))

    def mean_std(self) -> list[tuple[Tensor, Tensor]]:
        """Each level's mean and standard deviation, (c_l,)."""
        means = [total / count for total, count in zip(self.total, self.count, strict=True)]
        rows = zip(means, self.squares, self.count, strict=True)
        return [(mean, (squares / count - mean.square()).clamp(min=0).sqrt()) for mean, squares, count in rows]


def pool_features(features: Sequence[Tensor], strides: Sequence[int], kind: str) -> list[Tensor]:
    """Levels finer than the top are pooled (3x3, stride 2, padding 1; `kind` avg or max; none: not), the top is not."""
    if kind == "none":
        return list(features)
    pool = F.avg_pool2d if kind == "avg" else F.max_pool2d
    return [pool(h, 3, 2, 1) if stride < strides[-1] else h for h, stride in zip(features, strides, strict=True)]


def quantization_of(config: ModelConfig) -> Quantization:
    """What the hierarchy quantizes, from the flags of the released code."""
    kind = "none"
    if config.quantize_enable:
        kind = config.quantize_type if config.pattern_quantize else "concept"
    released = config.codebooks == "released"
    return Quantization(kind=kind, concepts=config.k_cpc, patterns=config.k_cspc, released=released)
