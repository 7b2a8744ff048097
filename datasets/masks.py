"""From a mask file to the pixels that it marks: every value that is not background, judged before any conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datasets.decode import read_pixels
from datasets.geometry import Geometry, Size
from datasets.pixels import MAX_PIXELS, ON_THE_SIDE, UPRIGHT, Pixels, has_transparency
from datasets.reading import check_finite
from default import UsageError

Marks = NDArray[np.bool_]

HALF = 127  # of 255: what lossy compression blurs is marked above it
NOISE, EVEN, AREA = 24, 8, 16  # of lossy masks: level above noise, its range in an even area, pixels of that
SOLID = 0.5  # opacity from which on a pixel's colour counts
MOST_BORDER, MOST = 0.75, 0.5  # shares of the border and of all pixels that only an inverted mask marks
WAY_OUT = "mark the defect, or take all masks as they are with --trust-masks"


def load_mask(
    path: Path, size: int, seen: Size | None = None, orientation: int = 1, max_pixels: int = MAX_PIXELS,
    geometry: Geometry | None = None,
) -> Tensor:  # fmt: skip
    """What a mask file marks, upright, by nearest resize to `size`: (size, size) bool.

    Args:
        seen: size of its image as people see it.
        orientation: tag that its image was turned by; the mask follows where that makes their shapes agree.
        geometry: of its image; default: squashed.
    """
    marks = follow(read_marks(path, max_pixels), seen, orientation)
    own = marks.shape[1], marks.shape[0]
    return (geometry or Geometry(input_size=size)).place(seen or own).mask(marks, size)


def at_size(marks: Marks, size: Size) -> Marks:
    """Marks of an image at another size (width, height), by nearest neighbour."""
    return np.asarray(Image.fromarray(marks.astype(np.uint8) * 255).resize(size, Image.Resampling.NEAREST)) > 127


def mask_files(path: Path) -> list[Path]:
    """The files of a mask: itself, or those in it where it is a folder (one file a region, as in MVTec LOCO)."""
    return sorted(p for p in path.iterdir() if p.suffix.lower() == ".png") if path.is_dir() else [path]


def read_marks(path: Path, max_pixels: int = MAX_PIXELS) -> Marks:
    """What a mask file, or all masks in a folder, mark: (H, W) bool, upright by its own tag.

    Raises:
        UsageError: a file cannot be read, or masks of one image have different sizes.
    """
    files = mask_files(path)
    marks = read_file(files[0], max_pixels)
    for other in files[1:]:
        more = read_file(other, max_pixels)
        if more.shape != marks.shape:
            raise UsageError(f"{other}: has another size than {files[0]}, a mask of the same image")
        marks = marks | more
    return marks


def read_file(path: Path, max_pixels: int = MAX_PIXELS) -> Marks:
    """What one mask file marks."""
    pixels = read_pixels(path, max_pixels)
    if pixels.values is not None:
        check_finite(path, pixels.values)
        return visible_marks(deep_marks(pixels), pixels.alpha)
    assert pixels.image is not None
    image = pixels.image
    limit = HALF if pixels.lossy else 0
    if has_transparency(image):
        rgba = np.asarray(image.convert("RGBA"))
        return visible_marks(coloured(rgba[..., :3], limit), rgba[..., 3] / np.float32(255))
    if image.mode == "P":
        return palette_marks(image)
    return coloured(np.asarray(image if image.mode in ("1", "L") else image.convert("RGB")), limit)


def coloured(values: NDArray, limit: int) -> Marks:
    """(H, W) or (H, W, C): where any channel is above `limit`."""
    highest = values.max(2) if values.ndim == 3 else values
    return np.asarray(highest > limit)


def deep_marks(pixels: Pixels) -> Marks:
    """Where any channel is not black."""
    assert pixels.values is not None
    values: Any = pixels.values
    black = (np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1.0) if pixels.white_is_zero else 0
    return (values != black).any(2)


def palette_marks(image: Image.Image) -> Marks:
    """Where a palette's colour is not black; where the index is not 0 if all colours that are used are the same."""
    indices = np.asarray(image)
    colours = np.zeros((256, 3), np.uint8)
    table = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    colours[: len(table)] = table
    same = len(np.unique(colours[np.unique(indices)], axis=0)) == 1
    return indices != 0 if same else np.asarray(colours.any(1))[indices]


def visible_marks(colour: Marks, alpha: NDArray | None) -> Marks:
    """Colours that are not black, and transparency (H, W) in [0, 1], together.

    Transparent is background. What is visible on it is a drawing, black or not, or an image of its own with black as
    background: if it has both and covers most of the picture, or its colours touch nothing but black.
    """
    if alpha is None or alpha.min() > 0:
        return colour
    visible, solid = alpha > 0, alpha >= SOLID
    black, colours = solid & ~colour, solid & colour
    if not (black.any() and colours.any()):
        return visible
    around = cv2.dilate(colours.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
    image = visible.mean() > MOST or not (around & ~visible).any()
    return visible & colour if image else visible


def agree(one: Size, other: Size) -> bool:
    """Whether two sizes are of one shape, apart from rounding to whole pixels."""
    return abs(one[0] * other[1] - one[1] * other[0]) <= max(*one, *other)


def follow(marks: Marks, seen: Size | None, orientation: int) -> Marks:
    """The mask turned like its image if only that makes their shapes agree."""
    size = marks.shape[1], marks.shape[0]
    if seen is None or orientation not in ON_THE_SIDE or agree(size, seen) or not agree(size[::-1], seen):
        return marks
    return np.asarray(Image.fromarray((marks * 255).astype(np.uint8)).transpose(UPRIGHT[orientation])) > 127


def check_shape(path: Path, size: Size, image: Path, seen: Size) -> None:
    """Raise `UsageError` if a mask has another shape than its image."""
    if not agree(size, seen):
        raise UsageError(
            f"{path}: {size[0]} x {size[1]} is another shape than the {seen[0]} x {seen[1]} of its image {image}; turn "
            "or crop it, or stretch all such masks with --trust-masks"
        )


def check_levels(path: Path, max_pixels: int = MAX_PIXELS) -> None:
    """Raise `UsageError` if a lossy mask has even areas of a value that may mark or not: not noise, but not told."""
    pixels = read_pixels(path, max_pixels)
    if not pixels.lossy or pixels.image is None:
        return
    level = np.asarray(pixels.image.convert("RGB")).max(2)
    box = np.ones((3, 3), np.uint8)
    even = cv2.dilate(level, box) - cv2.erode(level, box) <= EVEN
    if (even & (level > NOISE) & (level <= HALF)).sum() >= AREA:
        raise UsageError(
            f"{path}: has areas darker than half of full scale, which count as noise in a lossy file; save it as PNG, "
            "or take all masks as they are with --trust-masks"
        )


def check_marks(path: Path, marks: Marks) -> None:
    """Raise `UsageError` if a mask of a defective image marks nothing, everything, or the background."""
    if not marks.any():
        raise UsageError(f"{path}: marks no pixel, but its image is in a folder of defective ones; {WAY_OUT}")
    if marks.all():
        raise UsageError(f"{path}: marks every pixel; {WAY_OUT}")
    border = np.concatenate([marks[0], marks[-1], marks[:, 0], marks[:, -1]])
    if border.all() or (border.mean() > MOST_BORDER and marks.mean() > MOST):
        raise UsageError(
            f"{path}: marks the background: {border.mean():.0%} of its border and {marks.mean():.0%} of all pixels, as "
            f"if inverted; {WAY_OUT}"
        )
