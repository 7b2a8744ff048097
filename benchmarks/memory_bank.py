"""What a memory costs as it grows: bytes, and seconds to judge an image by it, on generated features.

    python benchmarks/memory_bank.py
    python benchmarks/memory_bank.py --images 1000 10000 --input-size 384 --extractor convnextv2_base

One thread. Choosing the most similar images compares all descriptors and is linear, with a small constant; the search
among the vectors of those chosen does not depend on how many are stored. Vectors that are larger than --room lie in a
sparse file, which takes no disk: all zeros, which take as long to search, and to fetch unless the file is on a disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.extractor import FrozenExtractor
from models.memory import Memory
from models.scorer import ScoreRule

BLOCK = 100  # images whose random vectors are repeated


def shapes_of(extractor: str, side: int) -> list[tuple[int, ...]]:
    """(c, H, W) of the four levels."""
    with torch.device("meta"):
        net = FrozenExtractor(extractor, input_size=side, pretrained=False)
        return [tuple(level.shape[1:]) for level in net(torch.empty(1, 3, side, side))]


def vectors(images: int, places: int, width: int, room: float, folder: str) -> Tensor:
    """(images, places, width) in half precision: random, or zeros in a sparse file."""
    if 2 * images * places * width > room:
        path = Path(folder) / f"{images}-{places}-{width}"
        return torch.from_numpy(np.memmap(path, mode="w+", dtype=np.float16, shape=(images, places, width)))
    made = torch.empty(images, places, width, dtype=torch.float16)
    block = torch.randn(min(BLOCK, images), places, width).half()
    for part in made.split(BLOCK):
        part.copy_(block[: len(part)])
    return made


def filled(images: int, shapes: list[tuple[int, ...]], room: float, folder: str) -> Memory:
    """A memory of so many images."""
    rule = ScoreRule()
    memory = Memory(channels=[c for c, _, _ in shapes], views=rule.views, search=rule.search)
    memory.descriptors = torch.randn(images, shapes[-1][0]).half()
    for number, view in enumerate(rule.views):
        (_, height, width), channels = shapes[view.levels[0]], sum(shapes[level][0] for level in view.levels)
        places = min(view.places, height * width)
        setattr(memory, f"vectors_{number}", vectors(images, places, channels, room, folder))
    return memory


@torch.no_grad()
def seconds(memory: Memory, shapes: list[tuple[int, ...]], batch: int, rounds: int) -> tuple[float, float]:
    """Of an image: choosing the most similar images, and all of it; the least of some rounds."""
    chosen, whole = [], []
    for number in range(rounds + 1):
        torch.manual_seed(number)
        features = [torch.randn(batch, *shape) for shape in shapes]
        began = time.perf_counter()
        memory._most_alike(features[-1].mean((2, 3)), True)
        between = time.perf_counter()
        memory(features)
        if number:  # the first one warms up
            chosen.append(between - began)
            whole.append(time.perf_counter() - between)
    return min(chosen) / batch, min(whole) / batch


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--extractor", default="tf_efficientnet_lite0")
    parser.add_argument("--input-size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--room", type=float, default=2.0, help="GB that the vectors of a view may take in memory")
    words = parser.parse_args()
    torch.set_num_threads(1)
    shapes = shapes_of(words.extractor, words.input_size)
    print(
        "| images | GB of vectors | GB of descriptors | s an image, choosing | s an image, all |\n|---|---|---|---|---|"
    )
    for images in words.images:
        torch.manual_seed(images)
        with tempfile.TemporaryDirectory() as folder:
            memory = filled(images, shapes, 1e9 * words.room, folder)
            held = sum(value.nbytes for name, value in memory.named_buffers() if name != "descriptors")
            choosing, whole = seconds(memory, shapes, words.batch, words.rounds)
            size = memory.descriptors.nbytes
            print(f"| {images} | {held / 1e9:.3g} | {size / 1e9:.3g} | {choosing:.3g} | {whole:.3g} |", flush=True)
            del memory


if __name__ == "__main__":
    main()
