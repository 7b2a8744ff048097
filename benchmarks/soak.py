"""Does anything grow? Many training steps, evaluations and predictions on tiny data.

Memory, open files and threads are sampled; it prints what each grows by after the warm-up, and leaves with status 1
where that is above its limit. For Linux.

    make soak                                                         2,000 steps, 200 evaluations, 2,000 predictions
    python benchmarks/soak.py --epochs 20 --predictions 200           shorter: 10 steps and an evaluation an epoch
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums this small gain nothing by more, and other programs wait less
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detector import load_detector  # noqa: E402
from main import main as program  # noqa: E402

STEPS = 10  # of a meta epoch: batches of two images
WARM_UP = 0.3  # share of the samples that is left out
EVERY = 0.2  # seconds between samples
LIMITS = {"memory": 10.0, "files": 0.5, "threads": 0.5}  # growth from the end of the warm-up on: MiB, and numbers
ARGV = [
    "--dataset", "mvtec", "--class-names", "bottle", "--multi-class", "--quantize-enable", "--concat-pos",
    "--mixed-gaussian", "--extractor", "tf_efficientnet_lite0", "--input-size", "64", "--dim-cpc", "8", "--k-cpc", "4",
    "--k-cspc", "8", "--c-pos-conds", "4", "--parallel-blocks", "1", "--batch-size", "2", "--sub-epochs", "1",
    "--holdout", "0.2", "--memory", "8", "--image-score", "surprise", "--pixel-score", "contrast", "--pictures", "0",
    "--no-report", "--no-compare", "--device", "cpu", "--name", "soak",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What the process holds at a time (seconds): `memory` resident (MiB), open `files`, `threads`."""

    time: float
    memory: float
    files: int
    threads: int

    @classmethod
    def now(cls) -> Usage:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        files, threads = (sum(1 for _ in Path(f"/proc/self/{kind}").iterdir()) for kind in ("fd", "task"))
        return cls(
            time=time.perf_counter(), memory=pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files=files, threads=threads
        )


@contextlib.contextmanager
def sampled() -> Iterator[list[Usage]]:
    """Samples are added to the list until the end of the block."""
    samples, over = [Usage.now()], threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            samples.append(Usage.now())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


def growth(samples: Sequence[Usage], name: str) -> float:
    """By how much the least-squares line through the samples after the warm-up rises from its start to its end."""
    rest = samples[int(WARM_UP * len(samples)) :]
    x, y = np.array([s.time for s in rest]), np.array([getattr(s, name) for s in rest], float)
    if len(rest) < 3:
        raise SystemExit(f"soak.py: {len(rest)} samples after the warm-up are too few; run it longer")
    return float(np.polyfit(x - x[0], y, 1)[0] * (x[-1] - x[0]))


def rows(title: str, samples: Sequence[Usage], count: int) -> tuple[list[str], bool]:
    """A table's lines about `count` repetitions, and whether all is flat."""
    lines, flat = [], True
    for name, limit in LIMITS.items():
        values, rise = [getattr(s, name) for s in samples], growth(samples, name)
        per = 1000 * rise / ((1 - WARM_UP) * count)
        unit = " MiB" if name == "memory" else ""
        lines.append(
            f"| {title} | {name}{unit} | {np.median(values):.0f} | {max(values):.0f} | {rise:+.2f} | {per:+.2f} |"
        )
        flat &= rise <= limit
    return lines, flat


def make_images(root: Path) -> list[Path]:
    """25 good images to train on, and four test images, half of them with a bright square; the test images."""
    rng, test = np.random.default_rng(0), []
    for number in range(29):
        image = (110 + 40 * np.sin(np.arange(64) / 4)[:, None, None] + rng.normal(0, 9, (64, 64, 3))).clip(0, 255)
        bad, mask = number >= 27, np.zeros((64, 64), np.uint8)
        if bad:
            mask[20:36, 10:26] = 255
            image[mask > 0] = 250
            save(root / "ground_truth" / "bad" / f"{number}_mask.png", mask)
        place = "train/good" if number < 25 else "test/bad" if bad else "test/good"
        save(root / place / f"{number}.png", image.astype(np.uint8))
        test += [root / place / f"{number}.png"] if number >= 25 else []
    return test


def save(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def soak(epochs: int, predictions: int, folder: Path) -> bool:
    """Train, predict, print the table; whether all is flat."""
    images = make_images(folder / "data" / "bottle")
    argv = [*ARGV, "--data-path", str(folder / "data"), "--work-dir", str(folder), "--meta-epochs", str(epochs)]
    with sampled() as training:
        if program(argv):
            raise SystemExit("soak.py: the training ended with an error")
    detector = load_detector(folder / "soak-seed9826", device="cpu")
    with sampled() as predicting:
        for number in range(predictions):
            detector(images[number % len(images)])
    parts = [
        rows(f"{epochs * STEPS} steps, {epochs} evaluations", training, epochs * STEPS),
        rows(f"{predictions} predictions", predicting, predictions),
    ]
    print("\n| what | of | median | highest | growth after the warm-up | growth per 1000 |\n|---|---|---|---|---|---|")
    print("\n".join(line for lines, _ in parts for line in lines))
    return all(flat for _, flat in parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=200, help=f"meta epochs of {STEPS} steps and an evaluation")
    parser.add_argument("--predictions", type=int, default=2000)
    args = parser.parse_args()
    if not Path("/proc/self/statm").is_file():
        raise SystemExit("soak.py: reads /proc, which this system does not have")
    with tempfile.TemporaryDirectory() as folder:
        flat = soak(args.epochs, args.predictions, Path(folder))
    print("flat" if flat else f"not flat: more than {LIMITS}")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
