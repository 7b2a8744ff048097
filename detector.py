"""A trained model for programs: images of any size in, a decision on each of them out.

    from detector import load_detector
    detector = load_detector("work_dirs/NAME")
    print(detector("part.png").defective)

Needs a checkpoint and nothing else: no data, no labels, no work folder.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

from datasets.decode import colours, read_pixels, shallow
from datasets.pixels import Pixels, check_size, has_transparency
from datasets.reading import PLAIN, Reading, picture
from datasets.transforms import to_tensor
from default import Config, UsageError, make_config
from models.decision import Verdict
from models.detector import Detector, Judgement
from models.scorer import image_scores
from stage import Stage, find_checkpoints, image_readings, normalization_of, settled_config
from stage import load_detector as load_model
from utils.run.checkpoint import read_checkpoint
from utils.run.seed import random_state, restore_random_state

Given = str | Path | Image.Image | NDArray
ARRAY = Path("array")  # how an image without a file is called in an error


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The highest place of a map: column `x` and row `y` in pixels of the image, from 0, and its `value`."""

    x: int
    y: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Region:
    """A connected part of a mask: the box from column `x` and row `y` on, in pixels, and its highest place."""

    x: int
    y: int
    width: int
    height: int
    peak: Peak


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What is said of an image of H x W pixels.

    Attributes:
        score: image score, higher where it is less normal.
        p_value: share of normal images that score as high or higher, in (0, 1].
        threshold: of the score.
        defective: the score is above it.
        map: (H, W) float32, the score of each place.
        pixel_threshold: of the map.
        mask: (H, W) bool, where the map is above it.
        peak: the map's highest place.
        regions: connected parts of the mask, the highest first.
        concept: number of the concept that the image has, None without codebooks.

    A model without thresholds gives None for `p_value`, `threshold`, `defective`, `pixel_threshold` and `mask`.
    """

    score: float
    p_value: float | None
    threshold: float | None
    defective: bool | None
    map: NDArray[np.float32]
    pixel_threshold: float | None
    mask: NDArray[np.bool_] | None
    peak: Peak
    regions: tuple[Region, ...]
    concept: int | None


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An image as the model wants it, (3, S, S) in [0, 1], its own `size` (width, height), and as people see it: RGB
    (H, W, 3)."""

    image: Tensor
    size: tuple[int, int]
    picture: NDArray[np.uint8]


class ImageDetector:
    """Judges images; several threads may share it. Made by `load_detector`.

    Args:
        stage: device and extractor.
        model: flow, scorer and thresholds.
        readings: ways of reading of the classes that an image may be of.
    """

    def __init__(self, stage: Stage, model: Detector, readings: Sequence[Reading]) -> None:
        self.stage, self.model, self.readings = stage, model, tuple(dict.fromkeys(readings)) or (PLAIN,)
        self._lock = threading.Lock()  # what a model keeps between images is not per thread, nor are PyTorch's settings

    @property
    def config(self) -> Config:
        return self.stage.config

    @property
    def decides(self) -> bool:
        """Whether the model has thresholds."""
        return self.model.decision is not None

    def __call__(self, images: Any) -> Any:
        """A `Prediction` of an image, a list of them of a list.

        Args:
            images: a path, a picture of Pillow's, or an array (H, W) or (H, W, 3), grey or RGB: uint8, floating-point
                numbers (in [0, 1] unless the model was trained on others), or deeper integers; or a list of such.

        Raises:
            UsageError: an image cannot be read.
        """
        if not isinstance(images, (list, tuple)):
            return self.judge([self.read(images)])[0]
        size = self.config.train.batch_size
        opened = [self.read(image) for image in images]
        return [found for i in range(0, len(opened), size) for found in self.judge(opened[i : i + size])]

    def read(self, image: Given) -> Opened:
        """Read an image.

        Raises:
            UsageError: it cannot be read, or is too large.
        """
        limit = self.config.data.max_pixels
        path = Path(image) if isinstance(image, (str, Path)) else ARRAY
        pixels = read_pixels(path, limit) if path is not ARRAY else pixels_of(image)
        check_size(path, pixels.size, limit)
        reading = self._reading(path, pixels)
        return Opened(
            image=to_tensor(path, pixels, self.config.data.input_size, reading), size=pixels.size,
            picture=seen(path, pixels, reading),
        )  # fmt: skip

    def _reading(self, path: Path, pixels: Pixels) -> Reading:
        """How to read an image: opaque ones of 8 bits are read alike in all classes."""
        if len(self.readings) == 1 or (pixels.image is not None and not has_transparency(pixels.image)):
            reading = self.readings[0]
        else:
            ways = "; ".join(str(reading) or "opaque, 8 bits" for reading in self.readings)
            raise UsageError(
                f"{path}: the model reads such images of its classes in different ways ({ways}); say which class it is "
                "of: --class-names CLASS, class_name= in Python"
            )
        floats = pixels.values is not None and pixels.values.dtype.kind == "f"
        if path is ARRAY and floats and reading.floats is None:
            return Reading(integers=reading.integers, floats=(0.0, 1.0), background=reading.background)
        return reading

    @torch.no_grad()
    def judge(self, opened: Sequence[Opened]) -> list[Prediction]:
        """A batch of images."""
        config = self.config.eval
        with self._lock:
            kept = self.stage.extract(torch.stack([o.image for o in opened]).to(self.stage.device))
            judgement = self.model.judge(kept)
            scores = image_scores(getattr(judgement.maps, config.image_score), config.top_k)
            maps = getattr(judgement.maps, config.shown_score).cpu().numpy()
            verdict = self.model.decide(judgement, scores) if self.decides else None
        rows = enumerate(zip(opened, maps, strict=True))
        return [prediction(row, one, scores, heat, judgement, verdict) for row, (one, heat) in rows]


