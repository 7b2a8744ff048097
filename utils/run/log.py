"""What a run writes while it trains: metrics.jsonl, and TensorBoard or Weights & Biases where asked."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

from default import UsageError


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


def read_lines(path: Path, count: int | None = None) -> list[dict[str, Any]]:
    """The entries of a metrics.jsonl, or its first `count`; none if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines[:count] if line]


class RunLog:
    """Appends one entry per meta epoch to metrics.jsonl and to the optional loggers.

    Args:
        folder: the run folder.
        kept: a resumed run keeps its first `kept` entries.
        config: nested plain values, shown by Weights & Biases.
    """

    def __init__(self, folder: Path, *, kept: int, config: dict[str, Any], tensorboard: bool, wandb: bool) -> None:
        self.path = folder / "metrics.jsonl"
        old = read_lines(self.path, kept)  # a killed run may have left half a line behind them
        self.path.write_text("".join(json.dumps(e) + "\n" for e in old), encoding="utf-8")
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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
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
