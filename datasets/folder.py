"""What a data set is, and the one Dataset class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from typing import Protocol as TypingProtocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datasets.decode import read_pixels
from datasets.geometry import Box, Geometry, Place, Size
from datasets.masks import at_size, follow, load_mask, read_marks
from datasets.pixels import MAX_PIXELS, Header, read_header
from datasets.reading import PLAIN, Reading, picture
from datasets.transforms import planes_tensor, to_tensor

GOOD = "good"


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image file: its mask (None: no defect, or none drawn; a folder: all in it together), label (1 defective),
    class, kind of defect, and its name within the kind without suffix (cam1/000 where images lie in nested folders).
    `held_out`: a normal image that the data set itself keeps out of training."""

    path: Path
    mask_path: Path | None
    label: int
    class_index: int
    kind: str
    name: str
    held_out: bool = False
    box: Box | None = None  # the part of the image that is meant


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What the folder of a class holds: normal images (those that it keeps out of training among them) and test images,
    and how many files of which sort are left out."""

    train: list[Item]
    test: list[Item]
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> Counts:
        """In numbers."""
        bad, held_out = sum(item.label for item in self.test), sum(item.held_out for item in self.train)
        return Counts(train=len(self.train) - held_out, good=len(self.test) - bad, bad=bad, held_out=held_out)

    def line(self, name: str) -> str:
        """One line for people: class, images and masks in numbers."""
        counts, count = self.counts, sum(self.ignored.values())
        masks = sum(item.mask_path is not None for item in self.test)
        calibration = f", calibration {counts.held_out}" if counts.held_out else ""
        sorts = [f"{sort} {n}" if len(self.ignored) > 1 else sort for sort, n in self.ignored.items()]
        return (
            f"{name}: train {counts.train}{calibration}, good {counts.good}, defective {counts.bad}, "
            f"masks {masks}, ignored {count}" + (f" ({', '.join(sorts)})" if count else "")
        )


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image: `image` (3, S, S) float32 in [0, 1], `mask` (M, M) bool, the rest as in `Item`."""

    image: Tensor
    mask: Tensor
    label: int
    class_index: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`image` (B, 3, S, S) in [0, 1], `mask` (B, M, M) bool, `label` and `class_index` (B,) int64, `path` B names."""

    image: Tensor
    mask: Tensor
    label: Tensor
    class_index: Tensor
    path: tuple[str, ...]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """On another device."""
        moved = {
            n: getattr(self, n).to(device, non_blocking=non_blocking) for n in ("image", "mask", "label", "class_index")
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """In page-locked memory; called by the loader."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in ("image", "mask", "label", "class_index")})


@dataclass(frozen=True, kw_only=True)
class Counts:
    """How many images a class has: normal ones to train on, normal ones kept out of training, good and defective ones
    to test."""

    train: int
    good: int
    bad: int
    held_out: int = 0

    def __str__(self) -> str:
        kept = f", held out {self.held_out}" if self.held_out else ""
        return f"train {self.train}{kept}, good {self.good}, defective {self.bad}"


class Protocol(TypingProtocol):
    """Metrics of one data set beside the seven, gathered while an evaluation passes the images of a class."""

    def check(self) -> None:
        """Raise `UsageError` for what `add` could not measure; called before anything is trained."""

    def add(self, path: str, label: int, score: float, heat: Tensor) -> None:
        """An image with its score and score map (M, M)."""

    def merge(self, other: Any) -> None:
        """Add what one of the same kind, of the same class, has gathered of other images."""

    def results(self) -> dict[str, float]:
        """Metric -> fraction, NaN where it is not defined."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What a data set is.

    Attributes:
        classes: names, or None where they are the folders' names.
        places: default folders, the first one that exists counts.
        scan: class folder (root / name), class index, names of folders of good images -> what it holds.
        hint: said when the folder is missing.
        layout: what a copy looks like, said when one does not.
        licence, citation: of the data.
        counts: of the official copy, by class.
        total: of all classes together, where that alone is published.
        inner: folders that the archive unpacks into, looked for below the given one.
        prepare: makes of the root what `scan` reads; does nothing the second time.
        found: root -> the classes there, where they are not folders in it.
        overlapping: classes are different splits of the same images, which one model must not see together.
        trusts_masks: the official masks hold what would be a mistake elsewhere, such as empty ones.
        protocol: test images of a class -> the metrics of its own that the data set asks for.
    """

    title: str
    classes: tuple[str, ...] | None
    places: tuple[str, ...]
    scan: Callable[[Path, int, Sequence[str]], Scan]
    hint: str = ""
    layout: str = ""
    licence: str = ""
    citation: str = ""
    counts: Mapping[str, Counts] = field(default_factory=dict)
    total: Counts | None = None
    inner: tuple[str, ...] = ()
    prepare: Callable[[Path], None] | None = None
    found: Callable[[Path], Sequence[str]] | None = None
    overlapping: bool = False
    trusts_masks: bool = False
    protocol: Callable[[Sequence[Item]], Protocol | None] | None = None