def load_detector(
    path: str | Path, *, class_name: str | None = None, preset: str | None = None, **settings: Any
) -> ImageDetector:
    """A trained model, ready to judge images.

    Args:
        path: run folder, or a checkpoint.
        class_name: of a run with a model for each class, the one to load; where a model reads deep or transparent
            images of its classes in different ways, the class whose way counts.
        preset: settings of a checkpoint of the released code, which brings none.
        settings: of `default.py` by name, such as device="cpu" or false_alarm_rate=0.05; what a checkpoint fixes
            cannot be chosen.

    Raises:
        UsageError: there is no such checkpoint, class or setting.
    """
    asked = settings | {"eval_ckpt": str(path), "mode": "predict"}
    if class_name is not None:
        asked["class_names"] = (class_name,)
    return loaded(make_config(preset, **asked), asked)


def loaded(config: Config, chosen: dict[str, Any]) -> ImageDetector:
    """As `load_detector`, from what a command line says: see `test.run_test`."""
    path = Path(str(config.eval.eval_ckpt))
    if path.suffix == ".onnx":
        raise UsageError(f"--eval_ckpt: expected a run folder or a checkpoint, but got {path}; run it with onnxruntime")
    paths = find_checkpoints(path, config.data.class_names)
    if len(paths) > 1:
        models = ", ".join(p.parent.name for p in paths)
        raise UsageError(
            f"--eval_ckpt: {path} holds a model for each class; choose one of {models} with --class-names CLASS "
            "(class_name= in Python)"
        )
    content, state = read_checkpoint(paths[0]), random_state()
    try:  # weights are drawn before they are loaded; other random numbers of the program must not notice
        own = settled_config(content, config, chosen, str(paths[0]))
        stage = Stage(own, normalization_of(content))
        model = load_model(content, stage, str(paths[0]))
    finally:
        restore_random_state(state)
    names = own.data.class_names if "classes" in content else ()
    return ImageDetector(stage, model, list(image_readings(content, names).values()))


def pixels_of(image: Any) -> Pixels:
    """An image in memory.

    Raises:
        UsageError: neither a picture nor an array that is one.
    """
    if isinstance(image, Image.Image) and not (image.mode.startswith("I") or image.mode == "F"):
        return shallow(ARRAY, image)
    values = np.asarray(image)
    kind = f"{type(image).__name__} of shape {values.shape} and {values.dtype}"
    if values.ndim not in (2, 3) or not values.size or (values.ndim == 3 and values.shape[2] not in (1, 3)):
        raise UsageError(f"image: expected (H, W) or (H, W, 3), grey or RGB, but got {kind}")
    if values.dtype == np.uint8:
        return Pixels(image=Image.fromarray(values[..., 0] if values.shape[2:] == (1,) else values))
    if values.dtype.kind not in "iuf":
        raise UsageError(f"image: expected uint8, deeper integers or floating-point numbers, but got {kind}")
    return colours(values.astype(np.float32) if values.dtype == np.float16 else values, 1)


def seen(path: Path, pixels: Pixels, reading: Reading) -> NDArray[np.uint8]:
    """An image as people see it: RGB (H, W, 3)."""
    planes = picture(path, pixels, reading)
    if planes[0].mode != "F":
        return np.array(planes[0].convert("RGB"))
    level = np.stack([np.asarray(plane) for plane in planes], 2).clip(0, 1)
    return np.broadcast_to((level * 255).round().astype(np.uint8), (*level.shape[:2], 3)).copy()


def prediction(
    row: int, opened: Opened, scores: Tensor, heat: NDArray, judgement: Judgement, verdict: Verdict | None
) -> Prediction:
    """What is said of the image number `row` of a batch, its map (h, w) drawn out to the image's size.

    Interpolated values are no higher than the map's own, so that a threshold of the map's maximum holds for them too.
    """
    drawn = np.asarray(cv2.resize(heat, opened.size, interpolation=cv2.INTER_LINEAR), np.float32)
    concept, place = judgement.output.concept, int(drawn.argmax())
    y, x = divmod(place, drawn.shape[1])
    limit = None if verdict is None else float(verdict.pixel_threshold[row])
    mask = None if limit is None else drawn > limit
    return Prediction(
        score=float(scores[row]), map=drawn, mask=mask, pixel_threshold=limit,
        p_value=None if verdict is None else float(verdict.p_value[row]),
        threshold=None if verdict is None else float(verdict.threshold[row]),
        defective=None if verdict is None else bool(verdict.defective[row]),
        peak=Peak(x=x, y=y, value=float(drawn[y, x])), regions=() if mask is None else regions_of(drawn, mask),
        concept=None if concept is None else int(concept[row]),
    )  # fmt: skip


def regions_of(values: NDArray, mask: NDArray[np.bool_]) -> tuple[Region, ...]:
    """The 8-connected parts of a mask (H, W), the one with the highest of `values` (H, W) first."""
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    places = ndimage.maximum_position(values, labels, range(1, count)) if count > 1 else []
    found = [
        Region(x=x, y=y, width=w, height=h, peak=Peak(x=int(px), y=int(py), value=float(values[py, px])))
        for (x, y, w, h), (py, px) in zip(boxes[1:, :4].tolist(), places, strict=True)
    ]
    return tuple(sorted(found, key=lambda region: -region.peak.value))
