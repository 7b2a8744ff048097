"""How good an image is: score maps and image scores from what flow, context and memory say (paper, section 3.5).

`mul` and `add` are the published scores (MSFlow, arXiv 2308.15300, section 3.4), relative to each image's own best
place. `likelihood` is absolute: images can be compared by it. `surprise` is absolute too, and made of opinions (the
flow's levels, the context's, the memory's views) in units of what unseen normal images have. `contrast` is `surprise`
less a part of the image's own level: normal images differ in level, a defect stands out of its image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.context import Context
from models.memory import Memory, View
from models.vqflow import VQFlowOutput


@dataclass(frozen=True, kw_only=True)
class ScoreRule:
    """The constants of our own scores, kept in the checkpoint: a later version of the code cannot change its figures.

    Attributes:
        views: what the memory looks at, and how much each view counts.
        search: images that are searched for each image, in rounds (see `Memory`).
        flow_weight: how much each of the flow's levels counts.
        context_weights: the same for the context's four levels.
        level_share: share of an image's highest pixels whose mean is its level.
        level_weight: what `contrast` takes off of the level.
        level_limit: deviations; normal images are seldom above (EXPERIMENTS.md), and what is above is a defect's.
    """

    views: tuple[View, ...] = (  # boards need the finest levels, woven and cracked surfaces the middle ones
        View(levels=(0, 1), places=200, weight=2.0),
        View(levels=(1, 2), places=256, weight=2.0),
        View(levels=(2, 3), places=128, weight=1.0),
    )
    search: tuple[int, ...] = (8, 8, 16, 16)
    flow_weight: float = 0.5
    context_weights: tuple[float, ...] = (0.7, 0.7, 0.7, 0.35)
    level_share: float = 0.01
    level_weight: float = 0.3
    level_limit: float = 2.5

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> ScoreRule:
        """The inverse of `plain`; lists are tuples again.

        Raises:
            KeyError, TypeError: not what `plain` gives.
        """
        views = tuple(View(**view | {"levels": tuple(view["levels"])}) for view in plain["views"])
        weights = tuple(plain.get("context_weights", ()))  # older checkpoints have none
        others = {name: value for name, value in plain.items() if name != "nearest"}
        search = tuple(plain["search"]) if "search" in plain else (plain["nearest"],)  # older ones have one round
        return cls(**others | {"views": views, "context_weights": weights, "search": search})


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, h, w) to (B, H, W), align_corners=True."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]


def summed(maps: Iterable[Tensor]) -> Tensor:
    """The sum of maps of one shape."""
    return torch.stack(list(maps)).sum(0)


def below_maximum(maps: Tensor) -> Tensor:
    """How far each pixel is below the highest one of its map."""
    return maps.amax((1, 2), keepdim=True) - maps


def image_scores(maps: Tensor, top_k: float = 0.03) -> Tensor:
    """Mean of the highest `top_k` share of the pixels of each map (B, H, W) -> (B,)."""
    flat = maps.flatten(1)
    count = max(math.floor(flat.shape[1] * top_k), 1)
    return flat.topk(count, dim=1).values.mean(1)


class ScoreMaps:
    """The five maps (B, H, W), larger where an image is less normal; each is computed when it is asked for.

    Per level a_l = -1/2 mean over channels of z_l^2.

    Args:
        latents: maps (B, c_l, H_l, W_l).
        size: side or (height, width) of the maps.
        local_log_det: `VQFlowOutput`'s field of this name.
        opinions: gives maps (B, h, w) in deviations, times their weights, whose sum is `surprise`.
        rule: of `contrast`.
    """

    def __init__(
        self,
        latents: Sequence[Tensor],
        size: int | tuple[int, int],
        local_log_det: Sequence[Tensor] | None = None,
        opinions: Callable[[], Sequence[Tensor]] = tuple,
        rule: ScoreRule | None = None,
    ) -> None:
        self.size = (size, size) if isinstance(size, int) else size
        self.levels = [-0.5 * z.float().square().mean(1) for z in latents]
        self.channels = [z.shape[1] for z in latents]
        self.local_log_det, self.opinions, self.rule = local_log_det, opinions, rule or ScoreRule()

    @cached_property
    def _sum(self) -> Tensor:
        return summed(resize_maps(a, self.size) for a in self.levels)

    @cached_property
    def mul(self) -> Tensor:
        """The levels' product: L = sum of the resized a_l minus the image's maximum; max(exp L) - exp L."""
        return below_maximum((-below_maximum(self._sum)).exp())

    @cached_property
    def add(self) -> Tensor:
        """The levels' sum: exp(a_l - its maximum), resized, summed; maximum minus the sum."""
        return below_maximum(summed(resize_maps((-below_maximum(a)).exp(), self.size) for a in self.levels))

    @cached_property
    def likelihood(self) -> Tensor:
        """Minus the sum of the resized a_l and of the log-determinant per channel: the negative log-density of the
        features at a place, up to a constant; without a log-determinant, minus the first sum."""
        if self.local_log_det is None:
            return -self._sum
        pairs = zip(self.local_log_det, self.channels, strict=True)
        return -self._sum - summed(resize_maps(j.float() / c, self.size) for j, c in pairs)

    @cached_property
    def surprise(self) -> Tensor:
        """The sum of the resized opinions."""
        return summed(resize_maps(found.float(), self.size) for found in self.opinions())

    @cached_property
    def contrast(self) -> Tensor:
        """surprise - level_weight min(t, level_limit), t the mean of the image's highest `level_share` of surprise."""
        level = image_scores(self.surprise, self.rule.level_share).clamp(max=self.rule.level_limit)
        return self.surprise - self.rule.level_weight * level[:, None, None]


