"""From an image file to a tensor, and back to a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from default import UsageError


def open_image(path: Path) -> Image.Image:
    """The decoded image.

    Raises:
        UsageError: the file cannot be read as an image, or its pixels are floating-point numbers of unknown range.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # decoders of damaged files raise anything: struct.error, EOFError, IndexError, ...
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: cannot be read as an image ({reason})") from error
    if image.mode == "F":
        raise UsageError(f"{path}: expected 8 or 16 bits per channel, but got floating-point pixels")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB by what the image is: palettes are looked up, grey is repeated, 16 bits become 8, alpha is dropped.

    Sixteen bits are scaled by their full range (value / 257), never by an image's own brightest pixel: that would make
    images of one class incomparable. Orientation tags are not applied: the data sets' masks belong to the stored
    pixels.
    """
    if image.mode.startswith("I"):  # I;16, I;16B, I;16L; older Pillow reads 16-bit PNG files as I
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def load_image(path: Path, size: int) -> Tensor:
    """Lanczos resize to `size`: (3, size, size) float32 in [0, 1]."""
    image = to_rgb(open_image(path)).resize((size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def load_mask(path: Path, size: int) -> Tensor:
    """Nearest resize to `size`: (size, size) bool.

    A pixel is defective where its value is above half of the full scale (255, or 65535 where values exceed 255). Masks
    that number their defects 1, 2, 3, ... (VisA's), so whose highest value is below half, count every pixel above zero.
    """
    image = open_image(path)
    mask = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    half = 32767 if mask.max(initial=0) > 255 else 127
    limit = half if mask.max(initial=0) > half else 0
    nearest = Image.fromarray(((mask > limit) * 255).astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(nearest) > 127)


def to_picture(image: Tensor) -> NDArray[np.uint8]:
    """What `load_image` gave, (3, H, W) in [0, 1], as RGB (H, W, 3) to look at."""
    return (image.cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
