"""In which form conditions are convolved quicker, by parts or as dense maps: measured on the device at hand."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from models.loss import loss_terms
from models.vqflow import VQFlow
from utils.run.device import autocast
from utils.run.distributed import alone

ROUNDS = 3  # steps that are timed, after one that is not


def seconds_of_a_step(flow: VQFlow, features: Sequence[Tensor], *, direct: bool, amp: bool) -> float:
    """Median seconds of a step's forward and backward pass on kept features (B, c_l, H_l, W_l).

    A copy takes the steps: the flow stays what it is, and so do random numbers.
    """
    device = features[0].device
    tried, taken = copy.deepcopy(flow).train(), []
    tried.hierarchy.direct = direct
    with torch.random.fork_rng([device] if device.type == "cuda" else []), alone():
        for _ in range(1 + ROUNDS):
            begin = time.perf_counter()
            with autocast(device, amp):
                total = loss_terms(tried(features), 1.0).total
            total.backward()
            total.item()  # a device that computes by itself has finished
            tried.zero_grad()
            taken.append(time.perf_counter() - begin)
    return median(taken[1:])


def quicker_form(flow: VQFlow, features: Sequence[Tensor], *, amp: bool) -> tuple[bool, str]:
    """Whether steps with dense maps are quicker, and a line that says by how much."""
    structured, direct = (seconds_of_a_step(flow, features, direct=form, amp=amp) for form in (False, True))
    taken = f"structured {structured:.3g} s a step, direct {direct:.3g} s"
    return direct < structured, f"--conditioning auto: {'direct' if direct < structured else 'structured'} ({taken})"
