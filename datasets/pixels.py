"""From an image file to its pixels, with the precision that the file has, as people see them.

Pillow decodes what has 8 bits per channel. It would reduce 16-bit colour to 8 bits without a word, so deeper files are
decoded as whole numbers or floats: TIFF by tifffile (OpenCV for compressions that it lacks), colour PNG and JPEG 2000
by OpenCV, portable pixmaps here.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from default import DataConfig, UsageError

Image.init()  # all decoders now: Pillow loads them at the first odd file, and not safely from several threads
Image.MAX_IMAGE_PIXELS = None  # checked here for every file, by --max-pixels; Pillow's own guard knows no flag
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters of a damaged file becomes an error here

ORIENTATION = 0x0112
TURNS = {
    2: (0, True),
    3: (2, False),
    4: (2, True),
    5: (3, True),
    6: (3, False),
    7: (1, True),
    8: (1, False),
}  # quarters against the clock, then mirrored
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ON_THE_SIDE = (5, 6, 7, 8)  # orientations that swap width and height
MODES = ("1", "L", "P", "RGB", "RGBA", "RGBX", "LA", "PA", "RGBa", "La", "CMYK", "YCbCr", "HSV")  # of 8 bits
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
REDUCED_OR_MASK = 5  # bits of a TIFF page's subfile type: a smaller copy of a page, or its transparency
ONE_PICTURE = ("MPO", "PSD")  # further frames are a phone's second lens, or layers of the same picture
MAX_PIXELS: int = DataConfig().max_pixels


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says before it is decoded: `size` (width, height) as stored, `format` (Pillow's name), and whether it
    is `deep` (more than 8 bits per channel, or floating-point) and has an `alpha` channel or a transparent colour."""

    size: tuple[int, int]
    format: str
    deep: bool
    alpha: bool


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """A decoded image, upright.

    Attributes:
        image: what has 8 bits per channel, in Pillow's mode of the file; None for a deep image.
        values: (H, W, 1 or 3), the stored numbers of a deep image.
        alpha: (H, W) in [0, 1] of a deep image that is not opaque.
        white_is_zero: `values` count from white to black.
        orientation: the tag that was followed.
        lossy: values are blurred by compression.
    """

    image: Image.Image | None = None
    values: NDArray | None = None
    alpha: NDArray | None = None
    white_is_zero: bool = False
    orientation: int = 1
    lossy: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height as people see them."""
        if self.image is not None:
            return self.image.size
        assert self.values is not None
        return self.values.shape[1], self.values.shape[0]


def guarded(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives; whatever a decoder says of a damaged file becomes one line that names it."""
    try:
        return read()
    except UsageError:
        raise
    except Exception as error:  # struct.error, EOFError, IndexError, SyntaxError, ...
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"{path}: cannot be read as an image ({reason})") from error


def read_header(path: Path, max_pixels: int = MAX_PIXELS) -> Header:
    """Look at a file without decoding it.

    Raises:
        UsageError: no image, several pages or frames, or more than `max_pixels` pixels.
    """
    return guarded(path, lambda: _header(path, max_pixels))


def read_pixels(path: Path, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode a file.

    Raises:
        UsageError: as `read_header`, or damaged, or of a kind whose depth cannot be kept.
    """
    return guarded(path, lambda: _deep(path) if _header(path, max_pixels).deep else _shallow(path))


def _header(path: Path, max_pixels: int) -> Header:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic in TIFF_MAGIC:
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages[0]
            pages = [p for p in tiff.pages if not int(_tag(p, 254, 0)) & REDUCED_OR_MASK]
            width, height = int(page.imagewidth), int(page.imagelength)
            check_size(path, (width, height), max_pixels)
            if len(pages) > 1:
                raise UsageError(f"{path}: holds {len(pages)} pages; expected one image a file")
            deep = max(np.ravel(page.bitspersample)) > 8 or page.sampleformat not in (None, 1, 4)
            return Header(size=(width, height), format="TIFF", deep=bool(deep), alpha=bool(page.extrasamples))
    with Image.open(path) as image:
        check_size(path, image.size, max_pixels)
        if getattr(image, "is_animated", False) and image.format not in ONE_PICTURE:
            raise UsageError(f"{path}: holds several frames; expected one image a file")
        return Header(
            size=image.size, format=image.format or "", deep=is_deep(image, path), alpha=has_transparency(image)
        )


def _tag(page: Any, code: int, default: Any) -> Any:
    return page.tags.valueof(code, default)


def check_size(path: Path, size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        raise UsageError(
            f"{path}: {size[0]} x {size[1]} = {size[0] * size[1]} pixels are more than --max-pixels {max_pixels}; "
            "give a higher number if the file is what it should be"
        )


def is_deep(image: Any, path: Path) -> bool:
    """Whether a file that Pillow opened has more than 8 bits per channel, told or not."""
    if image.mode.startswith("I") or image.mode == "F":
        return True
    if image.format == "JPEG2000":
        return jpeg2000_bits(path) > 8
    arguments = image.tile[0][3] if image.tile else ()
    words = [str(a) for a in (arguments if isinstance(arguments, tuple) else (arguments,))]
    if image.format == "PPM":
        return words[-1].isdecimal() and int(words[-1]) > 255
    return ";16" in words[0] if words else False


def has_transparency(image: Image.Image) -> bool:
    """Whether a file that Pillow opened has an alpha channel or a transparent colour."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"


def jpeg2000_bits(path: Path) -> int:
    """Bits of the first channel, from the codestream's SIZ marker (ISO 15444-1, A.5.1)."""
    with path.open("rb") as file:
        head = file.read(1 << 16)
    start = head.find(b"\xff\x4f\xff\x51")
    return (head[start + 42] & 0x7F) + 1 if start >= 0 else 8


def orientation_of(image: Image.Image) -> int:
    """The tag of an image that Pillow opened; 1, upright, where it is missing or unreadable."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged block of tags says nothing of the pixels
        return 1
    return found if found in UPRIGHT else 1


def _shallow(path: Path) -> Pixels:
    with Image.open(path) as image:
        before = orientation_of(image)
        image.load()
        left = orientation_of(image)  # newer Pillow turns TIFF files by itself
        if image.mode not in MODES:
            raise UsageError(f"{path}: expected grey, RGB, CMYK or a palette, but got {image.mode}")
        lossy = image.format in ("JPEG", "MPO", "JPEG2000", "AVIF") or (image.format == "WEBP" and is_lossy_webp(path))
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
    full = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1.0
    return turned(values[..., :-1], values[..., -1].astype(np.float32) / full, orientation, **options)


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
        made = colours(values, int(_tag(page, ORIENTATION, 1)), white_is_zero=white_is_zero)
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
