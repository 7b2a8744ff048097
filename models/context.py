"""A place given its surroundings and its concept: Gaussians in closed form, no gradient step.

What should be at a place follows largely from what is around it, and how, from the concept of the image. For each level
and concept k the features x of a place and s of its surroundings (the 8 places at a distance of `dilation`, not the
place itself: a defect must not explain itself; adjacent places would share half of what they see with it) are taken
for jointly Gaussian. Then x given s is Gaussian, and

    z = A_k (x - m_k - B_k (s - m'_k)),    -log p(x | s, k) = 1/2 |z|^2 - log|det A_k| + constant

with B_k the regression of x on s and A_k the inverse Cholesky factor of what it leaves of the covariance. For one place
this is an exact conditional density; the sum over all places, each given the others, is a composite likelihood (Besag,
1975; Varin, Reid and Firth, 2011) and no density of the image, so it is no part of `VQFlowOutput.nll`. A concept's
moments are shrunk towards those of all images, as much as by `PRIOR` images that look like all.

Gaussians of places are PaDiM's (arXiv 2011.08785), there one per position and without surroundings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.run.device import exact_products
from utils.run.distributed import summed

PRIOR = 90.0  # images of all kinds that a concept's own are mixed with
FLOOR = 0.01  # of the mean variance, added to every variance: directions without variance say nothing
WIDTH = 64  # principal directions in which surroundings are seen
PLACES = 256  # random places of each image and level that the moments are made of
AROUND = [(i, j) for i in (0, 1, 2) for j in (0, 1, 2) if (i, j) != (1, 1)]


class Surrounded(nn.Module):
    """One level's Gaussians, a buffer each: `basis` (c, r), `weight` (K, c, c + 8 r), `bias` (K, c), `log_det` (K,).

    Args:
        channels: c, of the level.
        concepts: K.
        dilation: distance of the surroundings in places; 0: none, a place by itself.
    """

    def __init__(self, *, channels: int, concepts: int, dilation: int) -> None:
        super().__init__()
        self.channels, self.concepts, self.dilation = channels, concepts, dilation
        width = min(channels, WIDTH) if dilation else 0
        self.basis: Tensor
        self.weight: Tensor
        self.bias: Tensor
        self.log_det: Tensor
        self.register_buffer("basis", torch.eye(channels, width))
        self.register_buffer("weight", torch.eye(channels, channels + 8 * width).expand(concepts, -1, -1).clone())
        self.register_buffer("bias", torch.zeros(concepts, channels))
        self.register_buffer("log_det", torch.zeros(concepts))

    def joint(self, x: Tensor) -> Tensor:
        """Standardized features (B, c, H, W) -> place and surroundings, (B, c + 8 r, H W)."""
        if not self.dilation:
            return x.flatten(2)
        seen = x if self.basis.shape[1] == self.channels else torch.einsum("bchw,cr->brhw", x, self.basis)
        d, (height, width) = self.dilation, x.shape[-2:]
        padded = F.pad(seen, (d, d, d, d), mode="replicate")
        around = [padded[:, :, d * i : d * i + height, d * j : d * j + width] for i, j in AROUND]
        return torch.cat([x, *around], 1).flatten(2)

    def forward(self, x: Tensor, concept: Tensor) -> tuple[Tensor, Tensor]:
        """Standardized features (B, c, H, W) and concepts (B,) -> z (B, c, H, W) and log|det A| (B,)."""
        z = torch.bmm(self.weight[concept], self.joint(x)) - self.bias[concept][..., None]
        return z.unflatten(2, x.shape[-2:]), self.log_det[concept]

    def inverse(self, z: Tensor, x: Tensor, concept: Tensor) -> Tensor:
        """The features (B, c, H, W) that give z where the surroundings are those of x."""
        own = torch.cat([torch.zeros_like(x.flatten(2)), self.joint(x)[:, self.channels :]], 1)
        rest = z.flatten(2) + self.bias[concept][..., None] - torch.bmm(self.weight[concept], own)
        return torch.linalg.solve(self.weight[concept][:, :, : self.channels], rest).view_as(x)

    def energy(self, x: Tensor, concept: Tensor) -> Tensor:
        """-log p(x | s, k) / c of every place, (B, H, W), in nats without the constant 1/2 ln(2 pi)."""
        z, log_det = self(x, concept)
        return 0.5 * z.square().mean(1) - (log_det / self.channels)[:, None, None]

    @torch.no_grad()
    def set_basis(self, x: Tensor) -> None:
        """See surroundings in the principal directions of the features x (N, c, H, W)."""
        if 0 < self.basis.shape[1] < self.channels:
            covariance = torch.cov(x.transpose(0, 1).flatten(1).double().cpu())
            self.basis.copy_(torch.linalg.eigh(covariance).eigenvectors[:, -self.basis.shape[1] :])


class Context(nn.Module):
    """`Surrounded` for each of the four levels; the top one, which sees far, without surroundings."""

    def __init__(self, *, channels: Sequence[int], concepts: int, dilation: int) -> None:
        super().__init__()
        distances = [dilation] * (len(channels) - 1) + [0]
        self.levels = nn.ModuleList(
            Surrounded(channels=c, concepts=concepts, dilation=d) for c, d in zip(channels, distances, strict=True)
        )

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor], concept: Tensor | None) -> list[Tensor]:
        """Each level's `energy`; features standardized and not pooled, without codebooks no concepts."""
        rows = zip(self.surrounded, features, strict=True)
        with exact_products(features[-1].device):
            return [level.energy(h.float(), concept_of(concept, h)) for level, h in rows]

    @property
    def surrounded(self) -> list[Surrounded]:
        """The levels, finest first."""
        return [level for level in self.levels if isinstance(level, Surrounded)]


