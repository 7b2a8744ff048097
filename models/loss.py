"""The training objective (paper, equation for L; method section 4)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from models.vqflow import VQFlowOutput


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Scalars: `total` = `nll` (batch mean, nats per image) + weight * `commitment`."""

    total: Tensor
    nll: Tensor
    commitment: Tensor


def loss_terms(output: VQFlowOutput, quantize_weight: float) -> LossTerms:
    """Batch mean of sum_l 1/2 ||z_l||^2 - log|det J|, plus the weighted commitments of all codebooks."""
    nll = output.nll.mean()
    return LossTerms(total=nll + quantize_weight * output.commitment, nll=nll, commitment=output.commitment)
