"""Checkpoints of version 1.0 in today's form; what was a constant of the code then is spelled out here."""

from __future__ import annotations

from typing import Any

import torch

OLD, FORMAT = "vqflow-1", "vqflow-2"
IMAGENET = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]  # mean and deviation, whatever the extractor wanted
RULE = {
    "views": [
        {"levels": [0, 1], "places": 200, "weight": 2.0},
        {"levels": [1, 2], "places": 256, "weight": 2.0},
        {"levels": [2, 3], "places": 128, "weight": 1.0},
    ],
    "nearest": 48, "flow_weight": 1.0, "level_share": 0.01, "level_weight": 0.3, "level_limit": 2.5,
}  # fmt: skip


def upgraded(content: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's dictionary; one of version 1.0 gets the keys `scorer` and `normalization`.

    Its memory and units stood among the flow's tensors. Units of 0 and 1 are those of a model that was saved before
    it was calibrated.
    """
    if content.get("format") != OLD or not isinstance(content.get("model"), dict):
        return content
    flow, scorer = {}, {}
    for name, value in content["model"].items():
        if name.startswith(("memory.", "surprise_")):
            scorer[name.removeprefix("surprise_")] = value
        else:
            flow[name] = value
    if {"mean", "std"} <= scorer.keys():
        known = bool(scorer["mean"].any()) or not bool((scorer["std"] == 1).all())
        scorer["calibrated"] = torch.tensor(int(known))
    return content | {
        "model": flow, "scorer": {"rule": RULE, "state": scorer}, "normalization": IMAGENET,
    }  # fmt: skip
