"""A 20-pixel defect in images of 4000 x 3000 pixels, looked at as a whole and in tiles.

    python -m benchmarks.tiles [--threads 1]

Makes a woven texture with small worn spots in a folder of its own, trains on four good images with --preset cpu, and
gives the scores of others, where the peaks of worn ones lie, and what it took.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from detector import load_detector
from main import main as program

WIDTH, HEIGHT, SPOT = 4000, 3000, 20
TRAIN, TEST = 4, 2
COMMON = [
    "--dataset", "folder", "--preset", "cpu", "--multi-class", "--no-report", "--pictures", "0", "--meta-epochs", "1",
    "--eval-interval", "1", "--holdout", "0.3", "--false-alarm-rate", "0.3", "--device", "cpu",
]  # fmt: skip
WAYS: dict[str, list[str]] = {"whole": [], "tiles": ["--tile", "512", "--overlap", "64"]}


def texture(rng: np.random.Generator) -> np.ndarray:
    """A weave with uneven threads and light, (H, W, 3) uint8."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH].astype(np.float32)
    bend = cv2.resize(rng.normal(0, 4, (12, 16)).astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    light = cv2.resize(rng.normal(0, 6, (4, 5)).astype(np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    weave = 22 * np.sin((x + bend) / 4) * np.cos((y + bend) / 5) + light + rng.normal(0, 5, (HEIGHT, WIDTH))
    return (weave[..., None] + np.array([150, 135, 110])).clip(0, 255).astype(np.uint8)


def worn(image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """With a round spot of `SPOT` pixels where the weave is worn flat, as bright as before, and its mask (H, W)."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    place = int(rng.integers(200, WIDTH - 200)), int(rng.integers(200, HEIGHT - 200))
    cv2.circle(mask, place, SPOT // 2, 255, -1)
    flat = cv2.GaussianBlur(image, (0, 0), SPOT / 2)
    return np.where(mask[..., None] > 0, flat, image), mask


def make_images(root: Path) -> Path:
    """In MVTec's layout."""
    rng = np.random.default_rng(0)
    for part, count in (("train/good", TRAIN), ("test/good", TEST), ("test/worn", TEST)):
        for number in range(count):
            image, mask = texture(rng), None
            if part == "test/worn":
                image, mask = worn(image, rng)
            for folder, values in ((part, image), ("ground_truth/worn", mask)):
                if values is not None:
                    path = root / "cloth" / folder / f"{number}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(values).save(path, compress_level=1)
    return root


def line(way: str, data: Path, work: Path) -> str:
    """Train and judge in one way, and say how it went."""
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        status = program([*COMMON, "--data-path", str(data), "--work-dir", str(work), "--name", way, *WAYS[way]])
    assert status == 0
    detector = load_detector(work / f"{way}-seed9826", device="cpu")
    scores: dict[str, list[float]] = {"good": [], "worn": []}
    hits = 0
    for kind, found in scores.items():
        for path in sorted((data / "cloth/test" / kind).iterdir()):
            said = detector(path)
            found.append(said.score)
            if kind == "worn":
                mask = np.asarray(Image.open(data / "cloth/ground_truth/worn" / path.name))
                hits += bool(cv2.dilate(mask, np.ones((41, 41), np.uint8))[said.peak.y, said.peak.x])
    good, bad = (" ".join(f"{score:.2f}" for score in found) for found in scores.values())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"{way}: scores of good images {good}, of worn ones {bad}; {hits} of {TEST} peaks at the spot; "
        f"{time.perf_counter() - began:.0f} s, {memory:.1f} GiB at most so far"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    with tempfile.TemporaryDirectory() as place:
        images = make_images(Path(place) / "data")
        for chosen in WAYS:
            print(line(chosen, images, Path(place) / "work"), flush=True)
