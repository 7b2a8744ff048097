"""Our presets on images that `benchmarks/peers.py` has laid out, which also calls this: one model for all classes.

    python benchmarks/peers_ours.py train cpu FOLDER --seed 1
    python benchmarks/peers_ours.py test cpu FOLDER

A row is a preset, or one with further flags (`VARIANTS`).

The twin of `peers_anomalib.py`: the same steps, and the same files come out. A run without test images is trained on
FOLDER/train, so that its seconds are of training alone: features, flow, memory, units and thresholds.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from default import PRESETS, Config, make_config
from main import parse
from models.detector import Detector
from models.scorer import image_scores
from stage import Stage, find_checkpoints, load_detector, normalization_of, settled_config
from train import run_training
from utils.run.checkpoint import read_checkpoint

BATCH = 16
VARIANTS = {"cpu-bfloat16": ["--preset", "cpu", "--amp-enable"]}
Took = tuple[str, dict[str, Any]]  # a class (of a training: all), and what a step took for it


def train(name: str, folder: Path, options: argparse.Namespace) -> Iterator[Took]:
    """FOLDER/NAME/run, and the checkpoint without what only training needs as FOLDER/NAME/all.pt."""
    begin = time.process_time()
    words = [
        *VARIANTS.get(name, ["--preset", name]), "--dataset", "folder", "--data-path", str(folder / "train"),
        "--seed", str(options.seed), "--work-dir", str(folder / name / "run"), "--device", "cpu", "--no-report",
        "--pictures", "0", *options.flags,
    ]  # fmt: skip
    config = parse(words)[0]
    run = run_training(config)
    seconds = time.process_time() - begin
    content = read_checkpoint(find_checkpoints(run, ("all",))[0])
    judging = {key: value for key, value in content.items() if key not in ("optimizer", "random")}
    torch.save(judging, folder / name / "all.pt")
    epochs = config.train.meta_epochs * config.train.sub_epochs
    yield "all", {"seconds": seconds, "epochs": epochs, "torch": torch.__version__}


def pictures(folder: Path, side: int) -> tuple[NDArray[np.uint8], int]:
    """All PNG files of a folder at the size that a model takes, (N, side, side, 3), and their own side."""
    found = [Image.open(path) for path in sorted(folder.glob("*.png"))]
    seen = (image.resize((side, side), Image.Resampling.LANCZOS) for image in found)  # as it is, if it has that size
    return np.stack([np.asarray(image) for image in seen]), found[0].width


def judge(name: str, folder: Path, options: argparse.Namespace) -> Iterator[Took]:
    """Maps and scores of test images, class by class; seconds from pixels in memory to both."""
    path = folder / name / "all.pt"
    content = read_checkpoint(path)
    config = settled_config(content, make_config(device="cpu"), {"device": "cpu"}, str(path))
    stage = Stage(config, normalization_of(content))
    detector = load_detector(content, stage, str(path)).eval()
    classes = sorted(path.name for path in (folder / "test").iterdir() if path.is_dir())
    for own in (own for own in classes if not options.classes or own in options.classes):
        if not record(folder / name, own, "test").is_file():
            pixels, detector.size = pictures(folder / "test" / own, config.data.input_size)
            maps, scores, seconds = judged(stage, detector, config, pixels)
            np.savez(folder / name / "maps" / f"{own}.npz", maps=maps, scores=scores)
            yield own, {"seconds": seconds}


def record(folder: Path, key: str, step: str) -> Path:
    """Where it stands what a step took, of a class or of all."""
    return folder / f"{key}.{step}.json"


def judged(
    stage: Stage, detector: Detector, config: Config, pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Pixel maps (N, S, S), image scores (N,) and processor seconds of pictures (N, S, S, 3)."""

    def answer(part: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255
        maps = detector.judge(stage.extract(image)).maps
        return getattr(maps, config.eval.pixel_score), image_scores(
            getattr(maps, config.eval.image_score), config.eval.top_k
        )

    answer(pixels[:1])  # what is made on first use
    begin = time.process_time()
    answers = [answer(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
    seconds = time.process_time() - begin
    maps, scores = (torch.cat(parts).numpy() for parts in zip(*answers, strict=True))
    return maps, scores, seconds


def most_memory() -> float:
    """The most memory that this process has had, in MiB."""
    return int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[0]) / 1024


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=["train", "test"], help="train a model, or judge the test images")
    parser.add_argument("name", choices=[*PRESETS, *VARIANTS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", nargs="+", default=[], help="to judge (default: all)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of main.py, come last")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    (options.folder / options.name / "maps").mkdir(parents=True, exist_ok=True)
    for key, took in (train if options.step == "train" else judge)(options.name, options.folder, options):
        path = record(options.folder / options.name, key, options.step)
        path.write_text(json.dumps(took | {"memory": most_memory()}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
