"""Our presets beside anomalib's models: the same images, the same backbone with the same weights, our evaluation.

    python3.11 -m venv .venv-peers && .venv-peers/bin/pip install -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --data-path DATA --python .venv-peers/bin/python

DATA holds one folder per class, as in MVTec AD. All images are read once, at the preset's size, and laid out as PNG
files, from which everybody trains and judges: ours one model for all classes (`peers_ours.py`), theirs one for each
(`peers_anomalib.py`, in its own environment). Each step is a process of its own, which says how long it took and how
much memory it had at most (so this is for Linux); maps and image scores come back as files. FastFlow and CFlow, which
train in epochs, get the processor seconds that our training took, shared out by the classes' numbers of images. A row
that (of theirs, a class) that is finished stays under --work-dir and is not made again. Outcome in BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import build_datasets, resolve_classes
from datasets.folder import ImageFolder
from default import UsageError, make_config
from utils.metrics import METRICS, ClassResult, evaluate_maps, mean_results
from utils.report.tables import TITLES, percent

OURS = ("cpu", "cpu-bfloat16", "accurate")
PEERS = ("PatchCore", "PaDiM", "FastFlow", "CFlow")
NOT_RUN = "EfficientAD is not run: it takes no other backbone, and its teacher's weights and ImageNette are downloads."
MIB = 1 << 20


def lay_out(data_path: str, folder: Path, **settings: Any) -> None:
    """Images of all classes as PNG files at the `cpu` preset's size, or as `settings` say, in FOLDER/train/CLASS and
    FOLDER/test/CLASS, (S, S, 3); labels (N,) and masks (N, S, S) of the latter in FOLDER/truth/CLASS.npz. Does nothing
    the second time.

    Raises:
        UsageError: FOLDER holds other data, an image has more than 8 bits per channel, or what `build_datasets` raises.
    """
    done = folder / "data.txt"
    if done.is_file():
        there = done.read_text(encoding="utf-8")
        if there != str(Path(data_path).resolve()):
            raise UsageError(f"--work-dir: {folder} holds images of {there}; choose another folder")
        return
    config = make_config("cpu", dataset="folder", data_path=data_path, **settings)
    names = resolve_classes(config.data)
    for part, images in zip(("train", "test"), build_datasets(config.data, names), strict=True):
        for index, name in enumerate(names):
            own = images.having([item for item in images.items if item.class_index == index])
            truth = written(own, folder / part / name)
            if part == "test":
                (folder / "truth").mkdir(exist_ok=True)
                np.savez_compressed(folder / "truth" / f"{name}.npz", **truth)
    done.write_text(str(Path(data_path).resolve()), encoding="utf-8")


def written(images: ImageFolder, folder: Path) -> dict[str, np.ndarray]:
    """Images as PNG files, numbered; their labels and masks."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for number in range(len(images)):
        sample = images[number]
        exact = 255 * sample.image.permute(1, 2, 0).double().numpy()
        pixels = exact.round()
        if np.abs(exact - pixels).max() > 1e-3:
            raise UsageError(
                f"--data-path: {sample.path} has more than 8 bits per channel, which anomalib does not read"
            )
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:05d}.png")
        samples.append((sample.label, sample.mask.numpy()))
    return {"labels": np.array([label for label, _ in samples]), "masks": np.stack([mask for _, mask in samples])}


def chosen(folder: Path, asked: Sequence[str] | None) -> list[str]:
    """The classes that were asked for, all that are laid out without any.

    Raises:
        UsageError: there is no such class.
    """
    known = sorted(path.stem for path in (folder / "truth").glob("*.npz"))
    for name in asked or ():
        if name not in known:
            raise UsageError(f"--classes: {name!r} is not there; choose from {', '.join(known)}")
    return [name for name in known if not asked or name in asked]


def metrics_of(folder: Path, name: str, classes: Sequence[str]) -> dict[str, ClassResult]:
    """Our evaluation of the maps and image scores that FOLDER/NAME/maps hands over, by class.

    Raises:
        UsageError: a class has no maps, or others than its images.
    """
    found = {}
    for own in classes:
        handed = folder / name / "maps" / f"{own}.npz"
        if not handed.is_file():
            raise UsageError(f"{name}: no maps of {own} in {handed.parent}")
        with np.load(folder / "truth" / f"{own}.npz") as truth, np.load(handed) as said:
            try:
                found[own] = evaluate_maps(truth["labels"], said["scores"], truth["masks"], said["maps"])
            except (KeyError, ValueError) as error:
                raise UsageError(f"{name}: {handed}: {error}") from error
    return found


def step(name: str, what: str, options: argparse.Namespace, *flags: str) -> dict[str, Any]:
    """Train or judge, in a process of its own, what is not done yet, and read what it leaves.

    Returns seconds and epochs by class, and the most memory (MiB).

    Raises:
        UsageError: it failed; what it said stands above.
    """
    folder = Path(options.work_dir)
    keys = ["all"] if name in OURS and what == "train" else options.classes
    paths = {key: folder / name / f"{key}.{what}.json" for key in keys}
    if not all(path.is_file() for path in paths.values()):
        run(name, what, options, *flags)
    took = {key: json.loads(path.read_text(encoding="utf-8")) for key, path in paths.items()}
    return {
        "seconds": {key: one["seconds"] for key, one in took.items()},
        "epochs": {key: one["epochs"] for key, one in took.items() if "epochs" in one},
        "memory": max(one["memory"] for one in took.values()),
    }


