"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from default import UsageError
from utils.run.upgrade import FORMAT, upgraded
from utils.run.writer import write_whole


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint; a kill or a full disk leaves the old file."""
    write_whole(path, lambda file: save_tensors(content, file))


def save_tensors(content: dict[str, Any], file: BinaryIO) -> None:
    """Write PyTorch's format.

    Raises:
        OSError: the disk's own error, which PyTorch hides behind one about its file's structure.
    """
    try:
        torch.save({"format": FORMAT} | content, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


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


def first_broken(state: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, None if there is none."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            return name
    return None


def reason(error: Exception) -> str:
    """Why `load_tensors` failed."""
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "it holds code or objects, which are not loaded"
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a checkpoint, or holds code or objects, which are not loaded"
    return "it is truncated or not a checkpoint"