class Scorer(nn.Module):
    """Turns what the flow says into score maps; stands beside the flow in the checkpoint.

    It holds context and memory, the units of each opinion (`mean`, `std`: what calibration images have, over all their
    places) and the number of images that they come from (`calibrated`, 0: none yet).

    Args:
        channels: channels of the four feature levels; the flow has the first three.
        memory: with a memory of normal features, which `first_look` fills.
        context: distance of the surroundings that places are judged by (see `Context`), 0: they are not.
        concepts: the context has Gaussians for each of them.
        rule: the constants.
    """

    def __init__(
        self, *, channels: Sequence[int], memory: bool, context: int = 0, concepts: int = 1,
        rule: ScoreRule | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.rule = rule or ScoreRule()
        self.context = Context(channels=channels, concepts=concepts, dilation=context) if context else None
        self.memory = Memory(channels=channels, views=self.rule.views, search=self.rule.search) if memory else None
        weights = [self.rule.flow_weight] * (len(channels) - 1)
        weights += self.rule.context_weights if context else []
        weights += [view.weight for view in self.rule.views] if memory else []
        self.weights = [weight / sum(weights) for weight in weights]
        self.mean: Tensor
        self.std: Tensor
        self.calibrated: Tensor
        self.register_buffer("mean", torch.zeros(len(weights)))
        self.register_buffer("std", torch.ones(len(weights)))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.int64))

    def raw_opinions(self, output: VQFlowOutput, features: Sequence[Tensor], *, own: bool = True) -> list[Tensor]:
        """1/2 mean over channels of z_l^2 for each of the flow's levels, the context's energies, the memory's
        distances: maps (B, h, w).

        Args:
            features: standardized levels, not pooled; not looked at without context and memory.
            own: see `Memory.forward`.
        """
        found = [0.5 * z.float().square().mean(1) for z in output.latents]
        found += self.context(features, output.concept) if self.context is not None else []
        return found + (self.memory(features, own=own) if self.memory is not None else [])

    def opinions(self, output: VQFlowOutput, features: Sequence[Tensor], *, own: bool = True) -> list[Tensor]:
        """Opinions in deviations from what calibration images have, times their weights, whose sum is 1."""
        rows = zip(self.raw_opinions(output, features, own=own), self.mean, self.std, self.weights, strict=True)
        return [(found - mean) / std * weight for found, mean, std, weight in rows]

    def set_units(self, units: Units) -> None:
        """Take the calibration images' mean and deviation of each opinion."""
        mean, std = units.mean_std()
        self.mean.copy_(mean)
        self.std.copy_(std.clamp(min=1e-6))
        self.calibrated.fill_(units.images)


class Units:
    """Adds up the opinions of calibration images, in double precision."""

    def __init__(self, opinions: int) -> None:
        self.images = 0
        self.sums, self.squares, self.counts = (torch.zeros(opinions, dtype=torch.float64) for _ in range(3))

    def add(self, opinions: Sequence[Tensor]) -> None:
        """Maps (B, h, w) of some images."""
        self.images += len(opinions[0])
        for i, found in enumerate(opinions):
            values = found.cpu().double()  # some devices have no double precision
            self.sums[i] += values.sum()
            self.squares[i] += values.square().sum()
            self.counts[i] += values.numel()

    def mean_std(self) -> tuple[Tensor, Tensor]:
        """Over all places of all images, (opinions,) each."""
        mean = self.sums / self.counts
        return mean, (self.squares / self.counts - mean.square()).clamp(min=0).sqrt()
