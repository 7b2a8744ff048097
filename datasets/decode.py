"""From an image file to its pixels, with the precision that the file has, as people see them.

Pillow decodes what has 8 bits per channel. It would reduce 16-bit colour to 8 bits without a word, so deeper files are
decoded as whole numbers or floats: TIFF by tifffile (OpenCV for compressions that it lacks), colour PNG and JPEG 2000
by OpenCV, portable pixmaps here.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from datasets.pixels import (
    DEPTHS,
    MAX_PIXELS,
    ORIENTATION,
    TIFF_MAGIC,
    UPRIGHT,
    Pixels,
    guarded,
    orientation_of,
    read_header,
    tag_of,
)
from default import UsageError

TURNS = {
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}  # quarters against the clock, then mirrored
MODES = ("1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "PA", "RGBa", "La", "CMYK", "YCbCr", "HSV")  # of 8 bits
LOSSY = ("JPEG", "MPO", "JPEG2000", "AVIF")  # the last two may be lossless, which they do not tell


def read_pixels(path: Path, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode a file.

    Raises:
        UsageError: as `read_header`, or damaged, or of a kind whose depth cannot be kept.
    """
    return guarded(path, lambda: _deep(path) if read_header(path, max_pixels).deep else _shallow(path))


def _shallow(path: Path) -> Pixels:
    with Image.open(path) as image:
        return shallow(path, image)


def shallow(path: Path, image: Image.Image) -> Pixels:
    """An image of 8 bits per channel that Pillow opened from a file at `path`, if there is one."""
    before = orientation_of(image)
    image.load()
    left = orientation_of(image)  # newer Pillow turns TIFF files by itself
    if image.mode not in MODES:
        raise UsageError(f"{path}: expected grey, RGB, CMYK or a palette, but got {image.mode}")
    lossy = image.format in LOSSY or image.info.get("compression") in ("jpeg", "tiff_jpeg")
    lossy = lossy or (image.format == "WEBP" and is_lossy_webp(path))
    upright = image.transpose(UPRIGHT[left]) if left in UPRIGHT else image
    return Pixels(image=upright, orientation=max(left, before), lossy=lossy)


def is_lossy_webp(path: Path) -> bool:
    """Whether a WebP file's picture is a VP8 chunk; VP8L is lossless."""
    data, place = path.read_bytes(), 12
    while place + 8 <= len(data):
        if data[place : place + 4] in (b"VP8 ", b"VP8L"):
            return data[place : place + 4] == b"VP8 "
        size = int.from_bytes(data[place + 4 : place + 8], "little")
        place += 8 + size + size % 2
    return True


def _deep(path: Path) -> Pixels:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic in TIFF_MAGIC:
        return _deep_tiff(path)
    with Image.open(path) as image:
        orientation = orientation_of(image)
        hidden = image.info.get("transparency")
        if image.format == "PPM":
            return turned(portable_map(path, image), None, orientation)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image)[..., None]
            return turned(values, (values[..., 0] != hidden) if isinstance(hidden, int) else None, orientation)
        if image.format not in ("PNG", "JPEG2000"):
            raise UsageError(f"{path}: {image.format} files of 16 bits are not read; save it as PNG or TIFF")
    colour = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if colour is None or colour.dtype != np.uint16:
        raise UsageError(f"{path}: cannot be read as an image (OpenCV does not decode its 16 bits)")
    return colours(colour if colour.ndim == 2 else colour[..., [2, 1, 0, 3][: colour.shape[2]]], orientation)


def colours(values: NDArray, orientation: int, **options: Any) -> Pixels:
    """(H, W), or (H, W, C) with grey, grey and alpha, RGB, or RGB and alpha."""
    values = values if values.ndim == 3 else values[..., None]
    channels = values.shape[2]
    if channels in (1, 3):
        return turned(values, None, orientation, **options)
    return turned(values[..., :-1], opacity(values[..., -1]), orientation, **options)


def opacity(alpha: NDArray) -> NDArray[np.float32]:
    """In [0, 1] from stored numbers, whose full scale is that of the colours: 4095 in 16 bits is opaque, too."""
    scales = [1.0] * (alpha.dtype.kind == "f") + [2.0**bits - 1 for bits in DEPTHS]
    full = next((scale for scale in scales if alpha.max() <= scale), float(alpha.max()))
    return (alpha / full).astype(np.float32)


