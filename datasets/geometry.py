"""How images of any shape become squares, and how what is said of a square lies on its image again."""

from __future__ import annotations

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


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What `DataConfig` says under the same names.

    The centre of a square of `input_size` is what is cropped (`center_crop`, Dinomaly's protocol, arXiv 2405.14325),
    with torchvision's rounding.
    """

    input_size: int
    resize: str = "squash"
    center_crop: int | None = None

    @classmethod
    def of(cls, data: DataConfig) -> Geometry:
        """That of a configuration."""
        return cls(input_size=data.input_size, resize=data.resize, center_crop=data.center_crop)

    @property
    def side(self) -> int:
        """S, of the squares."""
        return self.center_crop or self.input_size

    @property
    def pads(self) -> bool:
        """Whether there may be places of a square that are none of its image."""
        return self.resize == "pad"

    def place(self, size: Size) -> Place:
        """Where an image (width, height) lies."""
        near = {"squash": None, "pad": max(size), "crop": min(size)}[self.resize]
        width, height = (max(round(self.input_size * own / (near or own)), 1) for own in size)
        return Place(size=size, scaled=(width, height), side=self.side)


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
