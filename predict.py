"""Decisions on images without labels: files and folders in; a table, pictures and maps out."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray

from datasets import unlabelled
from datasets.walk import image_files
from default import MANY_IMAGES, SOME_IMAGES, Config, UsageError, flag_of
from detector import ImageDetector, Opened, load_detector, loaded
from prediction import Prediction
from utils.report.plots import heat_overlay, save_picture
from utils.report.verdicts import WORDS, Rows
from utils.run.distributed import from_first, is_first, joined, processes, rank
from utils.run.folders import new_folder
from utils.run.progress import progress
from utils.run.text import printable
from utils.run.writer import write_whole

AT_ONCE = 32_000_000  # pixels of the images that are in memory together, unless a single one has more
HUNDREDTHS, ZERO = 100, 32768  # of a map in 16 bits: v = 100 score + 32768
TRIED = 2  # images that engines are compared on
POLL = 1.0  # seconds between two looks at a folder that is watched
LONGEST_JPEG = 65500  # pixels of a side


def run_predict(config: Config, chosen: dict[str, Any]) -> int:
    """Judge the images that the command line names; the status: 1 if some could not be read, else 3 if --fail-on says
    so.

    Raises:
        UsageError: no such path, no image in it, a checkpoint that cannot be loaded, or one without thresholds where
            they are needed.
    """
    assert config.eval.eval_ckpt is not None
    if len(config.data.class_names) > 1:
        raise UsageError(f"--class-names: expected one class in --mode predict, but got {len(config.data.class_names)}")
    watched = config.predict.watch
    if watched is not None and not Path(watched).is_dir():
        raise UsageError(f"--watch: no such folder: {watched}")
    if watched is not None and processes() > 1:
        raise UsageError(f"--watch: is for one process, but there are {processes()}; leave torchrun out")
    paths = from_first(lambda: all_paths(config.run.paths, needed=watched is None))
    detector = loaded(config, chosen)
    check_thresholds(detector)
    folder = from_first(lambda: output_folder(detector.config))
    paths = [path for path in paths if not lies_in(path, folder)]
    if processes() > 1 and not is_first():
        judge_together(detector, folder, from_first(list), None)
        return 0
    counts = Counts()
    with Rows(folder) as rows:
        left = [path for path in paths if not rows.is_done(path)]
        if len(left) < len(paths):
            print(f"{folder}: {len(paths) - len(left)} of {len(paths)} images were judged before")
            for path in filter(rows.is_done, paths):
                counts.add(rows.verdict(path))
        if processes() > 1:
            judge_together(detector, folder, from_first(lambda: list(enumerate(left, start=len(rows.done) + 1))), rows)
            for path in left:
                counts.add(rows.verdict(path))
        else:
            judge_all(detector, left, folder, rows, counts)
        if watched is not None:
            print(f"waiting for images in {watched}; Ctrl-C ends this; rows are written to {folder}", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                watch(detector, Path(watched), folder, rows, counts)
    tell(counts, detector, folder)
    if counts.errors:
        return 1
    return 3 if counts.defects and config.predict.fail_on else 0


def predict_unlabelled(config: Config, run: Path) -> None:
    """Judge the images in the test folders of a finished run's data that have no labels, in its folder `predict`."""
    found = unlabelled(config.data)
    if not found:
        return
    folder, counts = new_folder(run, "predict"), Counts()
    with Rows(folder) as rows:
        for name, paths in found.items():
            print(printable(f"{name}: {len(paths)} images without labels"))
            detector = load_detector(run, class_name=name, device=config.run.device)
            check_thresholds(detector)
            judge_all(detector, paths, folder, rows, counts)
    tell(counts, detector, folder)


def tell(counts: Counts, detector: ImageDetector, folder: Path) -> None:
    """The last lines."""
    print(
        f"{counts.images} images: {counts.defects} defective, {counts.errors} not read; computed by {detector.engine}; "
        f"written to: {folder}"
    )
    if counts.errors:
        print(f"{counts.errors} of {counts.images} images could not be read; scores.csv says why", file=sys.stderr)


@dataclass
class Counts:
    """Of the images so far: how many, and how many are defective or could not be read."""

    images: int = 0
    defects: int = 0
    errors: int = 0

    def add(self, verdict: str | None) -> None:
        self.images += 1
        self.defects += verdict == "defect"
        self.errors += verdict == "error"


def watch(detector: ImageDetector, watched: Path, folder: Path, rows: Rows, counts: Counts) -> None:
    """Judge the images in a folder that are not in the table yet, and those that come, until interrupted."""
    before: dict[Path, tuple[int, int]] = {}
    while True:
        new = [path for path in image_files(watched) if not rows.is_done(path) and not lies_in(path, folder)]
        now = {path: stamp for path in new if (stamp := stamp_of(path)) is not None}
        ready = [path for path, stamp in now.items() if before.get(path) == stamp]  # nobody writes to it any more
        judge_all(detector, ready, folder, rows, counts)
        before = now
        if not ready:
            time.sleep(POLL)


