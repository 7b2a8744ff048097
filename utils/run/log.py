"""What a run writes while it trains: metrics.jsonl, and TensorBoard or Weights & Biases where asked."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from default import UsageError
from utils.run.text import printable
from utils.run.writer import append_line, write_whole


def optional(package: str, flag: str, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{flag}: the package {package.removeprefix('torch.utils.')} is not installed; pip install -e '.[{extra}]'"
        ) from error


def plain(value: Any) -> Any:
    """JSON's values: NaN and infinities as null, at any depth."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl; none if there is no such file. A line that is none, as a killed program or a
    damaged disk leaves them, is passed over with a warning."""
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], start=1):
        entry = entry_of(line)
        if entry is not None:
            entries.append(entry)
        elif line.strip():
            print(printable(f"warning: {path}: line {number} is damaged and left out"), file=sys.stderr)
    return entries


def entry_of(line: bytes) -> dict[str, Any] | None:
    """What a line of metrics.jsonl holds, None if that is no meta epoch."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and type(entry.get("epoch")) is int else None


class RunLog:
    """Appends one entry per meta epoch to metrics.jsonl and to the optional loggers.

    Args:
        folder: the run folder.
        kept: a resumed run keeps the entries of its first `kept` meta epochs.
        config: nested plain values, shown by Weights & Biases.
    """

    def __init__(self, folder: Path, *, kept: int, config: dict[str, Any], tensorboard: bool, wandb: bool) -> None:
        self.path = folder / "metrics.jsonl"
        old = [entry for entry in read_lines(self.path) if entry["epoch"] <= kept]
        write_whole(self.path, "".join(json.dumps(e) + "\n" for e in old).encode())
        self._board = self._wandb = None
        if tensorboard:
            module = optional("torch.utils.tensorboard", "--tensorboard", "tensorboard")
            self._board = module.SummaryWriter(str(folder / "tensorboard"), purge_step=kept)
        if wandb:
            self._wandb = optional("wandb", "--wandb-enable", "wandb")
            self._wandb.init(project="vqflow", name=folder.name, dir=str(folder), config=config)

    def write(self, entry: dict[str, Any]) -> None:
        """Append `entry`; its "epoch" is the step of the loggers, nested names are joined with a slash."""
        entry = plain(entry)
        append_line(self.path, json.dumps(entry))
        numbers = {k: v for k, v in flat(entry).items() if isinstance(v, (int, float))}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, entry["epoch"])
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=entry["epoch"])

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, names joined with a slash."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
    return result
