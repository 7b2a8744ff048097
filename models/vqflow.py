"""VQ-Flow: features -> quantized conditions -> level flows -> mixed Gaussian -> fusion flow -> latents."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from default import ModelConfig
from models.flow import LevelFlow
from models.fusion import FusionFlow
from models.hierarchy import LEVELS, Hierarchy, Quantization
from models.memory import VIEWS, Memory
from models.prior import MixedGaussian


@dataclass(frozen=True, kw_only=True)
class VQFlowOutput:
    """What the model says of a batch.

    Attributes:
        latents: three maps (B, c_l, H_l, W_l), N(0, I) for normal images.
        log_det: (B,) log-determinant of the whole transformation.
        local_log_det: three maps (B, H_l, W_l): each level's share of `log_det`, by place.
        surprise: maps (B, h, w), one per level and one per view of the memory if there is one, in deviations from
            what calibration images have, times its weight (the weights' sum is 1); none while training.
        commitment: scalar, sum over the codebooks.
        concept: (B,) index of the concept, or None without codebooks.
        patterns: four index maps (B, H_l, W_l), or none.
    """

    latents: tuple[Tensor, ...]
    log_det: Tensor
    local_log_det: tuple[Tensor, ...]
    surprise: tuple[Tensor, ...]
    commitment: Tensor
    concept: Tensor | None
    patterns: tuple[Tensor, ...]

    @property
    def nll(self) -> Tensor:
        """(B,) sum_l 1/2 ||z_l||^2 - log|det J|, in nats, without the constant dims/2 ln(2 pi)."""
        return sum(z.float().square().sum((1, 2, 3)) for z in self.latents) / 2 - self.log_det  # type: ignore[operator]

    @property
    def dims(self) -> int:
        """Dimensions of the modelled features of one image."""
        return sum(z[0].numel() for z in self.latents)


class VQFlow(nn.Module):
    """The trained part of the detector; the frozen extractor stands beside it.

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
            sizes=config.condition_sizes, direct=config.conditioning == "direct",
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
        self.memory = Memory(channels=channels) if config.memory else None
        weights = [1.0] * LEVELS + ([view.weight for view in VIEWS] if self.memory is not None else [])
        self.opinion_weights = [weight / sum(weights) for weight in weights]
        opinions = len(weights)
        self.surprise_mean: Tensor
        self.surprise_std: Tensor
        self.register_buffer("surprise_mean", torch.zeros(opinions))
        self.register_buffer("surprise_std", torch.ones(opinions))
        for level, c in enumerate(channels):
            self.register_buffer(f"mean_{level}", torch.zeros(c))
            self.register_buffer(f"std_{level}", torch.ones(c))

    def compile_flows(self) -> None:
        """Compile the parts of the flows that gain by it (`torch.compile`); parameters and checkpoints stay."""
        for flow in self.level_flows:
            for block in flow.blocks:  # type: ignore[union-attr]
                block.compile_parts()  # type: ignore[operator]

    def pool(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The four levels as the extractor gave them, pooled as this model wants them (`ModelConfig.kept_pool`)."""
        return pool_features(features, self.strides, self.config.kept_pool)

    def for_flows(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Levels by `pool`, pooled where the memory left that to the flows, in single precision at least."""
        levels = [h.float() if h.dtype == torch.float16 else h for h in pooled]
        return pool_features(levels, self.strides, self.config.pool_type) if self.config.memory else levels

    def standardize(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """Subtract each channel's mean and divide by its standard deviation, as stored by `fit_statistics`."""
        named = dict(self.named_buffers(recurse=False))
        return [
            (h - named[f"mean_{i}"][:, None, None]) / named[f"std_{i}"][:, None, None] for i, h in enumerate(pooled)
        ]

    def forward_features(self, features: Sequence[Tensor]) -> VQFlowOutput:
        """The extractor's four levels (B, c_l, H_l, W_l) -> `VQFlowOutput`."""
        return self.forward_pooled(self.pool(features))

    def forward_pooled(self, pooled: Sequence[Tensor], noise: float = 0.0) -> VQFlowOutput:
        """Pooled levels (see `pool`) -> `VQFlowOutput`; `noise` is the deviation of Gaussian noise added to them."""
        features = self.standardize(self.for_flows(pooled))
        if noise:
            features = [h + noise * torch.randn_like(h) for h in features]
        conditions = self.hierarchy(features)
        latents, local = [], []
        for level, flow in enumerate(self.level_flows):
            z, change = flow(features[level], conditions.maps[level], recompute=self.recompute)
            if self.prior is not None:
                z, extra = self.prior(level, z, conditions.concept)
                change = change + extra
            latents.append(z)
            local.append(change - getattr(self, f"std_{level}").log().sum())
        fused, changes = self.fusion(tuple(latents), conditions.maps[LEVELS])
        local = [a + b for a, b in zip(local, changes, strict=True)]
        return VQFlowOutput(
            latents=fused, log_det=sum(a.sum((1, 2)) for a in local), local_log_det=tuple(local),  # type: ignore[arg-type]
            surprise=() if self.training else self._surprise(fused, pooled),
            commitment=conditions.commitment, concept=conditions.concept_index, patterns=conditions.patterns,
        )  # fmt: skip

    @torch.no_grad()
    def _surprise(self, latents: Sequence[Tensor], pooled: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """1/2 mean over channels of z_l^2 for each level and the memory's distances, standardized and weighted."""
        opinions = [0.5 * z.float().square().mean(1) for z in latents]
        if self.memory is not None:
            opinions += self.memory(self.standardize(pooled))
        rows = zip(opinions, self.surprise_mean, self.surprise_std, self.opinion_weights, strict=True)
        return tuple((found - mean) / std * weight for found, mean, std, weight in rows)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Sequence[Tensor]]) -> float:
        """Learn from `batches` of pooled levels of normal images, unseen ones at best, what opinions are usual.

        Returns the images' mean negative log-likelihood per dimension, in nats, without the constant 1/2 ln(2 pi).
        """
        was_training = self.training
        self.eval()
        self.surprise_mean.zero_()
        self.surprise_std.fill_(1.0)
        sums, squares, counts = (torch.zeros(len(self.opinion_weights), dtype=torch.float64) for _ in range(3))
        nll: list[Tensor] = []
        for pooled in batches:
            output = self.forward_pooled(pooled)
            nll.append(output.nll.cpu().double() / output.dims)
            for i, found in enumerate(output.surprise):
                values = (found / self.opinion_weights[i]).cpu().double()  # some devices have no double precision
                sums[i] += values.sum()
                squares[i] += values.square().sum()
                counts[i] += values.numel()
        mean = sums / counts
        std = (squares / counts - mean.square()).clamp(min=0).sqrt()
        self.surprise_mean.copy_(mean)
        self.surprise_std.copy_(std.clamp(min=1e-6))
        self.train(was_training)
        return float(torch.cat(nll).mean())

    @torch.no_grad()
    def fit_statistics(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Store each channel's mean and standard deviation over `batches` of pooled levels, in double precision."""
        count, total, squares = [0] * 4, [torch.zeros(())] * 4, [torch.zeros(())] * 4
        for pooled in batches:
            for i, h in enumerate(self.for_flows(pooled)):
                h = h.double() if h.device.type != "mps" else h.float()
                count[i] += h.numel() // h.shape[1]
                total[i] = total[i].to(h) + h.sum((0, 2, 3))
                squares[i] = squares[i].to(h) + h.square().sum((0, 2, 3))
        for i in range(4):
            mean = total[i] / count[i]
            std = (squares[i] / count[i] - mean.square()).clamp(min=0).sqrt()
            getattr(self, f"mean_{i}").copy_(mean)
            getattr(self, f"std_{i}").copy_(std.clamp(min=1e-3 * float(std.mean()) + 1e-8))


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
