"""Random states: set, saved and restored together."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from utils.run.distributed import processes


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """All states as plain values and tensors, readable with weights_only."""
    version, words, position = random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]
    kind, keys, index, has_gauss, gauss = np.random.get_state()
    return {
        "python": [version, words, position],
        "numpy": [str(kind), [int(k) for k in keys], int(index), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    version, words, position = state["python"]
    random.setstate((version, tuple(words), position))
    kind, keys, index, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), index, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if processes() > 1 and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])  # each on its own device, as the first one was on its own
    elif state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
