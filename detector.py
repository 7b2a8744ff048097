"""A trained model for programs: images of any size in, a decision on each of them out.

    from detector import load_detector
    detector = load_detector("work_dirs/NAME")
    print(detector("part.png").defective)

Needs a checkpoint and nothing else: no data, no labels, no work folder.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datasets.decode import colours, read_pixels, shallow
from datasets.geometry import Geometry, Stitch
from datasets.pixels import Pixels, check_size, has_transparency
from datasets.reading import PLAIN, Reading
from datasets.reading import picture as planes
from datasets.transforms import planes_tensor
from default import KEPT, Config, UsageError, flag_of, make_config, settings_of, shown
from engine import Answer, Engine, Features, Graph, Torch, file_engine, installed, quickest
from models.extractor import Normalization
from prediction import Prediction, normality, prediction
from stage import Stage, find_checkpoints, image_readings, normalization_of, settled_config
from stage import load_detector as load_model
from utils.run.checkpoint import read_checkpoint
from utils.run.engines import EXTRAS, has_8_bits
from utils.run.seed import random_state, restore_random_state

Given = str | Path | Image.Image | NDArray
ARRAY = Path("array")  # how an image without a file is called in an error


@dataclass(frozen=True, kw_only=True)
class Opened:
    """An image: `views` of it as models want it, by the numbers of those that read it alike; its own `size` (width,
    height), and as people see it: RGB (H, W, 3)."""

    views: Mapping[tuple[int, ...], Views]
    size: tuple[int, int]
    picture: NDArray[np.uint8]


class Views:
    """An image, or its tiles one after the other, each (3, S, S) in [0, 1] and made when it is asked for.

    Args:
        planes: as `datasets.reading.picture` gives them.
    """

    def __init__(self, planes: Sequence[Image.Image], geometry: Geometry) -> None:
        self.planes, self.geometry, self.boxes = planes, geometry, geometry.tiles(planes[0].size)

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, number: int) -> Tensor:
        return planes_tensor([plane.crop(self.boxes[number]) for plane in self.planes], self.geometry)


class Whole:
    """What a model says of an image, from what it says of each of its `views`."""

    def __init__(self, size: tuple[int, int], views: Views) -> None:
        self.size, self.views = size, views
        self.stitch = Stitch(size, views.geometry.overlap) if views.geometry.tile else None
        self.best: Answer | None = None

    def add(self, number: int, answer: Answer) -> None:
        """Of the view of this number."""
        if self.stitch is not None:
            self.stitch.add(answer.map, self.views.boxes[number])
        if self.best is None or answer.score > self.best.score:
            self.best = answer

    def answer(self) -> Answer:
        """Its highest view's, with the map of all at the image's own size."""
        assert self.best is not None
        if self.stitch is not None:
            return replace(self.best, map=self.stitch.map)
        return replace(self.best, map=self.views.geometry.place(self.size).drawn(self.best.map))


@dataclass(frozen=True, kw_only=True)
class Member:
    """A model: what computes it, the only class that it knows (None: it is a model of many), and the ways in which it
    reads images of its classes."""

    engine: Engine
    class_name: str | None
    readings: tuple[Reading, ...]


class ImageDetector:
    """Judges images; several threads may share it. Made by `load_detector`.

    Of several models, one for each class, that one answers which finds an image most normal: the one with the highest
    p-value, of those the one whose score is farthest below its threshold, as a share of it. So an image is called
    defective if no model finds it normal, and normal images of a class are seldomer so than by its model alone.

    Args:
        config: batch size, image size and limits.
        members: one model, or several that have thresholds.
        graph: of a single model, from which quicker engines may be made (`hurry`).
    """

    def __init__(self, config: Config, members: Sequence[Member], graph: Graph | None = None) -> None:
        self.config, self.members, self.graph = config, list(members), graph
        self.geometry = Geometry.of(config.data)
        self._lock = threading.Lock()  # what a model keeps between images is not per thread, nor are PyTorch's settings

    @property
    def decides(self) -> bool:
        """Whether there are thresholds."""
        return self.members[0].engine.rule is not None

    @property
    def engine(self) -> str:
        """What computes: torch, onnxruntime or openvino."""
        return self.members[0].engine.name

    def rules(self) -> list[str]:
        """How it is decided, a line for each model that has thresholds."""
        rules = [(member.class_name, member.engine.rule) for member in self.members if member.engine.rule]
        return [f"{name}: {rule}" if name and len(rules) > 1 else rule for name, rule in rules]

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
            UsageError: it cannot be read, by none of several models, or is too large.
        """
        limit = self.config.data.max_pixels
        path = Path(image) if isinstance(image, (str, Path)) else ARRAY
        pixels = read_pixels(path, limit) if path is not ARRAY else pixels_of(image)
        check_size(path, pixels.size, limit)
        views, problem, picture = {}, None, None
        for reading, numbers in self._ways(path, pixels).items():
            try:
                views[numbers] = Views(planes(path, pixels, reading), self.geometry)
                picture = seen(path, pixels, reading) if picture is None else picture
            except UsageError as error:  # deeper than all images of a class are: its model does not answer
                problem = problem or error
        if picture is None:
            raise problem or UsageError(f"{path}: no model reads it")
        if not (
            self.members[0].engine.deep or all(has_8_bits(own[n]) for own in views.values() for n in range(len(own)))
        ):
            raise UsageError(f"{path}: has more than 8 bits per channel, an ONNX file takes 8; give the checkpoint")
        return Opened(views=views, size=pixels.size, picture=picture)

    def _ways(self, path: Path, pixels: Pixels) -> dict[Reading, tuple[int, ...]]:
        """How an image may be read, and the numbers of the models that want it so: opaque ones of 8 bits are read alike
        in all classes."""
        plain = pixels.image is not None and not has_transparency(pixels.image)
        ways: dict[Reading, tuple[int, ...]] = {}
        for number, member in enumerate(self.members):
            reading = self.members[0].readings[0] if plain else as_given(path, pixels, only(path, member.readings))
            ways[reading] = (*ways.get(reading, ()), number)
        return ways

    def judge(self, opened: Sequence[Opened]) -> list[Prediction]:
        """A batch of images."""
        with self._lock:
            answers = self._answers(opened)
        made = []
        for own in answers:
            number = max(own, key=lambda number: normality(own[number])) if len(own) > 1 else next(iter(own))
            made.append(prediction(own[number], self.members[number].class_name))
        return made

    def _answers(self, opened: Sequence[Opened]) -> list[dict[int, Answer]]:
        """What each model that can read an image says of it, by the models' numbers; its map has the image's size.

        As many views are there at a time as go into a batch, however many tiles an image has.
        """
        found: list[dict[int, Whole]] = [{} for _ in opened]
        for numbers in dict.fromkeys(numbers for one in opened for numbers in one.views):
            rows = [row for row, one in enumerate(opened) if numbers in one.views]
            for row in rows:
                found[row] |= {n: Whole(opened[row].size, opened[row].views[numbers]) for n in numbers}
            parts = [(row, part) for row in rows for part in range(len(opened[row].views[numbers]))]
            for start in range(0, len(parts), self.config.train.batch_size):
                chunk = parts[start : start + self.config.train.batch_size]
                image = torch.stack([opened[row].views[numbers][part] for row, part in chunk])
                for number in numbers:
                    for (row, part), answer in zip(chunk, self.members[number].engine(image), strict=True):
                        found[row][number].add(part, answer)
        return [{number: one.answer() for number, one in own.items()} for own in found]

    def hurry(self, opened: Sequence[Opened]) -> str:
        """Go on with the engine that is quickest on these images, and say which; see `engine.quickest`."""
        assert self.graph is not None
        image, own = torch.stack([next(iter(one.views.values()))[0] for one in opened]), self.members[0]
        with self._lock:
            engine, told = quickest(installed(self.graph), image)
            self.members, self.graph = [replace(own, engine=engine)], None
        return told


