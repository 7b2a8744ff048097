"""From an image file to a tensor, and back to a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datasets.geometry import Geometry
from datasets.pixels import Pixels
from datasets.reading import Reading, picture


def to_tensor(path: Path, pixels: Pixels, geometry: Geometry, reading: Reading) -> Tensor:
    """Lanczos resize to (3, S, S) float32 in [0, 1]: of 8-bit pixels in 8 bits, of deeper ones in float32."""
    return planes_tensor(picture(path, pixels, reading), geometry)


def planes_tensor(planes: Sequence[Image.Image], geometry: Geometry) -> Tensor:
    """The same of what `picture` gives, or of a part of it."""
    image = torch.from_numpy(geometry.place(planes[0].size).square(planes)).permute(2, 0, 1)
    three = image.expand(3, geometry.side, geometry.side)
    return three.clamp(0, 1).contiguous() if planes[0].mode == "F" else three.float() / 255


def to_picture(image: Tensor) -> NDArray[np.uint8]:
    """What `to_tensor` gave, (3, H, W) in [0, 1], as RGB (H, W, 3) to look at."""
    return (image.cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
