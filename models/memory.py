"""A memory of normal features: how far a place is from the nearest one among images that look alike.

A second opinion beside the flow. A flow tells how likely a feature is under a smooth density; a memory tells whether
anything like it was ever seen. Their mistakes differ (EXPERIMENTS.md). Distances to stored normal features are
PatchCore's idea (arXiv 2106.08265, section 3), searching the most similar images only is SPADE's (arXiv 2005.02357,
section 3). No class label is needed for it: an image of another product is seldom among the most similar ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEAREST = 48  # images that are searched
ROWS = 256  # stored vectors compared at a time on a CPU: the products of more do not stay in its cache


@dataclass(frozen=True, kw_only=True)
class View:
    """Two neighbouring levels on the grid of the finer one, `places` of them kept from each image."""

    levels: tuple[int, int]
    places: int
    weight: float


# Boards need the finest levels, woven and cracked surfaces the middle ones, shapes the coarse ones (EXPERIMENTS.md).
VIEWS = (
    View(levels=(0, 1), places=200, weight=2.0),
    View(levels=(1, 2), places=256, weight=2.0),
    View(levels=(2, 3), places=128, weight=1.0),
)


class Memory(nn.Module):
    """Vectors from random places of normal images, and a descriptor of each image: the mean of its top level.

    A vector holds the features of a view's two levels, each averaged over its 3x3 neighbourhood. Buffers, in half
    precision: `descriptors` (N, C_3) and `vectors_v` (N, places, C_a + C_b) of N images.
    """

    def __init__(self, *, channels: Sequence[int]) -> None:
        super().__init__()
        self.descriptors: Tensor
        self.register_buffer("descriptors", torch.zeros(0, channels[-1], dtype=torch.float16))
        for v, view in enumerate(VIEWS):
            width = sum(channels[level] for level in view.levels)
            self.register_buffer(f"vectors_{v}", torch.zeros(0, 0, width, dtype=torch.float16))

    def make_room(self, state: dict[str, Tensor]) -> None:
        """Take on the number of images and places that the buffers in `state` (names as in `state_dict`) have."""
        for name, own in self.named_buffers():
            if name in state and state[name].ndim == own.ndim:
                setattr(self, name, own.new_zeros(*state[name].shape[:-1], own.shape[-1]))

    @staticmethod
    def embed(features: Sequence[Tensor], view: View) -> Tensor:
        """Features (B, c_l, H_l, W_l) of all levels -> a view's vectors (B, H W, C), row by row."""
        grid = features[view.levels[0]].shape[-2:]
        local = [F.avg_pool2d(features[level].float(), 3, 1, 1) for level in view.levels]
        same = [h if h.shape[-2:] == grid else F.interpolate(h, size=grid, mode="bilinear") for h in local]
        return torch.cat(same, 1).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def fit(self, batches: Iterable[Sequence[Tensor]], *, images: int, size: int) -> None:
        """Remember `size` random ones of the `images` images whose features are in `batches`, or all of them."""
        chosen = set(torch.randperm(images)[:size].tolist())
        kept: dict[str, list[Tensor]] = {name: [] for name, _ in self.named_buffers()}
        seen = 0
        for features in batches:
            embedded = [self.embed(features, view) for view in VIEWS]
            descriptors = features[-1].float().mean((2, 3))
            for row, descriptor in enumerate(descriptors):
                if seen in chosen:
                    kept["descriptors"].append(descriptor.half())
                    for v, view in enumerate(VIEWS):
                        order = torch.randperm(embedded[v].shape[1])[: view.places].to(descriptor.device)
                        kept[f"vectors_{v}"].append(embedded[v][row, order].half())
                seen += 1
        for name, rows in kept.items():
            setattr(self, name, torch.stack(rows))

    @torch.no_grad()
    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Euclidean distance to the nearest vector of the `NEAREST` images that are most like each image.

        One map (B, H, W) per view, on the grid of its finer level.
        """
        known = self.descriptors.float()
        gaps = known.square().sum(1) - 2 * features[-1].float().mean((2, 3)) @ known.T  # squared, up to a constant
        near = gaps.topk(min(NEAREST, len(self.descriptors)), largest=False).indices
        found = []
        for v, view in enumerate(VIEWS):
            places, vectors = self.embed(features, view), getattr(self, f"vectors_{v}")
            if torch.compiler.is_exporting():  # a traced batch has no length yet
                distance = nearest(places, vectors[near].flatten(1, 2))
            else:
                pairs = zip(places.split(1), near.split(1), strict=True)
                distance = torch.cat([nearest(own, vectors[rows].flatten(1, 2)) for own, rows in pairs])
            found.append(distance.unflatten(1, features[view.levels[0]].shape[-2:]))
        return found


def nearest(places: Tensor, vectors: Tensor) -> Tensor:
    """Euclidean distance of `places` (B, L, C) to the nearest of `vectors` (B, R, C), (B, L)."""
    norm = places.square().sum(2)
    best: Tensor | None = None
    for part in vectors.float().split(ROWS if places.device.type == "cpu" else vectors.shape[1], 1):
        gap = torch.baddbmm(part.square().sum(2)[:, None], places, part.transpose(1, 2), alpha=-2).amin(2)
        best = gap if best is None else torch.minimum(best, gap)
    assert best is not None
    return (best + norm).clamp(min=0).sqrt()
