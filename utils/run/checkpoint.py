"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from default import UsageError
from utils.run.upgrade import FORMAT, upgraded


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary file beside `path`, then move it there, so that a kill leaves the old file."""
    temporary = path.with_name(path.name + ".part")
    torch.save({"format": FORMAT} | content, temporary)
    temporary.replace(path)


def read_checkpoint(path: str | Path, flag: str = "--eval_ckpt") -> dict[str, Any]:
    """The dictionary in a checkpoint file that `flag` asked for, loaded with weights_only, in today's form.

    Raises:
        UsageError: no such file, truncated, not a checkpoint, or a pickle with code in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{flag}: no such file: {path}")
    try:
        content = load_tensors(path)
    except PermissionError as error:
        raise UsageError(f"{flag}: cannot read {path}: {error.strerror}") from error
    except Exception as error:  # damaged files raise anything: struct.error, IndexError, AssertionError, ...
        raise UsageError(f"{flag}: cannot read {path}: {reason(error)}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{flag}: {path} is not a checkpoint: it holds a {type(content).__name__}")
    return upgraded(content)


def load_tensors(path: Path) -> Any:
    """What a PyTorch file holds, without running code in it and without PyTorch's remarks on odd files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def reason(error: Exception) -> str:
    """Why `load_tensors` failed."""
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "it holds code or objects, which are not loaded"
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a checkpoint, or holds code or objects, which are not loaded"
    return "it is truncated or not a checkpoint"