def turned(values: NDArray, alpha: NDArray | None, orientation: int, **options: Any) -> Pixels:
    """Upright."""
    if alpha is not None and (alpha == 1).all():
        alpha = None
    quarters, mirrored = TURNS.get(orientation, (0, False))

    def upright(array: NDArray) -> NDArray:
        array = np.rot90(array, quarters)
        return array[:, ::-1] if mirrored else array

    return Pixels(
        values=upright(values),
        alpha=None if alpha is None else upright(alpha).astype(np.float32),
        orientation=orientation,
        **options,
    )


def portable_map(path: Path, image: Any) -> NDArray:
    """The stored numbers (H, W, C) of a PGM or PPM file of 16 bits; Pillow would scale them to its own range."""
    data, (width, height), channels = path.read_bytes(), image.size, 3 if image.mode == "RGB" else 1
    start = int(image.tile[0][2])
    count = width * height * channels
    if data[:2] in (b"P2", b"P3"):
        values = np.array(data[start:].split()[:count], dtype=np.int64).astype(np.uint16)
    else:
        values = np.frombuffer(data, ">u2", count, start).astype(np.uint16)
    return values.reshape(height, width, channels)


def _deep_tiff(path: Path) -> Pixels:
    """Grey or RGB of 9 to 64 bits, signed, unsigned or floating-point, either byte order, any layout."""
    with tifffile.TiffFile(path) as tiff:
        page: Any = tiff.pages[0]
        extra, photometric = len(page.extrasamples), int(page.photometric)
        channels = int(page.samplesperpixel) - extra
        if photometric not in (0, 1, 2) or channels not in (1, 3) or extra > 1 or page.imagedepth != 1:
            raise UsageError(
                f"{path}: expected grey or RGB, but got {page.samplesperpixel} channels ({page.photometric!s})"
            )
        try:
            values = page.asarray()
        except (ValueError, NotImplementedError):  # a compression or packing that tifffile leaves to another package
            values = decoded_elsewhere(path, page)
        if page.planarconfig == 2 and values.ndim == 3:
            values = np.moveaxis(values, 0, 2)
        has_alpha = extra == 1 and int(page.extrasamples[0]) in (1, 2)
        if extra and not has_alpha:
            values = values[..., :channels]
        white_is_zero = photometric == 0
        made = colours(values, int(tag_of(page, ORIENTATION, 1)), white_is_zero=white_is_zero)
        return unmultiplied(made) if has_alpha and int(page.extrasamples[0]) == 1 else made


def decoded_elsewhere(path: Path, page: Any) -> NDArray:
    """By OpenCV, or by Pillow where values are packed; both are told that the image is upright, as they may turn it."""
    data = bytearray(path.read_bytes())
    if ORIENTATION in page.tags:
        tag = page.tags[ORIENTATION]
        data[tag.valueoffset : tag.valueoffset + 2] = (1).to_bytes(2, "little" if data[:2] == b"II" else "big")
    if page.bitspersample not in (16, 32, 64):
        with Image.open(io.BytesIO(bytes(data))) as image:
            values: NDArray | None = np.asarray(image) if image.mode.startswith("I") else None
    else:
        values = cv2.imdecode(np.frombuffer(bytes(data), np.uint8), cv2.IMREAD_UNCHANGED)
    channels = 1 if values is None or values.ndim == 2 else values.shape[2]
    if values is None or channels != page.samplesperpixel or (values.dtype.itemsize == 1):
        raise UsageError(f"{path}: its compression is not read at {page.bitspersample} bits; save it as PNG or TIFF")
    return values if channels == 1 else values[..., [2, 1, 0, 3][:channels]]


def unmultiplied(pixels: Pixels) -> Pixels:
    """Colours that were stored multiplied by their alpha, as without."""
    if pixels.alpha is None:
        return pixels
    assert pixels.values is not None
    values = pixels.values / np.maximum(pixels.alpha, 1e-6)[..., None]
    kind = pixels.values.dtype
    if kind.kind in "iu":
        values = values.round().clip(np.iinfo(kind).min, np.iinfo(kind).max)
    return Pixels(
        values=values.astype(kind), alpha=pixels.alpha, white_is_zero=pixels.white_is_zero,
        orientation=pixels.orientation,
    )  # fmt: skip
