"""What each part of the best recipe is worth on your images: every part on or off, several seeds, seven metrics.

    python benchmarks/ablation.py --data-path DATA --seeds 1 2 3
    python benchmarks/ablation.py --data-path DATA --seeds 1 --only recipe "memory alone"

DATA holds one folder per class, as in MVTec AD. Rows of the first kind read the same trained models in another way;
rows of the second kind are trained with other flags. Finished runs under --work-dir are used again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets import build_datasets
from default import Config, UsageError
from main import parse
from models.detector import Detector
from models.scorer import ScoreMaps, ScoreRule, image_scores
from models.vqflow import VQFlowOutput
from stage import Stage, image_readings, load_detector, normalization_of, settled_config
from test import by_class
from train import run_training
from utils.metrics import METRICS, ClassAccumulator, ClassResult, mean_results
from utils.report.tables import TITLES
from utils.run.checkpoint import read_checkpoint
from utils.run.folders import resumed_run
from utils.run.keeper import LAST

FLOWS = (0, 1, 2)
CONTEXT = (3, 4, 5, 6)
MEMORY = tuple(range(7, 7 + len(ScoreRule().views)))
ALL = (*FLOWS, *CONTEXT, *MEMORY)


@dataclass(frozen=True)
class Reading:
    """Which opinions a score is made of, and which maps image, pixel and AUPRO scores are."""

    opinions: Sequence[int] = ()
    maps: tuple[str, str, str] = ("surprise", "contrast", "contrast")
    top_k: float = 0.001

    def read(self, output: VQFlowOutput, opinions: Sequence[Tensor], detector: Detector) -> tuple[Tensor, ...]:
        """Image scores (B,), pixel map and AUPRO map (B, S, S), from the chosen ones of the detector's opinions."""
        share = sum(detector.scorer.weights[i] for i in self.opinions)
        chosen = [opinions[i] / share for i in self.opinions]
        maps = ScoreMaps(output.latents, detector.size, output.local_log_det, lambda: chosen, detector.scorer.rule)
        image, pixel, pro = (getattr(maps, name) for name in self.maps)
        return image_scores(image, self.top_k), pixel, pro


READINGS = {
    "recipe": Reading(ALL),
    "image score: top 3 % instead of 0.1 %": Reading(ALL, top_k=0.03),
    "pixel scores: surprise instead of contrast": Reading(ALL, maps=("surprise",) * 3),
    "flow alone: couplings and context, no memory": Reading((*FLOWS, *CONTEXT)),
    "couplings alone": Reading(FLOWS),
    "context alone": Reading(CONTEXT),
    "memory alone": Reading(MEMORY),
    "without the couplings": Reading((*CONTEXT, *MEMORY)),
    "without the context": Reading((*FLOWS, *MEMORY)),
    "without the context's top level": Reading((*FLOWS, *CONTEXT[:-1], *MEMORY)),
    "without the memory's finest view": Reading((*FLOWS, *CONTEXT, *MEMORY[1:])),
    "without the memory's middle view": Reading((*FLOWS, *CONTEXT, MEMORY[0], *MEMORY[2:])),
    "without the memory's coarsest view": Reading((*FLOWS, *CONTEXT, *MEMORY[:-1])),
    "flow's likelihood, log-determinant included": Reading(maps=("likelihood",) * 3),
    "published scores (mul, add, mul, top 3 %)": Reading(maps=("mul", "add", "mul"), top_k=0.03),
}
PUBLISHED = ["--image-score", "mul", "--pixel-score", "add", "--pro-score", "mul", "--top-k", "0.03"]
TRAINED = {
    "features pooled for the flow": ["--pool-type", "avg"],
    "no noise, no weight decay": ["--noise", "0", "--weight-decay", "0"],
    "one meta epoch": ["--meta-epochs", "1"],
    "learning rate 1e-4": ["--lr", "1e-4"],
    "learned concepts, no context": ["--semantics", "learned", "--context", "0"],
    "released codebooks, no context": ["--codebooks", "released", "--semantics", "learned", "--context", "0"],
    "context at distance 1": ["--context", "1"],
    "context at distance 3": ["--context", "3"],
    "no codebooks": ["--no-quantize-enable", "--no-mixed-gaussian"],
    "no patterns (CSPC), concepts alone": ["--no-pattern-quantize"],
    "no mixed Gaussian": ["--no-mixed-gaussian"],
    "no position encoding": ["--no-concat-pos"],
    "released recipe, 8 sub epochs": [
        "--objective", "released", "--codebooks", "released", "--no-standardize", "--noise", "0", "--weight-decay", "0",
        "--schedule", "constant", "--warmup", "0.125", "--lr", "1e-4", "--meta-epochs", "4", "--eval-interval", "4",
        "--pool-type", "avg", "--memory", "0", "--holdout", "0", "--context", "0", "--semantics", "learned",
        *PUBLISHED,
    ],
}  # fmt: skip


