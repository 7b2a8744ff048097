"""Pictures of results: image, score map and mask side by side."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray


def heat(scores: NDArray, low: float, high: float) -> NDArray[np.uint8]:
    """Scores (H, W) as colours (H, W, 3), RGB: `low` and below is the coldest colour, `high` and above the hottest."""
    scaled = np.clip((scores - low) / max(high - low, 1e-12), 0, 1)
    coloured = cv2.applyColorMap((scaled * 255).astype(np.uint8), cv2.COLORMAP_TURBO)
    return cv2.cvtColor(coloured, cv2.COLOR_BGR2RGB).astype(np.uint8)


def resized(values: NDArray, image: NDArray, how: int = cv2.INTER_LINEAR) -> NDArray:
    """A map (h, w) at the size of a picture (H, W, 3)."""
    return cv2.resize(values, image.shape[1::-1], interpolation=how) if values.shape != image.shape[:2] else values


def triptych(
    image: NDArray[np.uint8], scores: NDArray, mask: NDArray[np.bool_], *, low: float, high: float
) -> NDArray[np.uint8]:
    """Image (H, W, 3), score map over the image with the mask's outline, and mask, side by side (H, 3 W + 2 gap, 3).

    Scores and mask may have another size.
    """
    scores, mask = resized(scores, image), resized(mask.astype(np.uint8), image, cv2.INTER_NEAREST) > 0
    coloured = cv2.addWeighted(image, 0.4, heat(scores, low, high), 0.6, 0)
    outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    coloured = cv2.drawContours(np.ascontiguousarray(coloured), outline, -1, (255, 255, 255), 1)
    truth = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, 2)
    gap = np.full((image.shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([image, gap, coloured, gap, truth], 1)


def save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write RGB (H, W, 3); the format follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes())


def ramp() -> NDArray[np.uint8]:
    """256 colours (256, 3), RGB, from pale yellow to dark red: those of `heat_overlay`."""
    stops = np.array([[255, 237, 120], [254, 178, 76], [240, 80, 36], [189, 0, 38], [110, 0, 48]], float)
    place = np.linspace(0, len(stops) - 1, 256)
    return np.stack([np.interp(place, range(len(stops)), stops[:, c]) for c in range(3)], 1).round().astype(np.uint8)


def heat_overlay(image: NDArray[np.uint8], scaled: NDArray) -> NDArray[np.uint8]:
    """An RGB image (H, W, 3) in grey, coloured where `scaled` (h, w) is above 0; 1 and above is the hottest colour.

    A clean image stays grey: what is not above 0 has no colour at all.
    """
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(float)
    level = np.clip(resized(scaled, image), 0, 1)
    opacity = 0.85 * level[..., None] ** 0.6
    colours = ramp()[(level * 255).round().astype(int)]
    return (grey * (1 - opacity) + colours * opacity).round().astype(np.uint8)
