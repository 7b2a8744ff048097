"""The built-in sample: crops of pictures that scikit-image ships, with drawn defects, in MVTec layout.

A demonstration that needs no download, not a benchmark: the defects are drawn, and a class is one picture. Crops to
train on, to calibrate with and to test come from disjoint parts of it. Every image follows from a seed of its own.
Drawings are exact: a mask holds the pixels that differ from the undrawn crop, all of them and no other.
"""

from __future__ import annotations

import contextlib
import importlib.resources
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from datasets.folder import GOOD, DatasetSpec
from datasets.walk import scan_mvtec
from default import UsageError

VERSION = "4"
MARKER = ".sample-version"
TRAIN, CALIBRATION, TEST_GOOD, PER_KIND = 48, 24, 12, 5
Picture = NDArray[np.uint8]
Region = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class Source:
    """A shipped picture: file, side of a crop in pixels, and disjoint parts for crops of the three roles.

    Calibration crops come from both sides of the test crops, as they are to be like them.

    `hides` names a class whose patches cannot be told from this one's own texture by eye.
    """

    file: str
    crop: int
    train: Region
    calibration: tuple[Region, Region]
    test: Region
    hides: str | None = None


# Train from one side, test from the middle of the other, calibration from both of its ends; 8 pixels lie between.
SOURCES = {
    "brick": Source(
        file="brick.png", crop=128, train=(0, 0, 512, 312), test=(168, 320, 344, 512),
        calibration=((0, 320, 160, 512), (352, 320, 512, 512)),
    ),
    "grass": Source(
        file="grass.png", crop=128, train=(0, 0, 312, 512), test=(320, 168, 512, 344),
        calibration=((320, 0, 512, 160), (320, 352, 512, 512)),
        hides="gravel",
    ),
    "gravel": Source(
        file="gravel.png", crop=128, train=(0, 0, 312, 512), test=(320, 168, 512, 344),
        calibration=((320, 0, 512, 160), (320, 352, 512, 512)),
        hides="grass",
    ),
    "retina": Source(
        file="retina.jpg", crop=192, train=(280, 200, 1130, 752), test=(568, 760, 842, 1200),
        calibration=((280, 760, 560, 1200), (850, 760, 1130, 1200)),
    ),
    "stars": Source(
        file="hubble_deep_field.jpg", crop=192, train=(0, 0, 1000, 512), test=(336, 520, 664, 872),
        calibration=((0, 520, 328, 872), (672, 520, 1000, 872)),
    ),
    "tissue": Source(
        file="ihc.png", crop=128, train=(0, 0, 312, 512), test=(320, 168, 512, 344),
        calibration=((320, 0, 512, 160), (320, 352, 512, 512)),
    ),
}  # fmt: skip


def read_source(source: Source) -> Picture:
    """The whole picture, RGB (H, W, 3)."""
    with importlib.resources.as_file(importlib.resources.files("skimage.data") / source.file) as path:
        return np.array(Image.open(path).convert("RGB"))


