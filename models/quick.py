"""A frozen network in another form that computes the same, up to rounding, in less time."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import torch
from timm.layers import BatchNormAct2d, Conv2dSame
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

CONVOLUTIONS, NORMS = (nn.Conv2d, Conv2dSame), (nn.BatchNorm2d, BatchNormAct2d)
AGREEMENT = 1e-4  # of the highest feature: what folded and plain layers may differ by


class ResponseNorm(GlobalResponseNorm):
    """ConvNeXt V2's global response normalisation (arXiv 2301.00808, section 3.3), in three passes instead of five.

    On a CPU, where PyTorch's norm over places takes as long as all other layers but the products together.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C), or (B, C, H, W) as `channel_dim` says, of the same shape."""
        if x.device.type != "cpu":
            return super().forward(x)
        size = x.square().sum(self.spatial_dim, keepdim=True).to(self.weight.dtype).sqrt()
        share = size / (size.mean(self.channel_dim, keepdim=True) + self.eps)
        scale, bias = 1 + self.weight.view(self.wb_shape) * share, self.bias.view(self.wb_shape)
        return torch.addcmul(bias.to(x.dtype), x, scale.to(x.dtype))


@torch.no_grad()
def quickened(net: Any, image: Tensor) -> Any:
    """`net`, in eval mode, with quicker layers; batch norms become part of the convolutions before them.

    Which convolution a norm follows is taken from their order in a module. `image` (1, 3, H, W) shows whether that is
    right: if the features of it change, the norms stay where they are.
    """
    for layer in net.modules():
        if type(layer) is GlobalResponseNorm:
            layer.__class__ = ResponseNorm
    if not any(type(layer) in NORMS for layer in net.modules()):
        return net
    folded = copy.deepcopy(net)
    if not fold(folded) or not agree(folded(image), net(image)):
        return net
    return folded


def fold(net: nn.Module) -> int:
    """Make each batch norm part of the convolution that stands before it in the same module; how many there were."""
    count = 0
    for module in list(net.modules()):
        layers: list[tuple[str, Any]] = list(module._modules.items())
        for (first, convolution), (second, norm) in pairwise(layers):
            if type(convolution) not in CONVOLUTIONS or type(norm) not in NORMS:
                continue
            if not norm.track_running_stats or norm.num_features != convolution.out_channels:
                continue
            setattr(module, first, fuse_conv_bn_eval(convolution, norm))
            setattr(module, second, nn.Sequential(norm.drop, norm.act) if hasattr(norm, "act") else nn.Identity())
            count += 1
    return count


def hold_low(net: nn.Module, dtype: torch.dtype) -> None:
    """Keep weights in the lower precision in which autocast computes with them, instead of rounding them every time."""
    for layer in net.modules():
        if type(layer) in (*CONVOLUTIONS, nn.Linear):  # others may make their weights of what they hold
            layer.to(dtype)


def agree(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether features differ by no more than `AGREEMENT`."""
    return all(bool((a - b).abs().max() <= AGREEMENT * b.abs().max()) for a, b in zip(found, expected, strict=True))
