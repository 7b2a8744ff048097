"""A vector quantizer whose codes follow the data by exponential moving averages (EMA).

The update is that of van den Oord et al., "Neural Discrete Representation Learning" (arXiv 1711.00937, appendix A.1),
with Laplace smoothing of the counts. VQ-Flow uses it for the concepts (CPC) and the patterns (CSPC), sections 3.2, 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.run.device import exact_products
from utils.run.distributed import random_rows, summed

DEAD_SHARE = 0.03  # a code whose EMA count is below this share of the mean count is dead


@dataclass(frozen=True, kw_only=True)
class QuantizeOutput:
    """`quantized` (..., D) with the straight-through gradient, `indices` (...) int64, `commitment` scalar.

    `codes` (K, D) are the codes as they were when the input was quantized, before the update.
    """

    quantized: Tensor
    codes: Tensor
    indices: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """`codes` vectors of size `dim`; the nearest in squared Euclidean distance stands for the input.

    Two ways to keep the codes alive. "seeded" (ours): counts start at one, `seed` places the codes in the data by
    k-means, and a code that hardly any input chooses moves to a random input. "released": as in the published code,
    counts start at zero and codes are random, so that after one step an unchosen code has the norm decay/eps times its
    own (method section 6); kept for reproduction. `fixed` codes stay where `seed` places them.

    Shapes: inputs (..., dim); `embed`, `embed_avg` (codes, dim); `cluster_size`, `usage` (codes,).
    """

    def __init__(
        self, *, codes: int, dim: int, decay: float = 0.99, eps: float = 1e-5, released: bool = False,
        fixed: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.codes, self.dim, self.decay, self.eps, self.released, self.fixed = codes, dim, decay, eps, released, fixed
        self.embed: Tensor
        self.cluster_size: Tensor
        self.embed_avg: Tensor
        self.usage: Tensor
        embed = torch.randn(codes, dim)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(codes) if released else torch.ones(codes))
        self.register_buffer("embed_avg", embed.clone())
        self.register_buffer("usage", torch.zeros(codes), persistent=False)  # choices since `reset_usage`

    def distances(self, flat: Tensor) -> Tensor:
        """Squared distances (N, codes) of `flat` (N, dim) up to the input's own squared norm."""
        return self.embed.square().sum(1) - 2 * flat @ self.embed.T

    def nearest(self, flat: Tensor) -> Tensor:
        """Index of the nearest code, (N,)."""
        with exact_products(flat.device):
            return self.distances(flat).argmin(1)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> QuantizeOutput:
        """Quantize `x` (..., dim); while training, also move the codes."""
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        flat = x.detach().reshape(-1, self.dim)
        indices = self.nearest(flat)
        code = F.embedding(indices, self.embed).reshape(x.shape)
        codes = self.embed
        if self.training:
            codes = codes.clone()
            self.update(flat, indices)
        return QuantizeOutput(
            quantized=x + (code - x).detach(),
            codes=codes,
            indices=indices.reshape(x.shape[:-1]),
            commitment=(code.detach() - x).square().mean(),
        )

    @torch.no_grad()
    def update(self, flat: Tensor, indices: Tensor) -> None:
        """One EMA step towards the mean of the inputs that chose each code, in all processes."""
        ones = torch.ones_like(indices, dtype=flat.dtype)
        counts = summed(torch.zeros_like(self.cluster_size).index_add_(0, indices, ones))
        sums = summed(torch.zeros_like(self.embed_avg).index_add_(0, indices, flat))
        self.usage += counts
        if self.fixed:
            return
        self.cluster_size.lerp_(counts, 1 - self.decay)
        self.embed_avg.lerp_(sums, 1 - self.decay)
        if not self.released:
            self._revive(flat)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + self.codes * self.eps) * total
        self.embed.copy_(self.embed_avg / smoothed[:, None])

    def _revive(self, flat: Tensor) -> None:
        """Move dead codes to random inputs of the batch, with the mean count, without asking the device."""
        mean = self.cluster_size.mean()
        dead = self.cluster_size < DEAD_SHARE * mean
        picks = random_rows(flat, self.codes)
        self.embed_avg.copy_(torch.where(dead[:, None], picks * mean, self.embed_avg))
        self.cluster_size.copy_(torch.where(dead, mean, self.cluster_size))

    @torch.no_grad()
    def seed(self, samples: Tensor, *, steps: int = 8) -> None:
        """Place the codes in `samples` (N, dim): a k-means++ start for few codes, a random one for many, then Lloyd.

        With fewer samples than codes, samples repeat with a little noise.
        """
        samples = samples.to(self.embed)
        self.embed.copy_(self._start(samples))
        for _ in range(steps):
            indices = self.nearest(samples)
            counts = torch.zeros_like(self.cluster_size).index_add_(0, indices, torch.ones_like(samples[:, 0]))
            sums = torch.zeros_like(self.embed).index_add_(0, indices, samples)
            self.embed.copy_(torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], self.embed))
        self.cluster_size.fill_(1.0)
        self.embed_avg.copy_(self.embed)

    def _start(self, samples: Tensor) -> Tensor:
        repeats = -(-self.codes // len(samples))
        if repeats > 1 or self.codes > 64:
            order = torch.cat([torch.randperm(len(samples), device=samples.device) for _ in range(repeats)])
            chosen = samples[order[: self.codes]]
            spread = samples.std(0, unbiased=False) * 1e-2 if repeats > 1 else torch.zeros_like(samples[0])
            return chosen + spread * torch.randn_like(chosen)
        chosen = samples[torch.randint(len(samples), (1,), device=samples.device)]
        for _ in range(self.codes - 1):
            gap = torch.cdist(samples, chosen).amin(1).square()
            weights = gap + 1e-12 * (1 + gap.max())
            chosen = torch.cat([chosen, samples[torch.multinomial(weights, 1)]])
        return chosen

    @torch.no_grad()
    def reassign(self) -> None:
        """Re-seed codes unused since `reset_usage` from the most used ones (`--reassign-quantize`).

        The u-th unused code takes the place of the u-th most used one, with noise of 1 % of its size, and both share
        its count.
        """
        order = self.usage.argsort(descending=True, stable=True)
        unused = (self.usage == 0).nonzero().flatten() if not self.fixed else order[:0]
        used = order[: self.codes - len(unused)]
        if len(unused) == 0 or len(used) == 0:
            return
        donors = used[torch.arange(len(unused), device=used.device) % len(used)]
        noise = torch.randn_like(self.embed[donors]) * self.embed[donors].abs().mean(1, keepdim=True)
        self.embed[unused] = self.embed[donors] + 0.01 * noise
        self.cluster_size[donors] /= 2  # once, however often one gives
        self.cluster_size[unused] = self.cluster_size[donors]
        self.embed_avg.copy_(self.embed * self.cluster_size[:, None])

    def reset_usage(self) -> None:
        self.usage.zero_()

    def statistics(self) -> dict[str, float]:
        """`perplexity` (exponential of the entropy, 1..codes) and `used` (share of codes, 0..1) since `reset_usage`."""
        return usage_statistics(self.usage)


def usage_statistics(usage: Tensor) -> dict[str, float]:
    """Perplexity and share of used codes of a histogram (codes,)."""
    share = usage.double() / usage.double().sum().clamp(min=1)
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    return {"perplexity": float(entropy.exp()), "used": float((usage > 0).double().mean())}