def stamp_of(path: Path) -> tuple[int, int] | None:
    """Size and time of the last change; None for a file that is empty yet or gone."""
    try:
        found = path.stat()
    except OSError:
        return None
    return (found.st_size, found.st_mtime_ns) if found.st_size else None


def lies_in(path: Path, folder: Path) -> bool:
    """Whether a file lies below a folder: what is written there must not be judged in turn."""
    return folder.resolve() in path.resolve().parents


def all_paths(names: Sequence[str], *, needed: bool = True) -> list[Path]:
    """The files that are named, and the images in folders that are named, none twice, in order.

    Raises:
        UsageError: nothing is named although it is `needed`, or there is no such file or folder.
    """
    if not needed and not names:
        return []
    if not names:
        raise UsageError("PATH: expected images or folders of them after --mode predict, but got none")
    found: dict[Path, None] = {}
    for name in names:
        for path in map(Path, listed() if name == "-" else [name]):
            if name != "-" and not os.path.lexists(path):  # of a list, the others go on
                raise UsageError(f"PATH: no such file or folder: {path}")
            found |= dict.fromkeys(image_files(path) if path.is_dir() else [path])
    if not found:
        raise UsageError(f"PATH: no image in {', '.join(names)}")
    return list(found)


def listed() -> list[str]:
    """The names on standard input, one a line, in whatever bytes they are."""
    return [os.fsdecode(line) for line in sys.stdin.buffer.read().split(b"\n") if line]


def check_thresholds(detector: ImageDetector) -> None:
    """Say what verdicts rest on, or that there are none; raise `UsageError` where something needs them."""
    if detector.decides:
        print("\n".join(detector.rules()))
        return
    wanted = detector.config.predict
    for name, asked in (("save_masks", wanted.save_masks), ("fail_on", wanted.fail_on)):
        if asked:
            raise UsageError(
                f"{flag_of(name)}: {detector.config.eval.eval_ckpt} has no thresholds for these scores; leave it out"
            )
    print("the model has no thresholds for these scores: no p-values, no verdicts, no overlays")


def output_folder(config: Config) -> Path:
    """The folder to write into, made if it is not there, which remembers of which model it is.

    Raises:
        UsageError: it cannot be made, or holds predictions of another model.
    """
    checkpoint = Path(str(config.eval.eval_ckpt)).resolve()
    place = config.predict.output
    if place is None:
        return new_folder(checkpoint if checkpoint.is_dir() else checkpoint.parent, "predict")
    folder, made_with = Path(place), {"eval_ckpt": printable(str(checkpoint)), "rate": config.eval.false_alarm_rate}
    known = folder / "made_with.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if known.is_file() and json.loads(known.read_text(encoding="utf-8")) != made_with:
            raise UsageError(f"--output: {folder} holds predictions of another model or rate; name another folder")
        write_whole(known, (json.dumps(made_with) + "\n").encode())
    except (OSError, json.JSONDecodeError) as error:
        raise UsageError(f"--output: cannot write in {folder}: {error}") from error
    return folder


def judge_all(detector: ImageDetector, paths: Sequence[Path], folder: Path, rows: Rows, counts: Counts) -> None:
    """Write a row, and what else is asked for, of every image."""
    choose_engine(detector, paths, counts.images + len(paths))
    judged = outcomes(detector, paths)
    for path, opened, found, seconds in progress(judged, total=len(paths), text="prediction", unit="images"):
        if isinstance(found, Prediction) and opened is not None:
            save_files(detector.config, folder, len(rows.done) + 1, path, opened, found)
        rows.add(row_of(path, found, seconds))
        counts.add(rows.verdict(path))


def choose_engine(detector: ImageDetector, paths: Sequence[Path], images: int) -> None:
    """With --engine auto, on a CPU: go on with the quickest engine, where there are `images` enough for the trial."""
    graph = detector.graph
    if detector.config.predict.engine != "auto" or graph is None or images < SOME_IMAGES:
        return
    if images >= MANY_IMAGES or graph.ready:
        opened = (opened_or_reason(detector, path) for path in paths)
        first = list(islice((one for one in opened if isinstance(one, Opened)), TRIED))
        if first:
            print(detector.hurry(first), flush=True)


def judge_together(detector: ImageDetector, folder: Path, numbered: list[tuple[int, Path]], rows: Rows | None) -> None:
    """As `judge_all`, of several processes: batch by batch in turn, each image with the number of its row; the first
    process writes all `rows`, a batch of each process at a time."""
    size = detector.config.train.batch_size
    for start in range(rank() * size, len(numbered) + rank() * size, processes() * size):
        own = numbered[start : start + size]
        made = []
        for (number, path), (_, opened, found, seconds) in zip(
            own, outcomes(detector, [p for _, p in own]), strict=True
        ):
            if isinstance(found, Prediction) and opened is not None:
                save_files(detector.config, folder, number, path, opened, found)
            made.append(row_of(path, found, seconds))
        for row in joined(made):
            if rows is not None:
                rows.add(row)


