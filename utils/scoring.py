"""Anomaly maps and image scores from latents (paper, section 3.5; MSFlow, arXiv 2308.15300, section 3.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class ScoreMaps:
    """Five maps (B, H, W), larger where an image is less normal.

    `mul` (product of the levels) and `add` (their sum) are the published ones, relative to each image's own best
    place; `likelihood` is absolute: images can be compared by it. `surprise` is absolute too, and made of opinions in
    units of what unseen normal images have. `contrast` is `surprise` less a part of the image's own level: normal
    images differ in level, a defect stands out of its image.
    """

    mul: Tensor
    add: Tensor
    likelihood: Tensor
    surprise: Tensor
    contrast: Tensor


ABSOLUTE = ("likelihood", "surprise", "contrast")  # maps by which images can be compared

LEVEL_SHARE = 0.01  # pixels whose mean is an image's level
LEVEL_WEIGHT = 0.3  # what contrast takes off of it
LEVEL_LIMIT = 2.5  # deviations; normal images are seldom above (EXPERIMENTS.md), and what is above is a defect's


def resize_maps(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, h, w) to (B, H, W), align_corners=True."""
    return F.interpolate(maps[:, None], size=size, mode="bilinear", align_corners=True)[:, 0]


def summed(maps: Sequence[Tensor]) -> Tensor:
    """The sum of maps of one shape."""
    return torch.stack(list(maps)).sum(0)


@torch.no_grad()
def score_maps(
    latents: Sequence[Tensor],
    size: int | tuple[int, int],
    local_log_det: Sequence[Tensor] | None = None,
    surprise: Sequence[Tensor] = (),
) -> ScoreMaps:
    """The five maps of each image.

    Per level a_l = -1/2 mean over channels of z_l^2. mul: L = sum of the resized a_l minus the image's maximum;
    max(exp L) - exp L. add: exp(a_l - its maximum), resized, summed; maximum minus the sum. likelihood: minus the sum
    of the resized a_l, with `local_log_det` (B, H_l, W_l) also minus the log-determinant per channel: the negative
    log-density of the features at a place, up to a constant. surprise: the sum of the resized opinions, where none are
    given minus the sum of the resized a_l. contrast: surprise - LEVEL_WEIGHT min(t, LEVEL_LIMIT), t the mean of the
    highest LEVEL_SHARE of the image's surprise.

    Args:
        latents: maps (B, c_l, H_l, W_l).
        size: side or (height, width) of the result.
        local_log_det, surprise: `VQFlowOutput`'s fields of these names.
    """
    size = (size, size) if isinstance(size, int) else size
    levels = [-0.5 * z.float().square().mean(1) for z in latents]
    density = summed([resize_maps(a, size) for a in levels])
    opinions = summed([resize_maps(s.float(), size) for s in surprise]) if surprise else -density
    level = image_scores(opinions, LEVEL_SHARE).clamp(max=LEVEL_LIMIT)
    product = (density - density.amax((1, 2), keepdim=True)).exp()
    total = summed([resize_maps((a - a.amax((1, 2), keepdim=True)).exp(), size) for a in levels])
    if local_log_det is not None:
        pairs = zip(local_log_det, latents, strict=True)
        density = density + summed([resize_maps(j.float() / z.shape[1], size) for j, z in pairs])
    return ScoreMaps(
        mul=product.amax((1, 2), keepdim=True) - product,
        add=total.amax((1, 2), keepdim=True) - total,
        likelihood=-density,
        surprise=opinions,
        contrast=opinions - LEVEL_WEIGHT * level[:, None, None],
    )


def image_scores(maps: Tensor, top_k: float = 0.03) -> Tensor:
    """Mean of the highest `top_k` share of the pixels of each map (B, H, W) -> (B,)."""
    flat = maps.flatten(1)
    count = max(math.floor(flat.shape[1] * top_k), 1)
    return flat.topk(count, dim=1).values.mean(1)
