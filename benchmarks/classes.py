"""One model for n classes, or a model for each group of n: does what tells classes apart close the gap?

    python benchmarks/classes.py --data-path DATA --sizes 1 3 9 --seeds 1 2 3

DATA holds one folder per class, as in MVTec AD. Groups are n neighbours in the alphabet; a row is the mean over all
classes, whichever model they have: of flow and memory together and of the flow alone, with the codebooks and without
(the paper's claim: quantization lets one model do what one for each class does). Finished runs, those of
`benchmarks/ablation.py` among them, are used again if they lie in --work-dir.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ablation import READINGS, TRAINED, arguments, readings_by_class, row, run_name, seconds_of, trained
from datasets import resolve_classes
from default import UsageError, make_config
from utils.metrics import METRICS, ClassResult, mean_results
from utils.report.tables import TITLES
from utils.run.keeper import LAST

READ = {
    "recipe": READINGS["recipe"],
    "flow alone": READINGS["flow alone: couplings and context, no memory"],
    "couplings alone": READINGS["couplings alone"],
}
WITHOUT = "no codebooks"
Table = dict[str, dict[str, ClassResult]]  # by reading and class


def groups_of(names: Sequence[str], size: int) -> list[Sequence[str]]:
    """Neighbours in the alphabet, `size` of them or what is left."""
    ordered = sorted(names)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def runs(title: str, size: int, names: Sequence[str], seed: int, args: argparse.Namespace) -> Iterator[Path]:
    """Run folders of the models of groups of `size` classes; `title`: with other flags than the preset's."""
    flags, name = (TRAINED[title], run_name(title)) if title else ([], args.preset)
    if size >= len(names):
        yield trained(flags, name, seed, args)
        return
    for number, group in enumerate(groups_of(names, size)):
        yield trained([*flags, "--class-names", *group], f"{name}-{size}-{number}", seed, args)


def together(folders: Sequence[Path], work_dir: str) -> dict[str, dict[str, float]]:
    """Means over the classes of all models, by reading."""
    whole: Table = {title: {} for title in READ}
    for folder in folders:
        for title, classes in readings_by_class(folder / LAST, READ, work_dir).items():
            whole[title] |= classes
    return {title: asdict(mean_results(classes)) for title, classes in whole.items()}


def print_table(args: argparse.Namespace) -> None:
    """Three rows of each size, with codebooks and without."""
    names = resolve_classes(make_config(dataset="folder", data_path=args.data_path).data)
    print(f"| {args.preset} | " + " | ".join(TITLES[m] for m in METRICS) + " | training s |")
    print("|---|" + "---|" * (len(METRICS) + 1), flush=True)
    for size in args.sizes:
        for title in ("", WITHOUT):
            folders = [list(runs(title, size, names, seed, args)) for seed in args.seeds]
            seconds = [sum(map(seconds_of, own)) for own in folders]
            found = [together(own, args.work_dir) for own in folders]
            for reading in READ:
                line = f"{size} a model, {reading}{title and f', {title}'}"
                print(row(line, [f[reading] for f in found], seconds), flush=True)


def main() -> None:
    parser = arguments(__doc__, "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 9], help="classes that share a model")
    args = parser.parse_args()
    try:
        print_table(args)
    except UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
