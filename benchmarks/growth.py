"""How cost grows with images, classes, image size and the test set: seconds, memory, and slopes in log-log.

    python benchmarks/growth.py
    python benchmarks/growth.py --images 100 1000 --classes 1 10 --sides 64 128 --tests 250 1000

Everything is generated; nothing is downloaded. A slope is that of the last step, where constant parts weigh least: 1 is
linear, 0 constant; below the table stands what grows faster than linearly, and then the status is 1. Images are small
files at up to 100,000, so what is run there is what a program does before and after it computes: listing them, looking
at headers and masks, planning, sampling, the metrics and the tables. What is computed an image is measured by image
size. Test images go through the evaluation loop, a process of its own for each number, whose peak of memory is told.
Seconds are processor time of one thread, the least of the rounds. Outcome in BENCHMARKS.md; for Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.forms import Bench, Form
from datasets import build_datasets, evenly_spread, scan_classes, split_holdout
from datasets.cache import cache_key
from datasets.features import FeatureBatch
from datasets.folder import ImageFolder
from datasets.loaders import EpochSampler
from default import Config, make_config
from models.decision import Calibrated, Decision
from stage import Stage
from test import evaluate
from utils.metrics import ClassAccumulator
from utils.report.images import ImageResult
from utils.report.verdicts import write_scores

LIMIT = 1.2  # slope above which something is called faster than linear; a busy machine moves slopes by a tenth
SIDE = 32  # of generated images and maps
TINY = {
    "extractor": "tf_efficientnet_lite0", "pretrained": False, "input_size": 64, "dim_cpc": 8, "k_cpc": 4, "k_cspc": 8,
    "c_pos_conds": (4,), "parallel_blocks": (1,), "multi_class": True, "memory": 0, "context": 0,
    "semantics": "learned", "image_score": "likelihood", "pixel_score": "likelihood", "pro_score": "likelihood",
    "device": "cpu",
}  # fmt: skip
Work = Callable[[], object]
Row = dict[int, float]  # of a part: number -> seconds, or MiB


def slope(row: Mapping[int, float]) -> float:
    """Of the last step in log-log; NaN of one number alone."""
    if len(row) < 2:
        return math.nan
    (x, a), (y, b) = sorted(row.items())[-2:]
    return math.log(b / a) / math.log(y / x)


def seconds(work: Work, rounds: int) -> float:
    """Processor seconds, the least of the rounds; what it prints is not shown."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            work()
        found.append(time.process_time() - begin)
    return min(found)


