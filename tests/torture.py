"""Kills trainings at bad moments, mistypes commands and damages files, and counts what does not come through.

    python tests/torture.py                     # about ten minutes on two cores: make torture
    python tests/torture.py --kills 6 --commands 200 --files 8

A killed training is resumed until it is done; all that it leaves must equal, bit for bit, what an unbroken one leaves.
A third of the kills are random in time, a third lie inside writes of files (this program counts the calls that write,
and dies in the middle of one), and a third are SIGTERM. No command and no file may end in a traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[variable] = "1"  # in another order sums differ in their last bits

import torch  # noqa: E402

import train  # noqa: E402, F401  here once, for all the processes that are forked
from fake_data import METHOD, TINY, make_mvtec  # noqa: E402
from main import main  # noqa: E402
from mistakes import BUG, damaged, mistyped, quietly  # noqa: E402
from utils.run.checkpoint import read_checkpoint  # noqa: E402
from utils.run.keeper import BEST, LAST, PREVIOUS  # noqa: E402
from utils.run.log import read_lines  # noqa: E402

FLAGS = [
    *TINY, *METHOD, "--dataset", "mvtec", "--class-names", "bottle", "grid", "--meta-epochs", "3", "--sub-epochs", "2",
    "--noise", "0.3", "--memory", "3", "--image-score", "surprise", "--holdout", "0.2", "--reassign-quantize",
    "--save-every", "2", "--no-report",
]  # fmt: skip
CALLS = ("write", "fsync", "replace", "replaced", "unlink")  # where a process dies; `replaced`: right after


class Process:
    """A forked `main.py`, its output in a file."""

    def __init__(self, argv: Sequence[str], output: Path, prepare: Callable[[], Any] = lambda: None) -> None:
        self.output, self.began = output, time.perf_counter()
        self.pid = os.fork()
        if not self.pid:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            status = BUG
            try:
                done = prepare()
                status = main(argv)
                if done is not None:
                    done()
            finally:
                sys.stdout.flush()
                os._exit(status)

    def wait(self, kill_after: float | None = None, number: int = signal.SIGKILL) -> int:
        """The status, or minus the signal that ended it."""
        while kill_after is not None and time.perf_counter() - self.began < kill_after:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        if kill_after is not None:
            os.kill(self.pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


# --- dying inside of a write


class Writes:
    """Counts the calls by which files are written, and dies at one of them, in the middle of it."""

    def __init__(self, kind: str = "", number: int = 0) -> None:
        self.kind, self.number, self.counts = kind, number, dict.fromkeys(CALLS, 0)

    def reached(self, kind: str) -> bool:
        self.counts[kind] += 1
        return (kind, self.counts[kind]) == (self.kind, self.number)

    def install(self) -> None:
        """In the process that is to die."""
        fsync, replace, unlink, opened = os.fsync, os.replace, os.unlink, Path.open

        def dying_fsync(handle: int) -> None:
            die_if(self.reached("fsync"))
            fsync(handle)

        def dying_replace(source: Any, target: Any) -> None:
            die_if(self.reached("replace"))
            replace(source, target)
            die_if(self.reached("replaced"))

        def dying_unlink(path: Any, **options: Any) -> None:
            unlink(path, **options)
            die_if(self.reached("unlink"))

        def watched_open(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
            file = opened(path, mode, *args, **options)
            return HalfWriter(file, self) if mode in ("wb", "ab") else file

        os.fsync, os.replace, os.unlink, Path.open = dying_fsync, dying_replace, dying_unlink, watched_open  # type: ignore


class HalfWriter:
    """A file that may die with half of what it was to write."""

    def __init__(self, file: Any, writes: Writes) -> None:
        self.file, self.writes = file, writes

    def write(self, data: Any) -> int:
        if self.writes.reached("write"):
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            die_if(True)
        return self.file.write(data)

    def __enter__(self) -> HalfWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def die_if(true: bool) -> None:
    if true:
        os.kill(os.getpid(), signal.SIGKILL)


# --- kills


class Trainings:
    """An unbroken training, how long it takes and how often it writes, and others that are killed.

    Args:
        place: a folder for all of them.
    """

    def __init__(self, place: Path, rng: random.Random) -> None:
        self.place, self.rng, self.made = place, rng, 0
        self.argv = [*FLAGS, "--data-path", str(make_mvtec(place / "data", train=8)), "--work-dir"]
        counts = place / "counts.json"

        def counting() -> Callable[[], object]:
            writes = Writes()
            writes.install()
            return lambda: counts.write_text(json.dumps(writes.counts))

        began = time.perf_counter()
        process = Process([*self.argv, str(place / "unbroken")], place / "unbroken.txt", counting)
        assert process.wait() == 0, process.output.read_text()
        self.seconds = time.perf_counter() - began
        self.counts: dict[str, int] = json.loads(counts.read_text())
        self.unbroken = finished(place / "unbroken")

    def killed(self, kinds: Sequence[str]) -> tuple[dict[str, int], list[str]]:
        """Train, dying once in each of these ways (`time`, `write` or `term`) and resuming: how often it really died
        in each, and what is not as it should be."""
        self.made += 1
        work, died = self.place / f"killed-{self.made}", dict.fromkeys(("time", "write", "term"), 0)
        for number, kind in enumerate([*kinds, "none"]):
            argv = [*self.argv, str(work), *(["--resume"] if number else [])]
            status, output = self._dying(argv, kind, work.with_suffix(f".{number}.txt"))
            if status in (-signal.SIGKILL, -signal.SIGTERM, 143):
                died[kind] += 1
            expected = {"time": (-signal.SIGKILL, 0), "write": (-signal.SIGKILL, 0), "term": (143, -signal.SIGTERM, 0)}
            if status not in expected.get(kind, (0,)) or "Traceback" in output:
                return died, [f"{kind}: status {status}\n{output}"]
            if status == 0:
                break
        wrong = differences(finished(work), self.unbroken)
        shutil.rmtree(work)
        return died, wrong

    def _dying(self, argv: Sequence[str], kind: str, output: Path) -> tuple[int, str]:
        moment = None
        prepare: Callable[[], Any] = lambda: None  # noqa: E731
        if kind == "write":
            call = self.rng.choice(CALLS)
            prepare = Writes(call, self.rng.randint(1, max(self.counts[call], 1))).install
        elif kind != "none":
            moment = self.rng.uniform(0, 0.9 * self.seconds)
        status = Process(argv, output, prepare).wait(moment, signal.SIGTERM if kind == "term" else signal.SIGKILL)
        return status, output.read_text(errors="replace")


def finished(work: Path) -> Path:
    """The run folder in a work folder that has results."""
    return next(path.parent for path in sorted(work.glob("*/results.json")))


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested values."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def differences(folder: Path, unbroken: Path) -> list[str]:
    """What differs between two run folders, but for times and settings."""
    wrong = []
    for name in (LAST, PREVIOUS, BEST):
        if not (folder / name).is_file():
            wrong.append(f"{folder}: no {name}")
            continue
        first, second = (read_checkpoint(f / name) for f in (folder, unbroken))
        wrong += [f"{folder / name}: {k}" for k in second if k != "config" and not same(first.get(k), second[k])]
    logs = [read_lines(f / "metrics.jsonl") for f in (folder, unbroken)]
    for entry in (e for log in logs for e in log):
        del entry["train"]["seconds"]
    tables = [
        json.loads((f / "results.json").read_text(encoding="utf-8")) | {"config": None} for f in (folder, unbroken)
    ]
    rows = [(f / "scores.csv").read_bytes() for f in (folder, unbroken)]
    for name, (first, second) in {"metrics.jsonl": logs, "results.json": tables, "scores.csv": rows}.items():
        wrong += [f"{folder}: {name}"] if first != second else []
    left = [p.name for p in folder.iterdir() if p.name == "unfinished.pt"]
    return wrong + [f"{folder}: {name} is left" for name in left]


# --- all together


def with_damage(trainings: Trainings, name: str, number: int, rng: random.Random) -> tuple[int, str]:
    """What the program makes of a finished run one file of which is damaged."""
    work = trainings.place / f"damaged-{name}-{number}"
    folder = work / trainings.unbroken.name
    shutil.copytree(trainings.unbroken, folder)
    (folder / name).write_bytes(damaged((folder / name).read_bytes(), rng))
    if name == "results.json":
        found = quietly(["--mode", "table", str(folder), "--work-dir", str(work)])
    else:
        output = work / "output.txt"
        status = Process([*trainings.argv, str(work), "--resume"], output).wait()
        found = status, output.read_text(errors="replace")
    shutil.rmtree(work)
    return found


def torture(kills: int, commands: int, files: int, seed: int, place: Path) -> dict[str, Any]:
    """The figures; `wrong` says what did not come through."""
    rng, wrong = random.Random(seed), []
    found = {"kills": 0, "time": 0, "write": 0, "term": 0, "trainings": 0, "equal": 0}
    trainings = Trainings(place, rng)
    print(f"an unbroken training takes {trainings.seconds:.1f} s and writes by {trainings.counts}", flush=True)
    while found["kills"] < kills:
        kinds = rng.sample(["time", "write", "term"], 3)
        died, problems = trainings.killed(kinds)
        for kind, count in died.items():
            found[kind] += count
            found["kills"] += count
        found["trainings"] += 1
        found["equal"] += not problems
        wrong += problems
        print(f"{found['kills']} kills, {found['equal']} of {found['trainings']} trainings equal", flush=True)
    statuses: dict[int, int] = {}
    for _ in range(commands):
        argv = mistyped(rng)
        status, text = quietly(argv)
        statuses[status] = statuses.get(status, 0) + 1
        wrong += [f"{argv}\n{text}"] if status not in (0, 2) or "Traceback" in text else []
    damages: dict[str, dict[int, int]] = {}
    for name in ("config.json", "metrics.jsonl", LAST, "results.json"):
        for number in range(files // 4):
            status, text = with_damage(trainings, name, number, rng)
            own = damages.setdefault(name, {})
            own[status] = own.get(status, 0) + 1
            wrong += [f"{name}: status {status}\n{text}"] if status not in (0, 2) or "Traceback" in text else []
    return found | {"commands by status": statuses, "files by status": damages, "wrong": wrong}


def main_torture(argv: Sequence[str] | None = None) -> int:
    """Print the figures, and what went wrong; the status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("kills", 66), ("commands", 4000), ("files", 160), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        found = torture(options.kills, options.commands, options.files, options.seed, Path(place))
    wrong = found.pop("wrong")
    for problem in wrong:
        print(f"WRONG: {problem}\n")
    print(json.dumps(found | {"wrong": len(wrong)}))
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main_torture())