def run_name(title: str) -> str:
    """Of a row that is trained with other flags."""
    return "".join(c if c.isalnum() else "-" for c in title)


def trained(flags: list[str], name: str, seed: int, args: argparse.Namespace) -> Path:
    """The run folder of a variant, trained unless a whole run of the same settings is there.

    Raises:
        UsageError: a run of that name has other settings.
    """
    words = [
        "--preset", args.preset, "--dataset", "folder", "--data-path", args.data_path, "--seed", str(seed),
        "--name", name, "--work-dir", args.work_dir, "--no-report", "--pictures", "0", "--resume", *flags, *args.flags,
    ]  # fmt: skip
    config = parse(words)[0]
    folder = resumed_run(config)
    if folder is None or not (folder / "results.json").is_file():
        with redirect_stdout(sys.stderr):  # our table is all that stands on stdout
            folder = run_training(config)
    return folder


def seconds_of(folder: Path) -> float:
    """Seconds of all training steps (of the last sub epoch, times their number)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return sum(json.loads(line)["train"]["seconds"] for line in lines) * config["train"]["sub_epochs"]


def figures_of(folder: Path) -> dict[str, float]:
    """What the run itself measured."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found["mean"]


def readings_of(folder: Path, chosen: dict[str, Reading], work_dir: str) -> dict[str, dict[str, float]]:
    """Means over the classes of all readings of a trained model."""
    found = readings_by_class(folder / LAST, chosen, work_dir)
    return {title: asdict(mean_results(classes)) for title, classes in found.items()}


@torch.no_grad()
def readings_by_class(path: Path, chosen: dict[str, Reading], work_dir: str) -> dict[str, dict[str, ClassResult]]:
    """All readings of a checkpoint in one pass over the test images, by title and class."""
    content = read_checkpoint(path)
    config: Config = settled_config(content, Config(), {"work_dir": work_dir, "cache": "disk"}, str(path))
    stage = Stage(config, normalization_of(content))
    detector = load_detector(content, stage, str(path))
    names = config.data.class_names
    with redirect_stdout(sys.stderr):
        test_set = build_datasets(config.data, names, config.score_size, image_readings(content, names))[1]
    found = {title: [ClassAccumulator() for _ in names] for title in chosen}
    for batch in stage.ordered_features(test_set).epoch(0):
        judgement = detector.judge(batch.features)
        opinions = judgement.maps.opinions()
        for title, reading in chosen.items():
            scores, pixel, pro = reading.read(judgement.output, opinions, detector)
            for index, own in by_class(batch.class_index):
                found[title][index].update(
                    labels=batch.label[own], scores=scores[own], masks=batch.mask[own], maps=pixel[own],
                    pro_maps=pro[own],
                )  # fmt: skip
    return {title: dict(zip(names, (a.compute() for a in rows), strict=True)) for title, rows in found.items()}


def row(title: str, found: list[dict[str, float]], seconds: list[float]) -> str:
    """A line of the table: mean and standard deviation over the seeds, in per cent."""
    cells = []
    for metric in METRICS:
        values = [100 * f[metric] for f in found]
        cells.append(f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else ""))
    return f"| {title} | {' | '.join(cells)} | {mean(seconds):.0f} |"


def print_table(args: argparse.Namespace) -> None:
    """One row after the other, as they are ready."""
    wanted = args.only or [*READINGS, *TRAINED]
    print(f"| {args.preset} | " + " | ".join(TITLES[m] for m in METRICS) + " | training s |")
    print("|---|" + "---|" * (len(METRICS) + 1), flush=True)
    readings = {title: reading for title, reading in READINGS.items() if title in wanted}
    if readings:
        folders = [trained([], args.preset, seed, args) for seed in args.seeds]
        found = [readings_of(folder, readings, args.work_dir) for folder in folders]
        for title in readings:
            print(row(title, [f[title] for f in found], [seconds_of(f) for f in folders]), flush=True)
    for title, flags in TRAINED.items():
        if title in wanted:
            folders = [trained(flags, run_name(title), seed, args) for seed in args.seeds]
            print(row(title, [figures_of(f) for f in folders], [seconds_of(f) for f in folders]), flush=True)


def arguments(doc: str | None, preset: str) -> argparse.ArgumentParser:
    """What this and `benchmarks/classes.py` are told, by docstring and default preset."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--preset", default=preset)
    parser.add_argument("--work-dir", default=f"work_dirs/ablation-{preset}")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further flags of main.py, come last")
    return parser


def main() -> None:
    parser = arguments(__doc__, "accurate")
    parser.add_argument("--only", nargs="+", choices=[*READINGS, *TRAINED], metavar="ROW", help="default: all rows")
    args = parser.parse_args()
    try:
        print_table(args)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