def make_images(root: Path, count: int, classes: int) -> Config:
    """Small images in MVTec's layout: of each class a tenth are good test images, a tenth defective ones with masks."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    mark = np.zeros((SIDE, SIDE), np.uint8)
    mark[8:16, 8:16] = 255
    image, mask = (encoded(pixels) for pixels in (noise, mark))
    for number in range(count):
        place, own = root / f"c{number % classes:05d}", number // classes
        kind = {0: "test/good", 1: "test/bad"}.get(own % 10, "train/good")
        written(place / kind / f"{own:06d}.png", image)
        if kind == "test/bad":
            written(place / "ground_truth" / "bad" / f"{own:06d}_mask.png", mask)
    return make_config("cpu", dataset="folder", data_path=str(root), device="cpu", work_dir=str(root.parent / "work"))


def encoded(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def written(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def parts_of(root: Path, count: int, classes: int) -> Iterator[tuple[str, Work]]:
    """What a program does with images beside computing, by name."""
    config = make_images(root / "data", count, classes)
    names = tuple(f"c{number:05d}" for number in range(classes))
    made: list[tuple[ImageFolder, ImageFolder]] = []
    yield "listing them", lambda: scan_classes(config.data, names)
    yield "listing, headers, masks, how they are read", lambda: made.append(build_datasets(config.data, names))
    train, test = made[-1]
    yield "which are held out, which are a sample", lambda: (split_holdout(train, 0.1), evenly_spread(train))
    yield "order of an epoch", lambda: list(EpochSampler(len(train), 1, 16))
    yield "which cache fits", lambda: cache_key(train)
    yield "thresholds, and 16 verdicts by them", partial(decide, count)
    yield f"seven metrics, maps of {SIDE} px", partial(measure, count, classes)
    rows = [
        ImageResult(
            path=str(item.path), class_name=names[item.class_index], label=item.label, score=0.5, concept=0,
            peak=(0.5, 0.5), peak_value=1.0, hit=None,
        )
        for item in (*train.items, *test.items)
    ]  # fmt: skip
    yield "scores.csv", lambda: write_scores(root, rows)


def decide(count: int) -> None:
    """Conformal thresholds from so many calibration images in 16 concepts."""
    scores = np.random.default_rng(0).normal(size=count)
    concepts = tuple(number % 16 for number in range(count))
    calibrated = Calibrated(scores=tuple(scores), peaks=tuple(scores), concepts=concepts, scoring={}, unseen=True)
    Decision(calibrated, 0.05)(torch.zeros(16), torch.arange(16))


def measure(count: int, classes: int, batch: int = 100) -> None:
    """All metrics of so many maps."""
    accumulators, rng = [ClassAccumulator() for _ in range(classes)], np.random.default_rng(0)
    maps = rng.normal(size=(batch, SIDE, SIDE)).astype(np.float32)
    masks = np.zeros((batch, SIDE, SIDE), bool)
    masks[::2, 8:16, 8:16] = True
    share = count // classes
    for accumulator in accumulators:
        for begin in range(0, share, batch):
            size = min(batch, share - begin)
            maps[:size] += 1e-3  # no two batches are alike
            accumulator.update(
                labels=masks[:size].any((1, 2)).astype(int), scores=maps[:size].max((1, 2)), masks=masks[:size],
                maps=maps[:size],
            )  # fmt: skip
        accumulator.compute()


def by_images(counts: Sequence[int], rounds: int) -> dict[str, Row]:
    """Seconds of each part, with one class."""
    return grown(((count, count, 1) for count in counts), rounds)


def by_classes(counts: Sequence[int], rounds: int, each: int = 10) -> dict[str, Row]:
    """Seconds of each part, with 10 images a class."""
    return grown(((count, each * count, count) for count in counts), rounds)


def grown(cases: Iterator[tuple[int, int, int]] | Sequence[tuple[int, int, int]], rounds: int) -> dict[str, Row]:
    """Part -> number -> seconds; cases are numbers, images and classes."""
    found: dict[str, Row] = {}
    for number, images, classes in cases:
        with tempfile.TemporaryDirectory() as folder:
            for name, work in parts_of(Path(folder), images, classes):
                found.setdefault(name, {})[number] = seconds(work, rounds)
    return found


def by_side(sides: Sequence[int], rounds: int, batch: int = 4) -> dict[str, Row]:
    """Seconds for a batch of images by their number of pixels."""
    found: dict[str, Row] = {}
    for side in sides:
        bench = Bench("small", batch, torch.device("cpu"), input_size=side)
        for name, cached, work in (
            ("inference, from pixels to metrics", False, bench.infer),
            ("training step, cached features", True, bench.train_step),
        ):
            bench.use(Form(name="", cached=cached))
            work()
            found.setdefault(name, {})[side**2] = seconds(work, rounds)
    return found


def random_features(stage: Stage, count: int, batch: int = 16) -> Iterator[FeatureBatch]:
    """Batches of random features of test images, half of which are defective; always the same ones."""
    side = stage.config.score_size
    shapes = [level.shape[1:] for level in stage.extract(torch.zeros(1, 3, side, side))]
    generator = torch.Generator().manual_seed(0)
    for begin in range(0, count, batch):
        size = min(batch, count - begin)
        masks = torch.zeros(size, side, side, dtype=torch.bool)
        masks[::2, : side // 4, : side // 4] = True
        yield FeatureBatch(
            features=[torch.randn(size, *shape, generator=generator) for shape in shapes], mask=masks,
            label=masks.flatten(1).any(1).long(), class_index=torch.zeros(size, dtype=torch.int64),
            path=tuple(f"{begin + i}.png" for i in range(size)),
        )  # fmt: skip


def evaluate_alone(count: int) -> None:
    """In a process of its own: the evaluation loop over so many test images; prints seconds and the peak in MiB."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(make_config(**TINY, work_dir=folder))
        begin = time.process_time()
        evaluate(stage.build_detector(), random_features(stage, count), ("part",), stage.config.eval)
        took = time.process_time() - begin
    peak = re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[0]
    print(took, int(peak) / 1024)


def by_tests(counts: Sequence[int]) -> tuple[dict[str, Row], dict[str, Row]]:
    """Seconds and MiB of an evaluation by the number of test images."""
    took, peaks = {}, {}
    for count in counts:
        command = [sys.executable, __file__, "--evaluate", str(count)]
        # freed blocks go back at once: the peak is what is held, not what the allocator keeps for later
        given_back = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=given_back)
        took[count], peaks[count] = map(float, done.stdout.split())
    return {"evaluation loop, 64 px": took}, {"its peak of memory": peaks}


def table(what: str, unit: str, rows: Mapping[str, Row]) -> str:
    """In Markdown."""
    numbers = list(next(iter(rows.values())))
    lines = [f"| {what}: {unit} | {' | '.join(f'{n:,}' for n in numbers)} | slope |", "|---" * (len(numbers) + 2) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(f'{row[n]:.3g}' for n in numbers)} | {slope(row):.2f} |")
    return "\n".join(lines)


def faster_than_linear(tables: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """What grows so, a text each; tables are by what it grows with."""
    rows = [(f"{name}, by {what}", slope(row)) for what, table in tables.items() for name, row in table.items()]
    return [f"{text}: {steep:.2f}" for text, steep in rows if steep > LIMIT]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--classes", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--tests", type=int, nargs="+", default=[250, 1000, 4000])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--evaluate", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.evaluate:
        evaluate_alone(options.evaluate)
        return
    torch.set_num_threads(1)
    found: dict[str, dict[str, Row]] = {}
    found["test images"], peaks = by_tests(options.tests)
    print(
        table("test images", "seconds", found["test images"]) + "\n\n" + table("test images", "MiB", peaks) + "\n",
        flush=True,
    )
    for what, work in (
        ("pixels of an image, batch 4", lambda: by_side(options.sides, options.rounds)),
        ("classes, 10 images each", lambda: by_classes(options.classes, options.rounds)),
        ("images", lambda: by_images(options.images, options.rounds)),
    ):
        found[what] = work()
        print(table(what, "seconds", found[what]) + "\n", flush=True)
    faster = faster_than_linear(found)
    print("Faster than linearly grows: " + ("; ".join(faster) or "nothing") + ".")
    sys.exit(bool(faster))


if __name__ == "__main__":
    main()
