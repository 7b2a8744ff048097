"""A trained model as ONNX files that need neither this program nor PyTorch: pictures in, decisions out."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datasets import build_datasets, evenly_spread, resolve_classes
from datasets.transforms import to_picture
from default import CALIBRATED, Config, EvalConfig, UsageError, __version__
from models.detector import Detector
from models.hierarchy import position_encoding
from models.scorer import image_scores
from stage import Stage, find_checkpoints, image_readings, load_detector, normalization_of, settled_config
from utils.run.checkpoint import read_checkpoint
from utils.run.log import optional
from utils.run.precision import Images, to_float16, to_int8
from utils.run.writer import write_whole

TOLERANCE = 1e-3  # of the highest value: what the float32 file may be off
BATCH = 4  # images that are compared at a time
EXTRACTOR = ("extractor",)
NETWORKS = (*EXTRACTOR, "detector.flow.level_flows", "detector.flow.fusion")
SCORED = ("map", "score")
DECIDED = (*SCORED, "p_value", "threshold", "verdict", "mask", "pixel_threshold")


class Exported(nn.Module):
    """Pictures (B, S, S, 3), uint8 RGB -> `map` (B, H, H) and `score` (B,); with a decision also `p_value` (B,),
    `threshold` (B,) of the score, `verdict` (B,), true for a defective image, `mask` (B, H, H), true for a defect, and
    `pixel_threshold` (B,), above which it is; with codebooks also `concept` (B,).
    """

    def __init__(self, extractor: nn.Module, detector: Detector, config: EvalConfig) -> None:
        super().__init__()
        self.extractor, self.detector, self.config = extractor, detector, config

    @property
    def names(self) -> tuple[str, ...]:
        """What `forward` gives."""
        concepts = ("concept",) if self.detector.flow.hierarchy.codebooks() else ()
        return (*(SCORED if self.detector.decision is None else DECIDED), *concepts)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        features = self.extractor(image.permute(0, 3, 1, 2).float() / 255)
        judgement = self.detector.judge(self.detector.flow.keep(features))
        shown = getattr(judgement.maps, self.config.shown_score)
        score = image_scores(getattr(judgement.maps, self.config.image_score), self.config.top_k)
        concepts = () if judgement.output.concept is None else (judgement.output.concept,)
        if self.detector.decision is None:
            return shown, score, *concepts
        verdict = self.detector.decide(judgement, score)
        mask, limit = shown > verdict.pixel_threshold[:, None, None], verdict.pixel_threshold
        return shown, score, verdict.p_value, verdict.threshold, verdict.defective, mask, limit, *concepts


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far a file is from its original: images that were compared and equal verdicts among them (None: there are
    none), the largest and the mean difference of maps and the largest of scores as shares of the highest value, and the
    scores' correlation."""

    images: int
    verdicts: int | None
    map: float
    mean: float
    score: float
    correlation: float

    @property
    def worst(self) -> float:
        return max(self.map, self.score)

    def __str__(self) -> str:
        said = "no verdicts" if self.verdicts is None else f"{self.verdicts} of {self.images} verdicts equal"
        return (
            f"{said}, scores off by {self.score:.2g} of the highest at most (correlation {self.correlation:.5f}), maps "
            f"by {self.mean:.1g} on average and {self.map:.2g} at most"
        )


def run_export(config: Config, chosen: dict[str, Any]) -> list[Path]:
    """Write each model of --eval_ckpt as model.onnx beside its checkpoint, in each --precision, and compare the files
    with the original.

    Raises:
        UsageError: a package is missing, a file's scores are off, or there are no images to calibrate integers on.
    """
    assert config.eval.eval_ckpt is not None
    for package in ("onnxruntime", "onnxscript"):
        optional(package, "--mode export", "export")
    paths = find_checkpoints(Path(config.eval.eval_ckpt), config.data.class_names)
    return [target for path in paths for target in export_model(path, config, chosen)]


def export_model(path: Path, config: Config, chosen: dict[str, Any]) -> Iterator[Path]:
    """The files of one checkpoint; a line says of each how well it agrees with the original."""
    content = read_checkpoint(path)
    own = portable(settled_config(content, config, chosen, str(path)))
    precisions = own.run.precision
    normal = None if precisions == ("float32",) else normal_images(own, content, "int8" in precisions)
    exported = whole(content, own, str(path))
    traced = trace(exported, own.data.view_size)
    facts = describe(own, content, exported, traced)
    for precision in precisions:
        target = file_of(path, precision)
        write(traced, precision, facts, normal, target)
        yield checked(exported, precision, target, normal, own.data.view_size)


def portable(own: Config) -> Config:
    """The settings that a model is traced with.

    Lookups in tables of products speed up our own code; an ONNX runtime is best at plain convolutions.
    """
    return replace(
        own, model=replace(own.model, conditioning="direct"), run=replace(own.run, device="cpu"),
        train=replace(own.train, amp_enable=False),
    )  # fmt: skip


def whole(content: dict[str, Any], own: Config, name: str) -> Exported:
    """A checkpoint's model, ready to be traced."""
    stage = Stage(own, normalization_of(content))
    return Exported(stage.extractor, load_detector(content, stage, name), own.eval).eval()


def file_of(path: Path, precision: str) -> Path:
    """The file beside a checkpoint."""
    return path.with_name("model.onnx" if precision == "float32" else f"model.{precision}.onnx")


