"""The learning rate as a pure function of how far the run is: no state to save."""

from __future__ import annotations

import math

from default import TrainConfig

STEPS = (0.7, 0.9)  # shares of the run after which "step" multiplies by DECAY
DECAY = 0.33
FLOOR = 0.1  # warm-up starts at this share of the rate
RELEASED_WARMUP = 5  # meta epochs
RELEASED_MILESTONES = (70, 90)  # sub epochs; beyond the end of the published 60


def learning_rate(config: TrainConfig, progress: float) -> float:
    """Learning rate after the share `progress` (0..1) of the run.

    "step": linear warm-up from 0.1 lr over `warmup` of the run, x0.33 at 70 % and 90 % of it. "cosine": the same
    warm-up, then half a cosine to 0. "constant": the warm-up only. "released": warm-up over the first five meta
    epochs and milestones at sub epochs 70 and 90, both stepped per sub epoch (method section 4).
    """
    if config.schedule == "released":
        epoch = math.floor(progress * config.meta_epochs * config.sub_epochs + 1e-9)
        rise = min(epoch / (RELEASED_WARMUP * config.sub_epochs), 1.0)
        return config.lr * (FLOOR + (1 - FLOOR) * rise) * DECAY ** sum(epoch >= m for m in RELEASED_MILESTONES)
    if progress < config.warmup:
        return config.lr * (FLOOR + (1 - FLOOR) * progress / config.warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / max(1 - config.warmup, 1e-9)))
    return config.lr * (DECAY ** sum(progress >= s for s in STEPS) if config.schedule == "step" else 1.0)
