"""How much memory training takes on a device, found out without computing anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, UntypedStorage

from models.loss import loss_terms
from models.vqflow import VQFlow


def training_bytes(model: VQFlow, shapes: Sequence[Sequence[int]], batch: int) -> int:
    """About what training takes beside the features that it reads, in single precision.

    Parameters, their gradients and two moments, and what backward keeps of a step, once more as much for gradients of
    hidden layers and whatever else comes and goes.

    Args:
        model: on "meta", where tensors have sizes and no content.
        shapes: (c_l, H_l, W_l) of the four kept levels.
    """
    own = {v.untyped_storage()._cdata for v in [*model.parameters(), *model.buffers()]}
    kept: dict[int, UntypedStorage] = {}

    def note(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()  # alive, so that no other one gets its number
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss_terms(model.train()([torch.empty(batch, *shape, device="meta") for shape in shapes]), 1.0)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return 4 * weights + 2 * sum(storage.nbytes() for key, storage in kept.items() if key not in own)
