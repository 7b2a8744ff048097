"""What can be known of images and masks before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets.decode import read_pixels
from datasets.folder import Item
from datasets.masks import agree, check_levels, check_marks, check_shape, follow, mask_files, read_marks
from datasets.pixels import read_header
from datasets.reading import Reading, picture
from default import DataConfig, UsageError
from utils.run.threads import in_threads


def check_items(items: Sequence[Item], reading: Reading, data: DataConfig) -> None:
    """Look at every image and every mask.

    Headers say most of an image; those that are deep or transparent are decoded, and all masks.

    Raises:
        UsageError: an image that cannot be read so, or a mask that does not say where the defect of its image is.
    """
    check_shared([item for item in items if item.mask_path is not None])
    in_threads(lambda item: check_item(item, reading, data), items)


def check_item(item: Item, reading: Reading, data: DataConfig) -> None:
    header = read_header(item.path, data.max_pixels)
    if header.deep or header.alpha:
        picture(item.path, read_pixels(item.path, data.max_pixels), reading)
    if item.mask_path is None:
        return
    marks = read_marks(item.mask_path, data.max_pixels)
    if data.trust_masks:
        return
    for path in mask_files(item.mask_path):
        check_levels(path, data.max_pixels)
    check_marks(item.mask_path, marks)
    if not agree((marks.shape[1], marks.shape[0]), header.size):  # a tag may turn the image, which decoding tells
        pixels = read_pixels(item.path, data.max_pixels)
        marks = follow(marks, pixels.size, pixels.orientation)
        check_shape(item.mask_path, (marks.shape[1], marks.shape[0]), item.path, pixels.size)


def check_shared(items: Sequence[Item]) -> None:
    """Raise `UsageError` if two images have one mask."""
    owners: dict[Path, Path] = {}
    for item in items:
        assert item.mask_path is not None
        other = owners.setdefault(item.mask_path, item.path)
        if other != item.path:
            raise UsageError(f"{item.mask_path}: is the mask of two images, {other} and {item.path}")
