"""How images of any shape become squares, and how what is said of a square lies on its image again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from default import DataConfig

Size = tuple[int, int]  # width, height
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What `DataConfig` says under the same names.

    The centre of a square of `input_size` is what is cropped (`center_crop`, Dinomaly's protocol, arXiv 2405.14325),
    with torchvision's rounding.
    """

    input_size: int
    resize: str = "squash"
    center_crop: int | None = None
    tile: int | None = None
    overlap: int = 0

    @classmethod
    def of(cls, data: DataConfig) -> Geometry:
        """That of a configuration."""
        return cls(
            input_size=data.input_size, resize=data.resize, center_crop=data.center_crop, tile=data.tile,
            overlap=data.shared if data.tile else 0,
        )  # fmt: skip

    @property
    def side(self) -> int:
        """S, of the squares."""
        return self.center_crop or self.input_size

    @property
    def pads(self) -> bool:
        """Whether there may be places of a square that are none of its image."""
        return self.resize == "pad"

    @property
    def whole(self) -> bool:
        """Whether a square shows all of its image, and nothing else."""
        return self.resize == "squash" and self.center_crop is None

    def tiles(self, size: Size) -> list[Box]:
        """The parts of an image (width, height) that are seen one by one, row by row: all of it without --tile."""
        width, height = size
        if self.tile is None:
            return [(0, 0, width, height)]
        columns, rows = (starts(side, self.tile, self.overlap) for side in size)
        return [(x, y, min(x + self.tile, width), min(y + self.tile, height)) for y in rows for x in columns]

    def place(self, size: Size) -> Place:
        """Where an image (width, height) lies."""
        near = {"squash": None, "pad": max(size), "crop": min(size)}[self.resize]
        width, height = (max(round(self.input_size * own / (near or own)), 1) for own in size)
        return Place(size=size, scaled=(width, height), side=self.side)


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where the fewest tiles begin that cover a side, share `overlap` pixels at least, and lie at equal distances."""
    count = max(-(-(side - overlap) // (tile - overlap)), 1) if side > tile else 1
    return [round(n * (side - tile) / (count - 1)) for n in range(count)] if count > 1 else [0]


@dataclass(frozen=True, kw_only=True)
class Place:
    """An image of `size` on a square of `side`, on whose centre it lies, resized to `scaled`."""

    size: Size
    scaled: Size
    side: int

    @property
    def offsets(self) -> Size:
        """Columns and rows of the resized image that are cut off on the left and at the top; padded if negative."""
        left, top = (round((scaled - self.side) / 2) for scaled in self.scaled)
        return left, top

    @property
    def used(self) -> tuple[int, int, int, int]:
        """The square's part that shows the image: left, top, right, bottom."""
        (x, y), (width, height) = self.offsets, self.scaled
        return max(-x, 0), max(-y, 0), min(width - x, self.side), min(height - y, self.side)

    def visible(self, size: Size) -> tuple[float, float, float, float]:
        """The part of the image that the square shows, in pixels of a copy of it of another size."""
        (x, y), (left, top, right, bottom) = self.offsets, self.used
        across, down = (own / scaled for own, scaled in zip(size, self.scaled, strict=True))
        return (left + x) * across, (top + y) * down, (right + x) * across, (bottom + y) * down

    def seen(self, size: Size) -> tuple[slice, slice]:
        """`visible` in whole rows and columns."""
        left, top, right, bottom = (round(edge) for edge in self.visible(size))
        return slice(top, max(bottom, top + 1)), slice(left, max(right, left + 1))

    def part(self, values: NDArray) -> NDArray:
        """What a map (M, M) of the square says of the image."""
        left, top, right, bottom = (round(edge * len(values) / self.side) for edge in self.used)
        return values[top : max(bottom, top + 1), left : max(right, left + 1)]

    def square(self, planes: Sequence[Image.Image]) -> NDArray:
        """Lanczos resize of channels or of one image, edges repeated where it is padded: (S, S, C), as in `planes`."""
        left, top, right, bottom = self.used
        box = self.visible(planes[0].size)
        shape = right - left, bottom - top
        made = [np.asarray(plane.resize(shape, Image.Resampling.LANCZOS, box)) for plane in planes]
        image = np.concatenate([one.reshape(*one.shape[:2], -1) for one in made], 2)
        return np.pad(image, ((top, self.side - bottom), (left, self.side - right), (0, 0)), "edge")

    def mask(self, marks: NDArray[np.bool_], side: int) -> Tensor:
        """Marks of the image, of any size, on a square of `side` by nearest neighbour, none where it is padded."""
        left, top, right, bottom = (round(edge * side / self.side) for edge in self.used)
        shape = max(right - left, 1), max(bottom - top, 1)
        image = Image.fromarray(marks.astype(np.uint8) * 255)
        box = self.visible(image.size)
        found = torch.zeros(side, side, dtype=torch.bool)
        nearest = np.array(image.resize(shape, Image.Resampling.NEAREST, box)) > 127
        found[top : top + shape[1], left : left + shape[0]] = torch.from_numpy(nearest)
        return found

    def drawn(self, values: NDArray, size: Size | None = None) -> NDArray[np.float32]:
        """A map (M, M) of the square at the image's own size or another one; what is cut off has its lowest value.

        Interpolated values are no higher than the map's own, so that a threshold of the map's maximum holds for them
        too.
        """
        width, height = size or self.size
        rows, columns = self.seen((width, height))
        shape = columns.stop - columns.start, rows.stop - rows.start
        part = np.asarray(cv2.resize(self.part(values), shape, interpolation=cv2.INTER_LINEAR), np.float32)
        if part.shape == (height, width):
            return part
        made = np.full((height, width), part.min(), np.float32)
        made[rows, columns] = part
        return made


class Stitch:
    """The score map of an image, put together from those of its tiles, in the memory of two maps.

    A tile counts the less the nearer a place is to its border, over the width of the `overlap`: what two tiles say of a
    place passes from the one to the other without a seam.

    Args:
        size: of the image.
        target: size of the map; default: that of the image.
    """

    def __init__(self, size: Size, overlap: int, target: Size | None = None) -> None:
        width, height = target or size
        self.across, self.down, self.overlap = width / size[0], height / size[1], overlap
        self._sum, self._weight = (np.zeros((height, width), np.float32) for _ in range(2))

    def add(self, values: NDArray, box: Box) -> None:
        """What the map (M, M) of a tile says."""
        left, right = math.floor(box[0] * self.across), math.ceil(box[2] * self.across - 1e-9)
        top, bottom = math.floor(box[1] * self.down), math.ceil(box[3] * self.down - 1e-9)
        part = cv2.resize(values.astype(np.float32), (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)
        rows, columns = ramp(bottom - top, self.overlap * self.down), ramp(right - left, self.overlap * self.across)
        weight = rows[:, None] * columns
        self._sum[top:bottom, left:right] += part * weight
        self._weight[top:bottom, left:right] += weight

    @property
    def map(self) -> NDArray[np.float32]:
        """(H, W), when all tiles were added."""
        return self._sum / self._weight


def ramp(count: int, reach: float) -> NDArray[np.float32]:
    """Weights of `count` pixels in a row: rising from the borders over `reach` pixels, then 1."""
    place = np.arange(count, dtype=np.float32) + 0.5
    return np.minimum(np.minimum(place, place[::-1]) / max(reach, 0.5), 1)
