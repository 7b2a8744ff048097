"""A reconstruction of how the released code computes, over the parameters of our model, as the thing to be faster than.

The released code itself is not part of this repository. This is written from its description: FrEIA's own
AllInOneBlock on the dense, concatenated condition, with the permutation as a product with a matrix; the extractor run
with gradients on; the codebooks' moving averages through one-hot matrices; Adam; AUPRO by connected components of
every mask at each of 800 thresholds. As the parameters are ours, both ways must give the same loss, which
throughput.py checks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from FrEIA.modules import AllInOneBlock
from skimage.measure import label, regionprops
from torch import Tensor, nn
from torch.nn import functional as F

from models.codebook import Codebook
from models.flow import CouplingBlock, Subnet
from models.vqflow import VQFlow

THRESHOLDS = 800


class OneHotCodebook(Codebook):
    """A codebook whose averages are products with one-hot matrices; it shares the tensors of `book`."""

    def __init__(self, book: Codebook) -> None:
        super().__init__(codes=1, dim=1, decay=book.decay, eps=book.eps, released=True)
        self.codes, self.dim = book.codes, book.dim
        self._buffers = book._buffers

    def distances(self, flat: Tensor) -> Tensor:
        return flat.square().sum(1, keepdim=True) - 2 * flat @ self.embed.T + self.embed.square().sum(1)[None]

    @torch.no_grad()
    def update(self, flat: Tensor, indices: Tensor) -> None:
        chosen = F.one_hot(indices, self.codes).to(flat.dtype)
        self.cluster_size.mul_(self.decay).add_(chosen.sum(0), alpha=1 - self.decay)
        self.embed_avg.mul_(self.decay).add_((flat.T @ chosen).T, alpha=1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.codes * self.eps) * total
        self.embed.copy_(self.embed_avg / smoothed[:, None])


class ReleasedSubnet(nn.Module):
    """The sub-network on a dense map, layer by layer."""

    def __init__(self, net: Subnet) -> None:
        super().__init__()
        self.net = net

    def forward(self, joined: Tensor) -> Tensor:
        net = self.net
        hidden = F.conv2d(joined, net.conv1.weight, net.conv1.bias, padding=1).permute(0, 2, 3, 1)
        hidden = F.layer_norm(hidden, net.ln.normalized_shape, net.ln.weight, net.ln.bias, net.ln.eps)
        return F.conv2d(F.relu(hidden.permute(0, 3, 1, 2)), net.conv2.weight, net.conv2.bias, padding=1)


def freia_block(block: CouplingBlock, condition: int) -> AllInOneBlock:
    """FrEIA's block with the parameters of ours."""
    made = AllInOneBlock(
        [(block.in_channels, 1, 1)], dims_c=[(condition, 1, 1)], affine_clamping=block.clamp,
        subnet_constructor=lambda n, out: ReleasedSubnet(block.subnet),
    )  # fmt: skip
    for name in ("global_scale", "global_offset", "w_perm", "w_perm_inv"):
        setattr(made, name, getattr(block, name))
    return made


class ReleasedForward(nn.Module):
    """Pooled features -> mean negative log-likelihood plus commitment, and latents, over the parameters of `model`."""

    def __init__(self, model: VQFlow) -> None:
        super().__init__()
        self.model, self.hierarchy = model, copy.copy(model.hierarchy)
        self.hierarchy._modules = dict(model.hierarchy._modules)
        assert isinstance(model.hierarchy.cpc, Codebook)
        self.hierarchy.cpc = OneHotCodebook(model.hierarchy.cpc)
        self.hierarchy.cspc = nn.ModuleList(OneHotCodebook(book) for book in model.hierarchy.cspc)  # type: ignore[arg-type]
        self.hierarchy.direct = True
        sizes = model.hierarchy.condition_channels
        self.flows = nn.ModuleList(
            nn.ModuleList(freia_block(block, size) for block in flow.blocks)  # type: ignore[union-attr]
            for flow, size in zip(model.level_flows, sizes, strict=False)
        )
        self.fusion = model.fusion

    def forward(self, pooled: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        conditions = self.hierarchy(pooled)
        latents, log_det = [], torch.zeros((), device=pooled[0].device)
        for level, blocks in enumerate(self.flows):
            x, dense = pooled[level], conditions.maps[level].map
            for block in blocks:
                (x,), change = block((x,), [dense])
                log_det = log_det + change
            x, change = self.model.prior(level, x, conditions.concept)
            log_det = log_det + change.sum((1, 2)) * x[0, 0].numel()
            latents.append(x)
        fused, changes = self.fusion(tuple(latents), conditions.maps[3])
        log_det = log_det + sum(change.sum((1, 2)) for change in changes)
        nll = (sum(z.square().sum((1, 2, 3)) for z in fused) / 2 - log_det).mean()
        return nll + conditions.commitment, list(fused)


def thresholded_aupro(maps: np.ndarray, masks: np.ndarray, limit: float = 0.3) -> float:
    """AUPRO of maps (N, H, W) by a search over thresholds, the regions of every mask found anew at each of them."""
    rates, shares = [], []
    outside = ~masks
    for threshold in np.linspace(maps.min(), maps.max(), THRESHOLDS):
        above = maps > threshold
        found = []
        for over, mask in zip(above, masks, strict=True):
            for region in regionprops(label(mask)):
                rows, columns = region.coords[:, 0], region.coords[:, 1]
                found.append(over[rows, columns].sum() / region.area)
        shares.append(np.mean(found))
        rates.append((above & outside).sum() / outside.sum())
    order = np.argsort(rates)
    x, y = np.array(rates)[order], np.array(shares)[order]
    inside = x <= limit
    return float(np.trapezoid(y[inside], x[inside]) / limit)