def load_detector(
    path: str | Path, *, class_name: str | None = None, preset: str | None = None, **settings: Any
) -> ImageDetector:
    """A trained model, ready to judge images.

    Args:
        path: run folder, a checkpoint, or an ONNX file of `--mode export`.
        class_name: of a run with a model for each class, the one to load instead of all; where a model reads deep or
            transparent images of its classes in different ways, the class whose way counts.
        preset: settings of a checkpoint of the released code, which brings none.
        settings: of `default.py` by name, such as device="cpu", engine="onnxruntime" or false_alarm_rate=0.05; what a
            checkpoint fixes cannot be chosen.

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
        return from_file(path, config, chosen)
    paths, state = find_checkpoints(path, config.data.class_names), random_state()
    features: dict[tuple[Config, Normalization], Features] = {}  # models of one run share an extractor
    try:  # weights are drawn before they are loaded; other random numbers of the program must not notice
        members = [member_of(p, config, chosen, features) for p in paths]
    finally:
        restore_random_state(state)
    undecided = [p for p, member in zip(paths, members, strict=True) if member.engine.rule is None]
    if len(paths) > 1 and undecided:
        raise UsageError(
            f"--eval_ckpt: {undecided[0]} has no thresholds for these scores, by which one of several models is "
            "chosen; name a class with --class-names CLASS (class_name= in Python)"
        )
    own = next(iter(features.values())).stage.config
    single = members[0].engine
    alone = len(members) == 1 and next(iter(features.values())).stage.device.type == "cpu"
    graph = Graph(paths[0], own, single) if alone and isinstance(single, Torch) else None
    return ImageDetector(own, members, graph)


def member_of(
    path: Path, config: Config, chosen: dict[str, Any], features: dict[tuple[Config, Normalization], Features]
) -> Member:
    """The model of a checkpoint, on an extractor among `features` or a new one."""
    content = read_checkpoint(path)
    own, normalization = settled_config(content, config, chosen, str(path)), normalization_of(content)
    names = own.data.class_names if "classes" in content else ()
    key = replace(own, data=replace(own.data, class_names=())), normalization
    if key not in features:
        features[key] = Features(Stage(own, normalization))
    stage = features[key].stage
    original = Torch(features[key], load_model(content, stage, str(path)))
    engine: Engine = original
    if own.predict.engine in EXTRAS:
        if stage.device.type != "cpu":
            raise UsageError(f"--engine {own.predict.engine}: computes on the cpu, not on {stage.device}; --device cpu")
        engine = Graph(path, own, original).engine(own.predict.engine)
    return Member(
        engine=engine, class_name=names[0] if names and not own.data.multi_class else None,
        readings=tuple(dict.fromkeys(image_readings(content, names).values())) or (PLAIN,),
    )  # fmt: skip


def from_file(path: Path, config: Config, chosen: dict[str, Any]) -> ImageDetector:
    """A detector of an ONNX file.

    Raises:
        UsageError: see `file_engine`; or something is asked for that the file fixes.
    """
    engine = file_engine(path, config)
    facts, classes = engine.facts, tuple(engine.facts["classes"])
    for name in settings_of(*KEPT):
        if name in chosen and name not in ("class_names", "batch_size") and chosen[name] != facts.get(name):
            has = f" {shown(facts[name])}" if name in facts else ""
            raise UsageError(f"{flag_of(name)}: {path} has its own{has}; leave it out, or export the model again")
    asked = config.data.class_names
    others = [name for name in asked if name not in ("all", *classes)]
    if others:
        raise UsageError(f"--class-names: {path} is no model of {others[0]!r}; choose from all, {', '.join(classes)}")
    names = classes if "all" in asked else asked
    readings = image_readings(dict(facts), names)
    member = Member(
        engine=engine, class_name=None if facts["multi_class"] else classes[0],
        readings=tuple(dict.fromkeys(readings.values())) or (PLAIN,),
    )  # fmt: skip
    shape = {name: facts[name] for name in ("input_size", "resize", "center_crop", "tile", "overlap")}
    return ImageDetector(replace(config, data=replace(config.data, **shape)), [member])


def only(path: Path, readings: Sequence[Reading]) -> Reading:
    """The one way in which a model reads images that are deep or transparent.

    Raises:
        UsageError: there are several.
    """
    if len(readings) > 1:
        ways = "; ".join(str(reading) or "opaque, 8 bits" for reading in readings)
        raise UsageError(
            f"{path}: the model reads such images of its classes in different ways ({ways}); say which class it is of: "
            "--class-names CLASS, class_name= in Python"
        )
    return readings[0]


def as_given(path: Path, pixels: Pixels, reading: Reading) -> Reading:
    """A reading; floating-point numbers in memory are in [0, 1] unless it says otherwise."""
    floats = pixels.values is not None and pixels.values.dtype.kind == "f"
    return replace(reading, floats=(0.0, 1.0)) if path is ARRAY and floats and reading.floats is None else reading


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
    found = planes(path, pixels, reading)
    if found[0].mode != "F":
        return np.array(found[0].convert("RGB"))
    level = np.stack([np.asarray(plane) for plane in found], 2).clip(0, 1)
    return np.broadcast_to((level * 255).round().astype(np.uint8), (*level.shape[:2], 3)).copy()
