"""How the images of a class are read: decided once from all of its training images, and kept with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from datasets.decode import read_pixels
from datasets.pixels import DEPTHS, Pixels, has_transparency, read_header
from default import DataConfig, UsageError
from utils.run.threads import in_threads

Span = tuple[float, float]  # what becomes 0 and what becomes 1

FLOAT_SPANS: tuple[Span, ...] = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.0, 1023.0), (0.0, 4095.0), (0.0, 65535.0))
LEAST_USED = 1 / 16  # of a span, by the training images' highest value; else their own range is taken
MARGIN = 0.25  # of their own range, on both sides


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a class's images become RGB in [0, 1].

    Attributes:
        integers: range of integer images beyond 8 bits; None: there was none in training, so values of 8 bits.
        floats: range of floating-point images; None: there was none in training.
        background: "white" or "black", what transparent images are laid on; None: there was none in training.
        coarse: as version 1.0 read: integers through 8 bits, alpha dropped.
    """

    integers: Span | None = None
    floats: Span | None = None
    background: str | None = None
    coarse: bool = False

    def plain(self) -> dict[str, Any]:
        """Values for a checkpoint."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(self).items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Reading:
        """The inverse of `plain`."""
        options: dict[str, Any] = {n: tuple(v) if isinstance(v, (list, tuple)) else v for n, v in values.items()}
        return cls(**options)

    def __str__(self) -> str:
        """What was decided, empty for opaque images of 8 bits."""
        parts = []
        if self.coarse:
            parts.append("as version 1.0 did: integers beyond 8 bits over 65535, without alpha")
        elif self.integers:
            low, high = self.integers
            bits = f"{int(high - low + 1).bit_length() - 1}-bit "
            parts.append(f"integers beyond 8 bits as {bits}ones ({low:.0f} to {high:.0f})")
        if self.floats:
            parts.append(f"floating-point images from {self.floats[0]:.4g} (black) to {self.floats[1]:.4g} (white)")
        if self.background:
            parts.append(f"transparent images on {self.background}")
        return ", ".join(parts)


PLAIN = Reading()
RELEASED = Reading(integers=(0.0, 65535.0), coarse=True)  # of a checkpoint that does not say


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What matters of one training image.

    `kind` is "8 bits", "integer" or "float"; `low` and `high` its values; `visible` the mean of its visible pixels in
    its own numbers and `weight` how many these are, 0 for an opaque image.
    """

    kind: str
    low: float
    high: float
    visible: float = 0.0
    weight: float = 0.0
    white_is_zero: bool = False


def facts_of(path: Path, max_pixels: int) -> Facts | None:
    """None for an opaque image of 8 bits; only others are decoded.

    Raises:
        UsageError: the file cannot be read, or holds numbers that are not finite.
    """
    header = read_header(path, max_pixels)
    if not (header.deep or header.alpha):
        return None
    pixels = read_pixels(path, max_pixels)
    if pixels.image is not None:
        values, alpha = np.asarray(pixels.image.convert("RGBA")), None
        if values[..., 3].min() < 255:
            alpha = values[..., 3] / 255
        values, kind = values[..., :3], "8 bits"
    else:
        assert pixels.values is not None
        check_finite(path, pixels.values)
        values, alpha = pixels.values, pixels.alpha
        kind = "float" if values.dtype.kind == "f" else "integer"
    weight = 0.0 if alpha is None else float(alpha.sum())
    if alpha is not None and not weight:
        raise UsageError(f"{path}: is transparent everywhere")
    visible = 0.0 if not weight else float((values.mean(2, dtype=np.float64) * alpha).sum() / weight)
    return Facts(
        kind=kind, low=float(values.min()), high=float(values.max()), visible=visible, weight=weight,
        white_is_zero=pixels.white_is_zero,
    )  # fmt: skip


def decide(paths: Sequence[Path], data: DataConfig) -> Reading:
    """The reading of a class with these training images, and the flags that have the last word.

    Raises:
        UsageError: a file cannot be read or holds values that no range holds.
    """
    found = [f for f in in_threads(lambda path: facts_of(path, data.max_pixels), paths) if f is not None]
    integers, floats = ([f for f in found if f.kind == kind] for kind in ("integer", "float"))
    whole = integer_span([f.low for f in integers], [f.high for f in integers]) if integers else None
    real = float_span(min(f.low for f in floats), max(f.high for f in floats)) if floats else None
    if data.bit_depth is not None:
        whole = (0.0, 2.0**data.bit_depth - 1)
    if data.float_range is not None:
        real = (data.float_range[0], data.float_range[1])
    background: str | None = None if data.background == "auto" else data.background
    clear = [f for f in found if f.weight]
    if background is None and clear:
        background = farther(clear, {"8 bits": (0.0, 255.0), "integer": whole, "float": real})
    return Reading(integers=whole, floats=real, background=background)