Outcome = tuple[Path, Opened | None, Prediction | str, float]


def outcomes(detector: ImageDetector, paths: Sequence[Path]) -> Iterator[Outcome]:
    """Each path with its image and what is said of it, or None and the reason, and its share of the seconds."""
    for batch in opened_batches(detector, paths):
        began = time.perf_counter()
        there = [one for _, one, _ in batch if isinstance(one, Opened)]
        found = iter(detector.judge(there) if there else ())
        share = (time.perf_counter() - began) / max(len(there), 1)
        for path, one, seconds in batch:
            yield (path, one, next(found), seconds + share) if isinstance(one, Opened) else (path, None, one, seconds)


def opened_batches(detector: ImageDetector, paths: Sequence[Path]) -> Iterator[list[tuple[Path, Opened | str, float]]]:
    """Images, or the reason why not, and the seconds that it took; as many as go into a batch, and into memory."""
    batch: list[tuple[Path, Opened | str, float]] = []
    pixels = 0
    for path in paths:
        began = time.perf_counter()
        one = opened_or_reason(detector, path)
        batch.append((path, one, time.perf_counter() - began))
        pixels += one.size[0] * one.size[1] if isinstance(one, Opened) else 0
        if len(batch) == detector.config.train.batch_size or pixels > AT_ONCE:
            yield batch
            batch, pixels = [], 0
    if batch:
        yield batch


def opened_or_reason(detector: ImageDetector, path: Path) -> Opened | str:
    try:
        return detector.read(path)
    except UsageError as error:
        return str(error).removeprefix(f"{path}: ")
    except MemoryError:
        return "is too large for this machine's memory; lower --max-pixels refuses such images"


def row_of(path: Path, found: Prediction | str, seconds: float) -> dict[str, Any]:
    """An image's row of scores.csv and scores.jsonl."""
    row: dict[str, Any] = {"path": printable(str(path)), "seconds": round(seconds, 4)}
    if isinstance(found, str):
        names = ("score", "p_value", "threshold", "verdict", "concept", "peak_x", "peak_y", "peak_value", "regions")
        return row | dict.fromkeys(names) | {"error": printable(found)}
    concept = found.concept if found.class_name is None else printable(found.class_name)
    return row | {
        "score": found.score, "p_value": found.p_value, "threshold": found.threshold,
        "verdict": WORDS[found.defective], "concept": concept, "peak_x": found.peak.x, "peak_y": found.peak.y,
        "peak_value": found.peak.value, "regions": None if found.mask is None else [asdict(r) for r in found.regions],
        "error": None,
    }  # fmt: skip


def save_files(config: Config, folder: Path, number: int, path: Path, opened: Opened, found: Prediction) -> None:
    """The overlay, map and mask of the image in row `number`: folders overlays, maps and masks."""
    wanted, stem = config.predict, f"{number:06d}_{printable(path.stem)[:100]}"
    if wanted.overlays and found.pixel_threshold is not None:
        suffix = "png" if max(opened.size) > LONGEST_JPEG else "jpg"
        overlay = heat_overlay(opened.picture, scaled(found.map, found.pixel_threshold))
        save_picture(folder / "overlays" / f"{stem}.{suffix}", overlay)
    if wanted.save_maps is not None:
        save_map(folder / "maps" / stem, found.map, wanted.save_maps)
    if wanted.save_masks and found.mask is not None:
        save_picture(folder / "masks" / f"{stem}.png", np.repeat(found.mask[..., None] * np.uint8(255), 3, 2))


def scaled(values: NDArray, threshold: float) -> NDArray:
    """A map on the scale of `heat_overlay`, the same for all images: 1 is the threshold, above which pixels are marked,
    and 0 is zero (or as far below a negative threshold)."""
    return 1 + (values - threshold) / max(abs(threshold), 1e-12)


def save_map(stem: Path, values: NDArray[np.float32], kind: str) -> None:
    """Write a map (H, W) as the format says."""
    stem.parent.mkdir(exist_ok=True)
    path = stem.with_name(f"{stem.name}.{'png' if kind == 'png16' else kind}")
    if kind == "npy":
        write_whole(path, lambda file: np.save(file, values), durable=False)
    elif kind == "tiff":
        write_whole(path, lambda file: tifffile.imwrite(file, values), durable=False)
    else:
        deep = (values.astype(np.float64) * HUNDREDTHS + ZERO).round().clip(0, 65535).astype(np.uint16)
        write_whole(path, cv2.imencode(".png", deep)[1].tobytes(), durable=False)
