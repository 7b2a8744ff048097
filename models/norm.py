"""Batch normalisation over the batch of all processes, which also trains on one value per channel: a batch of one image
and one place."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from utils.run.distributed import averaged, processes


class _StreamingNorm(_BatchNorm):
    """PyTorch's own, except where training sees a single value per channel, which has no variance.

    That value moves the running statistics first: the mean by `momentum` towards it, the variance by `momentum`
    towards the square of its distance from the mean. It is then normalized by them, as evaluation does, which bounds
    it by sqrt(1 / momentum) even while they have not settled. No gradient goes through the statistics.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C) or (B, C, H, W) -> the same shape."""
        if self.training and processes() > 1:
            return self._over_all(x)
        if not self.training or x.numel() != x.shape[1]:
            return super().forward(x)
        self._follow(x.detach().flatten())
        assert self.running_mean is not None and self.running_var is not None
        mean, var = self.running_mean.clone(), self.running_var.clone()  # backward needs them as they are now
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    def _over_all(self, x: Tensor) -> Tensor:
        """By mean and variance of all processes' batches, which are equally large; on a CPU, too."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None and self.weight is not None and self.bias is not None
        shape, places = (1, -1, *[1] * (x.ndim - 2)), [0, *range(2, x.ndim)]
        wide = x.to(self.weight.dtype)
        mean = averaged(wide.mean(places))
        centred = wide - mean.view(shape)
        var = averaged(centred.square().mean(places))
        count = processes() * x.numel() // x.shape[1]
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * (var + self.eps).rsqrt()
        return (centred * scale.view(shape) + self.bias.view(shape)).to(x.dtype)

    @torch.no_grad()
    def _follow(self, value: Tensor) -> None:
        """Update the running statistics with one value per channel, (C,)."""
        assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
        assert self.num_batches_tracked is not None
        gap = value.to(self.running_mean) - self.running_mean
        self.running_mean += self.momentum * gap
        self.running_var.lerp_(gap.square(), self.momentum)
        self.num_batches_tracked += 1


class BatchNorm1d(_StreamingNorm, nn.BatchNorm1d):
    """Of (B, C)."""


class BatchNorm2d(_StreamingNorm, nn.BatchNorm2d):
    """Of (B, C, H, W)."""
