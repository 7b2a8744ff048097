"""How many small faults the tests notice: random mutations of the modules that produce numbers (cosmic-ray).

    python tests/mutation.py --each 12 --jobs 2

Works in copies of this folder and prints one line a survivor. A mutation is killed when a test of the module's own test
files fails or does not end; the seed chooses which mutations are tried.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_item import MutationSpec, TestOutcome

ROOT = Path(__file__).resolve().parents[1]
TESTS = {
    "models/codebook.py": "codebook vqflow", "models/condition.py": "condition flow vqflow",
    "models/conditioned.py": "condition flow vqflow", "models/products.py": "condition flow vqflow",
    "models/norm.py": "norm", "models/flow.py": "flow condition vqflow", "models/fusion.py": "flow vqflow",
    "models/hierarchy.py": "hierarchy vqflow condition", "models/loss.py": "vqflow training",
    "models/prior.py": "flow vqflow", "models/memory.py": "memory memory_low training",
    "models/scorer.py": "scoring memory training", "models/detector.py": "memory training",
    "models/vqflow.py": "vqflow memory training", "models/extractor.py": "extractor",
    "models/official.py": "checkpoint vqflow", "utils/metrics/seven.py": "metrics",
    "utils/metrics/sketch.py": "metrics", "utils/metrics/bootstrap.py": "tables",
    "utils/metrics/concepts.py": "memory", "utils/run/schedule.py": "scoring", "steps.py": "speed training",
    "datasets/transforms.py": "datasets seen", "datasets/folder.py": "datasets walk",
    "datasets/walk.py": "walk datasets", "models/decision.py": "decision", "models/first_look.py": "memory",
    "datasets/pixels.py": "seen reading", "datasets/decode.py": "seen reading", "datasets/reading.py": "reading seen",
    "datasets/masks.py": "masks", "datasets/checks.py": "masks reading", "datasets/cache.py": "cache",
    "datasets/features.py": "cache", "datasets/loaders.py": "datasets cache", "datasets/visa.py": "datasets walk",
    "datasets/__init__.py": "datasets memory walk",
}  # fmt: skip
LIMIT = 300  # seconds for a module's tests
EQUIVALENT = ("BitOr", "RemoveDecorator")  # unions in annotations, which nothing reads; decorators of dataclasses


def mutations(each: int, seed: int, modules: list[str]) -> list[MutationSpec]:
    """`each` random mutations of every module."""
    chosen: list[MutationSpec] = []
    for module in modules:
        every = (m for item in _all_work_items([Path(module)], {}) for m in item.mutations)
        lines = Path(module).read_text(encoding="utf-8").splitlines()
        found = [m for m in every if not is_equivalent(m, lines)]
        chosen += random.Random(f"{seed} {module}").sample(found, min(each, len(found)))
    return chosen


def is_equivalent(mutation: MutationSpec, lines: list[str]) -> bool:
    """Whether no test can notice: what nothing reads, the star of a signature, and how a dataclass is guarded."""
    line, column = mutation.start_pos
    text = lines[line - 1]
    return (
        text[column : column + 2] == "*,"
        or text.startswith("@dataclass")
        or any(word in mutation.operator_name for word in EQUIVALENT)
    )


def tried(mutation: MutationSpec) -> tuple[MutationSpec, bool, str]:
    """Whether the tests notice a mutation, in a copy of the project of this process's own."""
    copy = Path(tempfile.gettempdir()) / f"mutation-{os.getppid()}-{os.getpid()}" / ROOT.name
    if not copy.is_dir():
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv*", "work_dirs", "data", "__pycache__"))
        if (shared := ROOT.parent / "shared").is_dir():
            (copy.parent / "shared").symlink_to(shared)
    os.chdir(copy)
    os.environ["OMP_NUM_THREADS"] = "1"
    names = [f"tests/test_{name}.py" for name in TESTS[mutation.module_path.as_posix()].split()]
    command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider {' '.join(n for n in names if Path(n).is_file())}"
    result = mutate_and_test([mutation], command, LIMIT)
    return mutation, result.test_outcome != TestOutcome.SURVIVED, result.diff or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--each", type=int, default=10, help="mutations of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--modules", nargs="+", default=list(TESTS), choices=list(TESTS), metavar="FILE")
    args = parser.parse_args()
    os.chdir(ROOT)
    specs = mutations(args.each, args.seed, [m for m in args.modules if Path(m).is_file()])
    counts: dict[str, list[int]] = {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for mutation, killed, diff in pool.map(tried, specs):
            module = mutation.module_path.as_posix()
            counts.setdefault(module, [0, 0])[killed] += 1
            if not killed:
                changed = [row for row in diff.splitlines() if row[:1] in "+-" and row[:3] not in ("+++", "---")]
                print(f"survived: {module}:{mutation.start_pos[0]}", *changed, sep="\n    ", flush=True)
    for module, (survived, killed) in counts.items():
        print(f"{module}: {killed} of {killed + survived} killed")
    total = [sum(row[i] for row in counts.values()) for i in (0, 1)]
    print(f"{total[1]} of {sum(total)} mutations killed (seed {args.seed})")
    for folder in Path(tempfile.gettempdir()).glob(f"mutation-{os.getpid()}-*"):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
