"""From an image file to a tensor, and back to a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from datasets.pixels import Pixels
from datasets.reading import Reading, picture


def to_tensor(path: Path, pixels: Pixels, size: int, reading: Reading) -> Tensor:
    """Lanczos resize to (3, size, size) float32 in [0, 1]: of 8-bit pixels in 8 bits, of deeper ones in float32."""
    planes = picture(path, pixels, reading)
    resized = [np.array(plane.resize((size, size), Image.Resampling.LANCZOS)) for plane in planes]
    if planes[0].mode == "F":
        return torch.from_numpy(np.stack(resized)).clamp(0, 1).expand(3, size, size).contiguous()
    return torch.from_numpy(resized[0]).reshape(size, size, -1).permute(2, 0, 1).expand(3, size, size).float() / 255


def to_picture(image: Tensor) -> NDArray[np.uint8]:
    """What `to_tensor` gave, (3, H, W) in [0, 1], as RGB (H, W, 3) to look at."""
    return (image.cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