def region_of(source: Source, role: str, number: int) -> Region:
    """Where the crops of a role come from; calibration crops two by two from either side of the test crops, as every
    second one gives units and the others thresholds."""
    if role == "calibration":
        return source.calibration[number // 2 % 2]
    return source.train if role == "train" else source.test


def random_place(source: Source, region: Region, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a crop that lies inside `region`."""
    left, top, right, bottom = region
    return int(rng.integers(left, right - source.crop + 1)), int(rng.integers(top, bottom - source.crop + 1))


def random_crop(picture: Picture, source: Source, region: Region, rng: np.random.Generator) -> Picture:
    """The crop at a random place in `region`."""
    x, y = random_place(source, region, rng)
    return picture[y : y + source.crop, x : x + source.crop].copy()


def blob(side: int, rng: np.random.Generator, low: float, high: float) -> NDArray[np.bool_]:
    """A closed wavy shape of a radius between the shares `low` and `high` of the side, wholly inside the image."""
    radius = rng.uniform(low, high) * side
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    wave = np.ones(len(angle))
    for k in (2, 3, 5):
        wave += rng.uniform(0, 0.18) * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    margin = 1.6 * radius + 1
    x, y = rng.uniform(margin, side - margin, 2)
    stretch = rng.uniform(0.7, 1.0)
    points = [
        (x + radius * w * np.cos(a), y + radius * w * stretch * np.sin(a)) for a, w in zip(angle, wave, strict=True)
    ]
    canvas = Image.new("1", (side, side))
    ImageDraw.Draw(canvas).polygon(points, fill=1)
    return np.array(canvas)


def scratch(image: Picture, other: Picture, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A bent bright or dark line."""
    side = len(image)
    start, end = rng.uniform(0.1, 0.9, 2) * side, rng.uniform(0.1, 0.9, 2) * side
    while np.hypot(*(start - end)) < 0.35 * side:
        end = rng.uniform(0.1, 0.9, 2) * side
    bend = (start + end) / 2 + rng.normal(0, 0.08, 2) * side
    steps = np.linspace(0, 1, 60)[:, None]
    curve = (1 - steps) ** 2 * start + 2 * steps * (1 - steps) * bend + steps**2 * end
    canvas = Image.new("1", (side, side))
    ImageDraw.Draw(canvas).line([tuple(p) for p in curve], fill=1, width=int(rng.integers(3, 6)))
    mask = np.array(canvas)
    level = 235 if image[mask].mean() < 140 else 20
    blend(image, mask, np.full(3, level), 0.85)
    return mask


def stain(image: Picture, other: Picture, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A translucent spot of another colour."""
    mask = blob(len(image), rng, 0.09, 0.15)
    colours = np.array([[60, 30, 10], [20, 60, 40], [200, 170, 60], [120, 20, 30]])
    blend(image, mask, colours[rng.integers(len(colours))], rng.uniform(0.6, 0.75))
    return mask


def foreign_patch(image: Picture, other: Picture, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A piece of another class's picture."""
    mask, side = blob(len(image), rng, 0.09, 0.15), len(image)
    y, x = rng.integers(0, other.shape[0] - side), rng.integers(0, other.shape[1] - side)
    image[mask] = other[y : y + side, x : x + side][mask]
    return mask


def missing_part(image: Picture, other: Picture, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A hole: an even dark or light surface instead of the texture."""
    mask = blob(len(image), rng, 0.09, 0.15)
    level = 15 if image.mean() > 90 else 200
    image[mask] = (level + rng.normal(0, 3, (int(mask.sum()), 3))).clip(0, 255).astype(np.uint8)
    return mask


def blend(image: Picture, mask: NDArray[np.bool_], colour: NDArray, share: float) -> None:
    """Mix `colour` into the masked pixels, in place."""
    image[mask] = ((1 - share) * image[mask] + share * colour).round().astype(np.uint8)


def draw_defect(kind: str, image: Picture, other: Picture, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw a defect into `image` (S, S, 3), in place; returns the changed pixels (S, S).

    Where the drawing happens to repeat the value below it, the lowest bit is flipped: masks have no holes.
    """
    before = image.copy()
    mask = DEFECTS[kind](image, other, rng)
    image[mask & (image == before).all(axis=2)] ^= 1
    return mask


DEFECTS: dict[str, Callable[[Picture, Picture, np.random.Generator], NDArray[np.bool_]]] = {
    "foreign_patch": foreign_patch, "missing_part": missing_part, "scratch": scratch, "stain": stain,
}  # fmt: skip


def is_complete(root: Path) -> bool:
    """Whether this version of the sample lies in `root`; the marker is there only once everything is."""
    marker = root / MARKER
    return marker.is_file() and marker.read_text(encoding="utf-8") == VERSION


def make_sample(root: Path) -> None:
    """Write the sample to `root` unless it is there; a half-written one never is.

    Raises:
        UsageError: the folder cannot be written, or holds something else.
    """
    if is_complete(root):
        return
    root = root.resolve()  # "." has no name
    try:
        if root.is_dir() and any(root.iterdir()) and not (root / MARKER).is_file():
            raise UsageError(f"--data-path: {root} is not empty and is not the built-in sample; choose another folder")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=f"{root.name}.", suffix=".part") as part:
            for name in SOURCES:
                write_class(Path(part, "new", name), name)
            Path(part, "new", MARKER).write_text(VERSION, encoding="utf-8")
            with contextlib.suppress(OSError):
                root.rmdir()  # if it is empty
            if (root / MARKER).is_file() and not is_complete(root):  # of another version
                root.replace(Path(part, "old"))
            Path(part, "new").replace(root)
    except OSError as error:
        if not is_complete(root):  # another process may have been faster
            raise UsageError(f"--data-path: cannot write the sample to {root}: {error.strerror or error}") from error


def generator(*key: object) -> np.random.Generator:
    """Random numbers that follow from `key` (class, kind, number) alone."""
    return np.random.default_rng(zlib.crc32("/".join(map(str, key)).encode()))


def write_class(folder: Path, name: str) -> None:
    """One class: crops to train on and to calibrate with, good test crops, and test crops with each kind of defect and
    its mask."""
    source = SOURCES[name]
    picture = read_source(source)
    others = [read_source(other) for key, other in SOURCES.items() if key not in (name, source.hides)]
    counts = (("train", "train", TRAIN), ("calibration", "calibration", CALIBRATION), ("test", GOOD, TEST_GOOD))
    for role, key, count in counts:
        for number in range(count):
            crop = random_crop(picture, source, region_of(source, role, number), generator(name, key, number))
            save(folder / role / GOOD / f"{number:03d}.png", crop)
    for kind in DEFECTS:
        for number in range(PER_KIND):
            rng = generator(name, kind, number)
            crop = random_crop(picture, source, source.test, rng)
            mask = draw_defect(kind, crop, others[rng.integers(len(others))], rng)
            save(folder / "test" / kind / f"{number:03d}.png", crop)
            save(folder / "ground_truth" / kind / f"{number:03d}_mask.png", (mask * 255).astype(np.uint8))


def save(path: Path, image: Picture) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path, compress_level=1)


SPEC = DatasetSpec(title="sample", classes=tuple(SOURCES), places=("data/sample",), scan=scan_mvtec)