def normal_images(own: Config, content: dict[str, Any], wanted: bool) -> Images | None:
    """Training images of all classes as the model sees them, (N, S, S, 3); None if they are not there but not `wanted`.

    Raises:
        UsageError: they are wanted.
    """
    try:
        names = resolve_classes(own.data)
        train = build_datasets(own.data, names, None, image_readings(content, names))[0]
    except UsageError as error:
        if not wanted:
            return None
        raise UsageError(f"--precision int8: is calibrated on normal images, but {error}") from error
    tiles = train.tiled
    return np.stack([to_picture(tiles[n].image) for n in evenly_spread(tiles)])


def trace(exported: Exported, size: int) -> Any:
    """The ONNX model, traced with two images of `size`; the batch stays free."""
    with torch.no_grad():
        program = torch.onnx.export(
            exported, (torch.zeros(2, size, size, 3, dtype=torch.uint8),), dynamo=True, verbose=False,
            input_names=["image"], output_names=list(exported.names),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1024)},),
        )  # fmt: skip
    position_encoding.cache_clear()  # it holds tensors of the tracer now
    assert program is not None
    return program.model_proto


def describe(own: Config, content: dict[str, Any], exported: Exported, traced: Any) -> dict[str, Any]:
    """What the file says of itself, by names: all that one needs to prepare an image and to read the outputs."""
    classes, decision = content.get("classes", own.data.class_names), exported.detector.decision
    net: Any = exported.extractor.net
    pretrained = net.pretrained_cfg if own.model.pretrained else {}
    facts: dict[str, Any] = {
        "program": "VQ-Flow", "version": __version__, "torch": torch.__version__,
        "opset": traced.opset_import[0].version, "input_size": own.data.input_size, "map_size": own.score_size,
        "resize": own.data.resize, "center_crop": own.data.center_crop, "filter": "Pillow's Lanczos",
        "tile": own.data.tile, "overlap": own.data.shared,
        "classes": list(classes),
        "image_score": own.eval.image_score, "map": own.eval.shown_score, "top_k": own.eval.top_k,
        "extractor": own.model.extractor, "weights_license": pretrained.get("license"),
        "readings": {n: reading.plain() for n, reading in image_readings(content, classes).items()},
        "multi_class": own.data.multi_class,
    }  # fmt: skip
    if decision is None:
        return facts
    thresholds, pixels = decision.thresholds.tolist(), decision.pixel_thresholds.tolist()
    return facts | {
        "false_alarm_rate": decision.rate, "basis": decision.basis, "thresholds": thresholds,
        "interval": None if decision.guaranteed else [v if math.isfinite(v) else None for v in decision.interval()],
        "pixel_thresholds": pixels, "colour_scale": [0.0 if own.eval.shown_score in CALIBRATED else None, pixels[0]],
    }  # fmt: skip


def write(traced: Any, precision: str, facts: dict[str, Any], normal: Images | None, target: Path) -> None:
    """The traced model in a precision, with its facts as JSON in its metadata."""
    model = traced
    if precision == "float16":
        model = to_float16(traced, NETWORKS)
    elif precision == "int8":
        assert normal is not None
        model = to_int8(traced, EXTRACTOR, np.split(normal, range(BATCH, len(normal), BATCH)))
    write_whole(target, serialized(model, facts | {"precision": precision}))


def serialized(model: Any, facts: dict[str, Any]) -> bytes:
    """The content of a file: a model with its facts."""
    import onnx

    onnx.helper.set_model_props(model, {name: json.dumps(value) for name, value in facts.items()})
    return model.SerializeToString()


def checked(exported: Exported, precision: str, target: Path, normal: Images | None, size: int) -> Path:
    """Compare a file with its original, and say how they agree: on normal images, or on noise where those do not matter
    or are not there.

    Raises:
        UsageError: the float32 file is off, or another one gives no numbers.
    """
    noise = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)
    images = noise if normal is None or precision == "float32" else normal
    found = compare(exported, target, images)
    if not found.worst < (TOLERANCE if precision == "float32" else np.inf):
        raise UsageError(f"--mode export: the scores of {target} are off by {found.worst:.2g} of the highest")
    kind = "images of noise" if images is noise else "normal images"
    print(f"{target}: image (B, {size}, {size}, 3) -> {', '.join(exported.names)}; {len(images)} {kind}: {found}")
    return target


@torch.no_grad()
def compare(exported: Exported, file: Path | bytes, images: Images) -> Agreement:
    """A file, or its content, and the original on some images."""
    import onnxruntime

    source = file if isinstance(file, bytes) else str(file)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    parts = np.split(images, range(BATCH, len(images), BATCH))
    theirs = joined([session.run(None, {"image": part}) for part in parts])
    ours = joined([[v.numpy() for v in exported(torch.from_numpy(part))] for part in parts])
    gaps = [np.abs(a - b) / max(float(np.abs(b).max()), 1e-12) for a, b in zip(theirs[:2], ours[:2], strict=True)]
    verdict = exported.names.index("verdict") if "verdict" in exported.names else None
    return Agreement(
        images=len(images), map=float(gaps[0].max()), mean=float(gaps[0].mean()), score=float(gaps[1].max()),
        correlation=float(np.corrcoef(theirs[1], ours[1])[0, 1]),
        verdicts=None if verdict is None else int((theirs[verdict] == ours[verdict]).sum()),
    )  # fmt: skip


def joined(batches: Sequence[Sequence[NDArray]]) -> list[NDArray]:
    """Each output over all batches."""
    return [np.concatenate(column) for column in zip(*batches, strict=True)]
