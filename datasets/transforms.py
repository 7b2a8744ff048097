"""From an image file to a tensor, and back to a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from default import UsageError

MEAN = (0.485, 0.456, 0.406)  # ImageNet
STD = (0.229, 0.224, 0.225)


def open_image(path: Path) -> Image.Image:
    """The decoded image.

    Raises:
        UsageError: the file cannot be read as an image.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"{path}: cannot be read as an image ({reason})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB by what the image is: palettes are looked up, grey is repeated, 16 bits become 8, alpha is dropped.

    Orientation tags are not applied: the data sets' masks belong to the stored pixels.
    """
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray((values / 257 if values.max() > 255 else values).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def load_image(path: Path, size: int) -> Tensor:
    """Lanczos resize to `size`, scaled to [0, 1], ImageNet mean and deviation: (3, size, size) float32."""
    image = to_rgb(open_image(path)).resize((size, size), Image.Resampling.LANCZOS)
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def load_mask(path: Path, size: int) -> Tensor:
    """Nearest resize to `size`: (size, size) bool.

    A pixel is defective where its value is above half of the full scale; masks that number their defects (VisA's:
    highest value below half) count every pixel above zero.
    """
    mask = np.asarray(open_image(path).convert("L"))
    limit = 127 if mask.max(initial=0) > 127 else 0
    nearest = Image.fromarray(((mask > limit) * 255).astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return torch.from_numpy(np.array(nearest) > 127)


def denormalize(image: Tensor) -> NDArray[np.uint8]:
    """The inverse of `load_image`'s scaling: (3, H, W) float -> RGB (H, W, 3)."""
    values = image.cpu() * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]
    return (values.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
