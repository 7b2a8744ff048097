"""How long it takes until something is there: medians of several starts of the program, in seconds.

python benchmarks/startup.py
python benchmarks/startup.py --repeats 9 --demo       also until the demo's first batch; trains for a moment
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"--help": 0.3, "--preset cpu --dry-run": 0.5}


def whole(words: str) -> float:
    """Until the program has ended."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "main.py", *words.split()], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def median(measure: Callable[[], float], repeats: int) -> float:
    measure()  # fills the system's file cache
    return statistics.median(measure() for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, medians of {args.repeats}\n")
    print("| what | s | goal |\n|---|---|---|")
    for words, goal in GOALS.items():
        print(f"| `main.py {words}` | {median(lambda words=words: whole(words), args.repeats):.2f} | {goal} |")  # type: ignore[misc]


if __name__ == "__main__":
    main()
