"""Pictures of results: the one heat map, and image, heat map and mask side by side with the verdict below."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from utils.run.writer import write_whole

HOT = 2.5  # value of the hottest colour on the scale of the heat maps; colour begins at 1
BAND, SMALLEST = 22, 192  # pixels: height of the line with the verdict, and the side that such pictures have at least
INK, ALARM = (40, 42, 46), (176, 32, 24)


def resized(values: NDArray, image: NDArray, how: int = cv2.INTER_LINEAR) -> NDArray:
    """A map (h, w) at the size of a picture (H, W, 3)."""
    return cv2.resize(values, image.shape[1::-1], interpolation=how) if values.shape != image.shape[:2] else values


def ramp() -> NDArray[np.uint8]:
    """256 colours (256, 3), RGB, from pale yellow to dark red: those of `heat_overlay`."""
    stops = np.array([[255, 237, 120], [254, 178, 76], [240, 80, 36], [189, 0, 38], [110, 0, 48]], float)
    place = np.linspace(0, len(stops) - 1, 256)
    return np.stack([np.interp(place, range(len(stops)), stops[:, c]) for c in range(3)], 1).round().astype(np.uint8)


def heat_overlay(image: NDArray[np.uint8], scaled: NDArray) -> NDArray[np.uint8]:
    """An RGB image (H, W, 3) in grey, coloured where `scaled` (h, w) is above 1; `HOT` and above is the hottest colour.

    A clean image stays grey: what is not above 1 has no colour at all.
    """
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB).astype(float)
    level = np.clip((resized(scaled, image) - 1) / (HOT - 1), 0, 1)
    opacity = 0.85 * level[..., None] ** 0.6
    colours = ramp()[(level * 255).round().astype(int)]
    return (grey * (1 - opacity) + colours * opacity).round().astype(np.uint8)


def triptych(
    image: NDArray[np.uint8], scaled: NDArray, mask: NDArray[np.bool_], *,
    peak: tuple[float, float], caption: str, alarm: bool,
) -> NDArray[np.uint8]:  # fmt: skip
    """Image (H, W, 3), its heat map with the mask's outline and a ring around the peak, and mask, side by side above a
    line of text: (H + BAND, 3 W + 8, 3), small images enlarged.

    Args:
        scaled: score map (h, w) on the heat maps' scale; `mask` may have another size, too.
        peak: its highest place, x and y as shares of the width and height.
        caption: ASCII text, in red for an `alarm`.
    """
    side = max(SMALLEST, len(image))
    image = cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    mask = resized(mask.astype(np.uint8), image, cv2.INTER_NEAREST) > 0
    coloured: NDArray = np.ascontiguousarray(heat_overlay(image, scaled))
    outline, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    coloured = cv2.drawContours(coloured, outline, -1, (255, 255, 255), 1)
    centre, radius = tuple(int(share * side) for share, side in zip(peak, image.shape[1::-1], strict=True)), 6
    for color, width in ((0, 0, 0), 3), ((255, 255, 255), 1):
        coloured = cv2.circle(coloured, centre, radius, color, width, cv2.LINE_AA)
    truth = np.repeat((mask * 255).astype(np.uint8)[..., None], 3, 2)
    gap = np.full((image.shape[0], 4, 3), 255, np.uint8)
    row = np.concatenate([image, gap, coloured, gap, truth], 1)
    band = np.full((BAND, row.shape[1], 3), 255, np.uint8)
    color = ALARM if alarm else INK
    cv2.putText(band, caption, (4, BAND - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.42, color, 1, cv2.LINE_AA)
    return np.concatenate([row, band]).astype(np.uint8)


def save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write RGB (H, W, 3); the format follows the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))[1].tobytes()
    write_whole(path, data, durable=False)  # there may be thousands, and they can be drawn again