def run(name: str, what: str, options: argparse.Namespace, *flags: str) -> None:
    """The step's process. Raises `UsageError` if it fails."""
    python = sys.executable if name in OURS else options.python
    script = Path(__file__).with_name("peers_ours.py" if name in OURS else "peers_anomalib.py")
    words = [what, name, options.work_dir, "--seed", str(options.seed), "--threads", str(options.threads), *flags]
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(options.threads))
    done = subprocess.run([python, str(script), *words], env=os.environ | counts)
    if done.returncode:
        raise UsageError(f"{name}: {script.name} {what} failed with status {done.returncode}")


def row_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All that is said of a model."""
    folder = Path(options.work_dir)
    flags = ["--classes", *options.classes, *([] if name in OURS else their_flags(folder, options))]
    trained, judged = step(name, "train", options, *flags), step(name, "test", options, *flags)
    classes = metrics_of(folder, name, options.classes)
    images = sum(len(np.load(folder / "truth" / f"{own}.npz")["labels"]) for own in options.classes)
    files = [folder / name / f"{key}.pt" for key in trained["seconds"]]
    return {
        "classes": {key: asdict(result) for key, result in classes.items()}, "mean": asdict(mean_results(classes)),
        "models": len(files), "train": trained, "test": judged, "bytes": sum(path.stat().st_size for path in files),
        "images_per_second": images / sum(judged["seconds"].values()),
    }  # fmt: skip


def their_flags(folder: Path, options: argparse.Namespace) -> list[str]:
    """What anomalib's models are told: the budget is what our `cpu` preset took, unless one is given."""
    budget, ours = options.budget, folder / OURS[0] / "all.train.json"
    if budget is None and not ours.is_file():
        raise UsageError(f"--budget: give one, or make the row {OURS[0]!r} first, whose seconds are the default")
    if budget is None:
        budget = json.loads(ours.read_text(encoding="utf-8"))["seconds"]
    others = ["--coreset", str(options.coreset), "--normalization", options.normalization]
    return ["--budget", str(round(budget)), *others]


def cells(name: str, row: Mapping[str, Any]) -> list[str]:
    """A line of the table."""
    result, rate = ClassResult(**row["mean"]), row["images_per_second"]
    memory = f"{row['train']['memory'] / 1024:.1f}, {row['test']['memory'] / 1024:.1f}"
    return [
        name, str(row["models"]), *(percent(getattr(result, metric)) for metric in METRICS), percent(result.mad),
        f"{sum(row['train']['seconds'].values()):.0f}", f"{rate:.1f}", f"{rate / (100 * result.mad):.3f}", memory,
        f"{row['bytes'] / MIB:.0f}",
    ]  # fmt: skip


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown."""
    titles = [
        "model", "models", *(TITLES[metric] for metric in METRICS), "mean", "train s", "images/s", "images/s a point",
        "GiB to train, to judge", "MiB on disk",
    ]  # fmt: skip
    lines = [titles, ["---"] * len(titles), *(cells(name, row) for name, row in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(ours: str, rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where our preset is ahead of each other model, and where not, in points of the means."""
    said = []
    for name in (name for name in rows if name not in OURS):
        ahead = {metric: 100 * (rows[ours]["mean"][metric] - rows[name]["mean"][metric]) for metric in METRICS}
        behind = ", ".join(f"{TITLES[metric]} by {-by:.1f}" for metric, by in ahead.items() if by < 0)
        least = min(ahead.values())
        said.append(
            f"{ours} is behind {name} in {behind}"
            if behind
            else f"{ours} is ahead of {name} in all by {least:.1f} and more"
        )
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--python", help="the interpreter of an environment with anomalib")
    parser.add_argument("--work-dir", default="work_dirs/peers")
    parser.add_argument("--only", nargs="+", choices=[*OURS, *PEERS], default=[OURS[0], *PEERS], metavar="ROW")
    parser.add_argument("--classes", nargs="+", help="those that theirs are trained for, and all judge (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, help="seconds of FastFlow's and CFlow's trainings (default: ours)")
    parser.add_argument("--coreset", type=float, default=0.01, help="share of PatchCore's places that are kept")
    parser.add_argument("--normalization", choices=["imagenet", "extractor"], default="imagenet")
    options = parser.parse_args()
    if options.python is None and set(options.only) - set(OURS):
        parser.error(
            "--python: anomalib's models need an environment of their own, see benchmarks/requirements-peers.txt"
        )
    folder, rows = Path(options.work_dir), {}
    try:
        lay_out(options.data_path, folder)
        options.classes = chosen(folder, options.classes)
        for name in options.only:
            rows[name] = row_of(name, options)
            (folder / name / "row.json").write_text(json.dumps(rows[name], indent=1), encoding="utf-8")
            print("\n" + table({name: rows[name]}), flush=True)
    except UsageError as error:
        parser.error(str(error))
    print("\n".join(["", table(rows), "", *(compared(OURS[0], rows) if OURS[0] in rows else []), NOT_RUN]))


if __name__ == "__main__":
    main()
