"""Small generated data sets in the exact layouts of the real ones, and short command lines for them."""

from __future__ import annotations

import csv
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from datasets.decode import read_pixels
from datasets.geometry import Geometry
from datasets.pixels import MAX_PIXELS
from datasets.reading import PLAIN, Reading
from datasets.transforms import to_tensor

SIDE = 64
TINY = [
    "--extractor", "tf_efficientnet_lite0", "--input-size", "64", "--dim-cpc", "8", "--k-cpc", "4", "--k-cspc", "8",
    "--c-pos-conds", "4", "--parallel-blocks", "1", "--meta-epochs", "1", "--sub-epochs", "1", "--batch-size", "4",
    "--device", "cpu", "--pictures", "1",
]  # fmt: skip
METHOD = [
    "--multi-class", "--quantize-enable", "--quantize-type", "residual", "--concat-pos", "--mixed-gaussian",
]  # fmt: skip


def picture(rng: np.random.Generator, defect: bool = False, size: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """A smooth coloured texture (S, S, 3), and where a bright square of a quarter of the side was drawn."""
    wave = np.sin(np.arange(size) / rng.uniform(3, 6))[:, None] + np.cos(np.arange(size) / rng.uniform(3, 6))
    image = (110 + 40 * wave[..., None] * [1, 0.8, 0.6] + rng.normal(0, 4, (size, size, 3))).clip(0, 255)
    mask = np.zeros((size, size), bool)
    if defect:
        y, x = rng.integers(size // 8, size - size * 3 // 8, 2)
        mask[y : y + size // 4, x : x + size // 4] = True
        image[mask] = 250
    return image.astype(np.uint8), mask


def save(path: Path, image: np.ndarray, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Image.fromarray(image)
    (made.quantize(64) if mode == "P" else made.convert(mode)).save(path)


def png16(path: Path, values: np.ndarray, colour: int, extra: bytes = b"") -> None:
    """A PNG file of 16 bits with any number of channels, which Pillow cannot write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + values[y].astype(">u2").tobytes() for y in range(height))
    head = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    clear = chunk(b"tRNS", extra) if extra else b""
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + clear + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


def make_mvtec(
    root: Path,
    classes: Sequence[str] = ("bottle", "grid"),
    train: int = 6,
    good: int = 3,
    bad: int = 3,
    size: int = SIDE,
) -> Path:
    """MVTec AD's layout; the second class is grey, the third RGBA, the fourth a palette."""
    for number, name in enumerate(classes):
        rng, mode = np.random.default_rng(number), ("RGB", "L", "RGBA", "P")[number % 4]
        for i in range(train):
            save(root / name / "train" / "good" / f"{i:03d}.png", picture(rng, size=size)[0], mode)
        for i in range(good):
            save(root / name / "test" / "good" / f"{i:03d}.png", picture(rng, size=size)[0], mode)
        for kind in ("broken", "scratch"):
            for i in range(bad):
                image, mask = picture(rng, defect=True, size=size)
                save(root / name / "test" / kind / f"{i:03d}.png", image, mode)
                save(root / name / "ground_truth" / kind / f"{i:03d}_mask.png", (mask * 255).astype(np.uint8), "L")
        (root / name / "license.txt").write_text("not an image")
    return root


def make_visa_rearranged(
    root: Path, classes: Sequence[str] = ("candle", "pcb1"), train: int = 6, test: int = 3
) -> Path:
    """VisA as the released README wants it: MVTec-like, one kind `bad`, masks named like their images."""
    for number, name in enumerate(classes):
        rng = np.random.default_rng(number)
        for i in range(train):
            save(root / name / "train" / "good" / f"{i:04d}.JPG", picture(rng)[0])
        for i in range(test):
            save(root / name / "test" / "good" / f"{i:04d}.JPG", picture(rng)[0])
            image, mask = picture(rng, defect=True)
            save(root / name / "test" / "bad" / f"{i:03d}.JPG", image)
            save(root / name / "ground_truth" / "bad" / f"{i:03d}.png", (mask * 255).astype(np.uint8), "L")
    return root


def make_visa_original(root: Path, classes: Sequence[str] = ("candle", "pcb1"), train: int = 6, test: int = 3) -> Path:
    """VisA as the archive unpacks: masks number their defects, the split stands in a file."""
    rows = []
    for number, name in enumerate(classes):
        rng, base = np.random.default_rng(number), Path(name) / "Data"
        for i in range(train + test):
            path = base / "Images" / "Normal" / f"{i:04d}.JPG"
            save(root / path, picture(rng)[0])
            rows.append([name, "train" if i < train else "test", "normal", path.as_posix(), ""])
        for i in range(test):
            image, mask = picture(rng, defect=True)
            path, drawn = base / "Images" / "Anomaly" / f"{i:03d}.JPG", base / "Masks" / "Anomaly" / f"{i:03d}.png"
            save(root / path, image)
            save(root / drawn, mask.astype(np.uint8) * (i + 1), "L")
            rows.append([name, "test", "anomaly", path.as_posix(), drawn.as_posix()])
    (root / "split_csv").mkdir()
    with (root / "split_csv" / "1cls.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])
    return root


def load_image(path: Path, size: int, reading: Reading = PLAIN, max_pixels: int = MAX_PIXELS) -> Tensor:
    """An image file as a data set gives it: (3, size, size) in [0, 1]."""
    return to_tensor(path, read_pixels(path, max_pixels), Geometry(input_size=size), reading)
