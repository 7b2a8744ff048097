"""What an image file says before it is decoded, and what its decoded pixels are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from default import DataConfig, UsageError

Image.init()  # all decoders now: Pillow loads them at the first odd file, and not safely from several threads
Image.MAX_IMAGE_PIXELS = None  # checked here for every file, by --max-pixels; Pillow's own guard knows no flag
logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters of a damaged file becomes an error here

ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ON_THE_SIDE = (5, 6, 7, 8)  # orientations that swap width and height
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
REDUCED_OR_MASK = 5  # bits of a TIFF page's subfile type: a smaller copy of a page, or its transparency
ONE_PICTURE = ("MPO", "PSD")  # further frames are a phone's second lens, or layers of the same picture
DEPTHS = (8, 10, 12, 14, 16, 20, 24, 32)  # bits that cameras and files have
MAX_PIXELS: int = DataConfig().max_pixels
MAX_SIDE = 1 << 18  # resizing takes 48 bytes for each pixel of a side, however narrow the image is
DEEP_COUNTS = 4  # of a pixel's values beyond 8 bits, which are computed with in float32


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says before it is decoded: `size` (width, height) as stored, `format` (Pillow's name), whether it is
    `deep` (more than 8 bits per channel, or floating-point) and has an `alpha` channel or a transparent colour, and the
    `orientation` tag."""

    size: tuple[int, int]
    format: str
    deep: bool
    alpha: bool
    orientation: int = 1

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height as people see them."""
        width, height = self.size
        return (height, width) if self.orientation in ON_THE_SIDE else (width, height)


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


def _header(path: Path, max_pixels: int) -> Header:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic in TIFF_MAGIC:
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages[0]
            pages = [p for p in tiff.pages if not int(tag_of(p, 254, 0)) & REDUCED_OR_MASK]
            width, height = int(page.imagewidth), int(page.imagelength)
            deep = max(np.ravel(page.bitspersample)) > 8 or page.sampleformat not in (None, 1, 4)
            check_size(path, (width, height), max_pixels, deep=bool(deep))
            if len(pages) > 1:
                raise UsageError(f"{path}: holds {len(pages)} pages; expected one image a file")
            return Header(
                size=(width, height), format="TIFF", deep=bool(deep), alpha=bool(page.extrasamples),
                orientation=int(tag_of(page, ORIENTATION, 1)),
            )  # fmt: skip
    with Image.open(path) as image:
        deep = is_deep(image, path)
        check_size(path, image.size, max_pixels, deep=deep)
        if getattr(image, "is_animated", False) and image.format not in ONE_PICTURE:
            raise UsageError(f"{path}: holds several frames; expected one image a file")
        return Header(
            size=image.size, format=image.format or "", deep=deep, alpha=has_transparency(image),
            orientation=orientation_of(image),
        )  # fmt: skip


def tag_of(page: Any, code: int, default: Any) -> Any:
    return page.tags.valueof(code, default)


def check_size(path: Path, size: tuple[int, int], max_pixels: int, *, deep: bool = False) -> None:
    """Raise `UsageError` if an image (width, height) would take more memory than is meant for one.

    A pixel of a deep image counts `DEEP_COUNTS` times.
    """
    count = size[0] * size[1] * (DEEP_COUNTS if deep else 1)
    if count > max_pixels:
        deeper = f" of more than 8 bits, which count {DEEP_COUNTS} times," if deep else ""
        raise UsageError(
            f"{path}: {size[0]} x {size[1]} = {size[0] * size[1]} pixels{deeper} are more than --max-pixels "
            f"{max_pixels}; give a higher number if the file is what it should be"
        )
    if max(size) > MAX_SIDE:
        raise UsageError(f"{path}: {size[0]} x {size[1]} pixels are more than {MAX_SIDE} on a side; cut it into parts")


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
    return bool(words) and (";16" in words[0] or image.tile[0][0] == "SGI16")


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