class ImageFolder(Dataset[Sample]):
    """The images of some items as squares, their masks of the same size unless `mask_size` says another one.

    `readings` say how the images of each class are read, by class index; without any they are plain.
    """

    def __init__(
        self,
        items: Sequence[Item],
        geometry: Geometry,
        mask_size: int | None = None,
        readings: Sequence[Reading] = (),
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.items, self.geometry, self.mask_size = tuple(items), geometry, mask_size or geometry.side
        self.readings, self.max_pixels = tuple(readings), max_pixels
        self._headers: dict[int, Header] = {}
        self._last: tuple[Path, list[Image.Image]] | None = None  # what was decoded last

    @property
    def input_size(self) -> int:
        """Side of the squares."""
        return self.geometry.side

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item, size = self.items[index], self.mask_size
        if item.box is not None:
            return self._tile(item, item.box)
        pixels = read_pixels(item.path, self.max_pixels)
        mask = torch.zeros(size, size, dtype=torch.bool)
        if item.mask_path is not None:
            mask = load_mask(item.mask_path, size, pixels.size, pixels.orientation, self.max_pixels, self.geometry)
        return Sample(
            image=to_tensor(item.path, pixels, self.geometry, self.reading(item)),
            mask=mask,
            label=item.label,
            class_index=item.class_index,
            path=str(item.path),
        )

    def _tile(self, item: Item, box: Box) -> Sample:
        """A tile, without a mask; the image that was decoded last is kept for the next tile of it."""
        if self._last is None or self._last[0] != item.path:
            self._last = item.path, picture(item.path, read_pixels(item.path, self.max_pixels), self.reading(item))
        return Sample(
            image=planes_tensor([plane.crop(box) for plane in self._last[1]], self.geometry),
            mask=torch.zeros(self.mask_size, self.mask_size, dtype=torch.bool),
            label=item.label, class_index=item.class_index, path=str(item.path),
        )  # fmt: skip

    @cached_property
    def owners(self) -> list[int]:
        """Of each item of `tiled`, the number of its image here."""
        if self.geometry.tile is None:
            return list(range(len(self)))
        return [number for number in range(len(self)) for _ in self.boxes(number)]

    @cached_property
    def tiled(self) -> ImageFolder:
        """Their tiles, image by image, as a data set of its own; themselves without --tile."""
        if self.geometry.tile is None:
            return self
        return self.having([replace(self.items[n], box=b) for n in range(len(self)) for b in self.boxes(n)])

    def boxes(self, number: int) -> list[Box]:
        """The tiles of an image."""
        return self.geometry.tiles(self.place(number).size)

    def place(self, number: int) -> Place:
        """Where an image lies on its square."""
        return self.geometry.place(self._header(number).upright)

    def marks(self, number: int, target: Size | None = None) -> NDArray[np.bool_]:
        """What the mask of an image marks of all that is seen of it: (h, w), at the image's own or another size."""
        item, place = self.items[number], self.place(number)
        size = target or place.size
        rows, columns = place.seen(size)
        if item.mask_path is None:
            return np.zeros((rows.stop - rows.start, columns.stop - columns.start), bool)
        marks = read_marks(item.mask_path, self.max_pixels)
        return at_size(follow(marks, place.size, self._header(number).orientation), size)[rows, columns]

    def _header(self, number: int) -> Header:
        if number not in self._headers:
            self._headers[number] = read_header(self.items[number].path, self.max_pixels)
        return self._headers[number]

    def reading(self, item: Item) -> Reading:
        """How an image is read."""
        return self.readings[item.class_index] if self.readings else PLAIN

    def having(self, items: Sequence[Item], mask_size: int | None = None) -> ImageFolder:
        """Other images, or masks of another size, read in the same way."""
        return ImageFolder(items, self.geometry, mask_size or self.mask_size, self.readings, self.max_pixels)


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples as one batch."""
    return Batch(
        image=torch.stack([s.image for s in samples]),
        mask=torch.stack([s.mask for s in samples]),
        label=torch.tensor([s.label for s in samples]),
        class_index=torch.tensor([s.class_index for s in samples]),
        path=tuple(s.path for s in samples),
    )