def integer_span(lows: Sequence[float], highs: Sequence[float]) -> Span:
    """Of the fewest bits that hold the values; as signed numbers if there are negative ones."""
    low, high = min(lows), max(highs)
    spans = [(-(2.0 ** (b - 1)), 2.0 ** (b - 1) - 1) if low < 0 else (0.0, 2.0**b - 1) for b in DEPTHS]
    for span in spans:
        if span[0] <= low and high <= span[1]:
            return span
    raise UsageError(f"--data-path: integer images of more than 32 bits ({low:.0f} to {high:.0f}) are not read")


def float_span(low: float, high: float) -> Span:
    """The first customary range that holds the values and is made use of, else their own with a margin."""
    for span in FLOAT_SPANS:
        if span[0] <= low and high <= span[1] and max(high, -low) > LEAST_USED * span[1]:
            return span
    margin = MARGIN * ((high - low) or 1.0)
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def farther(clear: Iterable[Facts], spans: Mapping[str, Span | None]) -> str:
    """Of white and black the one that is farther from the mean of the visible pixels."""
    total = count = 0.0
    for facts in clear:
        span = spans[facts.kind]
        assert span is not None
        level = (facts.visible - span[0]) / (span[1] - span[0])
        total, count = total + facts.weight * (1 - level if facts.white_is_zero else level), count + facts.weight
    return "white" if total / count <= 0.5 else "black"


def check_finite(path: Path, values: NDArray) -> None:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UsageError(f"{path}: holds values that are not finite numbers (NaN or infinity)")


def check_flags(name: str, reading: Reading, data: DataConfig) -> None:
    """Raise `UsageError` where a flag asks for another reading than the one that a model was trained with."""
    pairs: dict[str, tuple[Any, Any]] = {
        "--bit-depth": (data.bit_depth and (0.0, 2.0**data.bit_depth - 1), reading.integers),
        "--float-range": (data.float_range, reading.floats),
        "--background": (None if data.background == "auto" else data.background, reading.background),
    }
    for flag, (asked, has) in pairs.items():
        if asked is not None and asked != has:
            raise UsageError(f"{flag}: the model reads images of {name} otherwise ({reading or 'opaque, 8 bits'})")


def picture(path: Path, pixels: Pixels, reading: Reading) -> list[Image.Image]:
    """One grey or RGB image of 8 bits, or one or three channels of mode F in [0, 1].

    Raises:
        UsageError: values beyond the class's range, or transparency in a class that has none.
    """
    if pixels.image is not None:
        return [opaque(path, pixels.image, reading)]
    assert pixels.values is not None
    if reading.coarse:
        return [Image.fromarray(coarse(path, pixels.values)).convert("RGB")]
    level = scaled(path, pixels.values, reading)
    if pixels.white_is_zero:
        level = 1 - level
    if pixels.alpha is not None:
        alpha = pixels.alpha[..., None]
        level = level * alpha + (1 - alpha) * (background_of(path, reading) == "white")
    return [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(level, 2, 0)]


def opaque(path: Path, image: Image.Image, reading: Reading) -> Image.Image:
    """Grey or RGB by what an image is: palettes are looked up, transparent pixels show the background."""
    if has_transparency(image):
        image = image.convert("RGBA")
        if not reading.coarse and np.asarray(image)[..., 3].min() < 255:
            image = Image.alpha_composite(Image.new("RGBA", image.size, background_of(path, reading)), image)
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def background_of(path: Path, reading: Reading) -> str:
    if reading.background is None:
        raise UsageError(
            f"{path}: is transparent, but no training image of its class is; train with --background white or black"
        )
    return reading.background


def scaled(path: Path, values: NDArray, reading: Reading) -> NDArray[np.float32]:
    """Stored numbers on the class's range, float32 in [0, 1].

    Raises:
        UsageError: a value beyond the range, or one that is not finite.
    """
    check_finite(path, values)
    whole = values.dtype.kind != "f"
    span, flag = (reading.integers, "--bit-depth BITS") if whole else (reading.floats, "--float-range LOW HIGH")
    if span is None and not whole:
        raise UsageError(
            f"{path}: has floating-point pixels, but no training image of its class has; train with {flag}"
        )
    low, high = span or (0.0, 255.0)
    for value in (values.min(), values.max()):
        if not low <= value <= high:
            raise UsageError(
                f"{path}: the value {value:.6g} is beyond {low:.6g} to {high:.6g}, the range of its class's training "
                f"images; train with {flag} if it is right"
            )
    fine: Any = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    return ((fine - low) / (high - low)).astype(np.float32)


def coarse(path: Path, values: NDArray) -> NDArray[np.uint8]:
    """Eight bits (H, W) or (H, W, 3) as version 1.0 made them."""
    if values.dtype.kind == "f":
        raise UsageError(f"{path}: has floating-point pixels, which the model's version 1.0 did not read")
    if values.shape[2] == 3:
        return (values.astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
    return (values[..., 0].astype(np.float64) / 257).round().clip(0, 255).astype(np.uint8)