def concept_of(concept: Tensor | None, like: Tensor) -> Tensor:
    """The concepts (B,), all zero without codebooks."""
    return like.new_zeros(len(like), dtype=torch.int64) if concept is None else concept


class Moments:
    """Adds up first and second moments of place and surroundings for each concept, and fits a `Surrounded` to them."""

    def __init__(self, level: Surrounded) -> None:
        size, concepts = level.weight.shape[2], level.concepts
        self.level, self.images = level, torch.zeros(concepts, dtype=torch.float64)
        self.places, self.total = torch.zeros(concepts, dtype=torch.float64), torch.zeros(concepts, size).double()
        self.products = torch.zeros(concepts, size, size, dtype=torch.float64)

    @torch.no_grad()
    def add(self, x: Tensor, concept: Tensor) -> None:
        """Standardized features (B, c, H, W) of images of these concepts (B,)."""
        joint = self.level.joint(x.float())
        some = joint[:, :, torch.randperm(joint.shape[2])[:PLACES].to(joint.device)]
        for k in concept.unique().tolist():
            own = some[concept == k].transpose(0, 1).flatten(1)
            with exact_products(own.device):
                products = own @ own.T
            self.images[k] += int((concept == k).sum())
            self.places[k] += own.shape[1]
            self.total[k] += own.sum(1).cpu()
            self.products[k] += products.cpu()

    @torch.no_grad()
    def fit(self) -> None:
        """Every concept's Gaussian, from what all processes saw; one that no image has gets that of all images."""
        self.images, self.places = summed(self.images), summed(self.places)
        self.total, self.products = summed(self.total), summed(self.products)
        mean, common = gaussian(self.total.sum(0), self.products.sum(0), self.places.sum())
        floor = FLOOR * common.diagonal().mean() * torch.eye(len(common), dtype=common.dtype)
        for k, images in enumerate(self.images.tolist()):
            own, covariance = mean, common
            if images:
                own, covariance = gaussian(self.total[k], self.products[k], self.places[k])
                covariance = covariance.lerp(common, PRIOR / (PRIOR + images))
            weight, log_det = conditional(covariance + floor, self.level.channels)
            self.level.weight[k], self.level.bias[k], self.level.log_det[k] = weight, weight @ own, log_det


def gaussian(total: Tensor, products: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance from sums of vectors and of their products."""
    mean = total / count
    return mean, products / count - torch.outer(mean, mean)


def conditional(covariance: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """A [I, -B] of the first `channels` variables given the others, and log|det A|."""
    own, rest = covariance[:channels, :channels], covariance[channels:, channels:]
    regression = torch.linalg.solve(rest, covariance[channels:, :channels]).T
    left = own - regression @ covariance[channels:, :channels]
    inverse = torch.linalg.inv(torch.linalg.cholesky(left))
    return torch.cat([inverse, -inverse @ regression], 1), inverse.diagonal().log().sum()
