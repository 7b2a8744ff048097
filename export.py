"""A trained model as one ONNX file: images in [0, 1] in, score map and image score out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from default import Config, EvalConfig, UsageError
from models.detector import Detector
from models.hierarchy import position_encoding
from models.scorer import image_scores
from stage import Stage, find_checkpoints, load_detector, normalization_of, settled_config
from utils.run.checkpoint import read_checkpoint
from utils.run.log import optional

TOLERANCE = 1e-3  # of the highest score


class Exported(nn.Module):
    """Images (B, 3, S, S), RGB in [0, 1] -> map (B, H, H) and score (B,)."""

    def __init__(self, extractor: nn.Module, detector: Detector, config: EvalConfig) -> None:
        super().__init__()
        self.extractor, self.detector, self.config = extractor, detector, config

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.detector.judge(self.detector.flow.keep(self.extractor(image))).maps
        scores = image_scores(getattr(maps, self.config.image_score), self.config.top_k)
        return getattr(maps, self.config.pixel_score), scores


def run_export(config: Config, chosen: dict[str, Any]) -> Path:
    """Write the model of --eval_ckpt as model.onnx beside its checkpoint, run it, and compare it with the original.

    Raises:
        UsageError: a package is missing, the checkpoint holds several models, or the file's scores are off.
    """
    assert config.eval.eval_ckpt is not None
    runtime = optional("onnxruntime", "--mode export", "export")
    optional("onnxscript", "--mode export", "export")
    paths = find_checkpoints(Path(config.eval.eval_ckpt), config.data.class_names)
    if len(paths) > 1:
        names = ", ".join(str(path) for path in paths)
        raise UsageError(f"--eval_ckpt: expected one model to export, but got {len(paths)}: choose from {names}")
    content = read_checkpoint(paths[0])
    own = settled_config(content, config, chosen, str(paths[0]))
    # Lookups in tables of products speed up our own code; an ONNX runtime is best at plain convolutions.
    own = replace(
        own, model=replace(own.model, conditioning="direct"), run=replace(own.run, device="cpu"),
        train=replace(own.train, amp_enable=False),
    )  # fmt: skip
    stage = Stage(own, normalization_of(content))
    exported = Exported(stage.extractor, load_detector(content, stage, str(paths[0])), own.eval).eval()
    target = paths[0].with_name("model.onnx")
    write_onnx(exported, target, own.data.input_size)
    worst = deviation(exported, runtime.InferenceSession(str(target)), own.data.input_size)
    if not worst < TOLERANCE:
        raise UsageError(f"--mode export: the scores of {target} are off by {worst:.2g} of the highest")
    print(f"{target}: image (B, 3, {own.data.input_size}, {own.data.input_size}) -> map, score; off by {worst:.1g}")
    return target


def write_onnx(exported: Exported, target: Path, size: int) -> None:
    """Trace with two images of `size`; the batch stays free. Weights are inside the file."""
    example = torch.zeros(2, 3, size, size)
    with torch.no_grad():
        torch.onnx.export(
            exported, (example,), str(target), dynamo=True, verbose=False, external_data=False,
            input_names=["image"], output_names=["map", "score"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
        )  # fmt: skip
    position_encoding.cache_clear()  # it holds tensors of the tracer now


@torch.no_grad()
def deviation(exported: Exported, session: Any, size: int) -> float:
    """Largest difference of maps and scores of three random images, as a share of the highest."""
    image = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    pairs = zip(session.run(None, {"image": image.numpy()}), exported(image), strict=True)
    return max(float(np.abs(a - b.numpy()).max() / np.abs(b.numpy()).max().clip(1e-12)) for a, b in pairs)
