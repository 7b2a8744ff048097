"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from default import UsageError
from utils.run.fields import check_fields
from utils.run.upgrade import FORMAT, upgraded
from utils.run.writer import write_whole


class Oversized(ValueError):
    """A file that claims to hold more than it does."""


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
        UsageError: no such file, truncated, not a checkpoint, a pickle with code in it, one that claims more than it
            holds, or one with a field of another type than expected.
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
    check_fields(content, f"{flag}: {path}")
    return upgraded(content)


def load_tensors(path: Path) -> Any:
    """What a PyTorch file holds, without running code in it and without PyTorch's remarks on odd files.

    Raises:
        Oversized: it would take more memory than the file has bytes.
    """
    refuse_inflated(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=True)
        for tensor in tensors_in(content):
            refuse_stretched(tensor)
    return content


def refuse_inflated(path: Path) -> None:
    """Raise `Oversized` if the entries of a zip file, PyTorch's format, are larger than the file.

    PyTorch stores them as they are, so these are compressed, or lie on top of each other.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        claimed, there = sum(entry.file_size for entry in file.infolist()), path.stat().st_size
    if claimed > there:
        raise Oversized(f"it claims to hold {claimed} bytes, but the file has {there}")


def refuse_stretched(tensor: torch.Tensor) -> None:
    """Raise `Oversized` if a tensor has more elements than its storage: a copy would take the memory."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise Oversized("it holds tensors that are not stored element by element")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise Oversized(f"it holds a tensor of shape {tuple(tensor.shape)} that is not stored whole")


def tensors_in(content: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested dictionaries and lists, which may hold each other."""
    waiting, seen = [content], {id(content)}
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield value
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        for part in inner:
            if id(part) not in seen:
                seen.add(id(part))
                waiting.append(part)


def first_broken(state: Mapping[str, Any]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, None if there is none."""
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            return name
    return None


def reason(error: Exception) -> str:
    """Why `load_tensors` failed."""
    if isinstance(error, Oversized):
        return str(error)
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
        return "it holds code or objects, which are not loaded"
    if isinstance(error, pickle.UnpicklingError):
        return "it is not a checkpoint, or holds code or objects, which are not loaded"
    return "it is truncated or not a checkpoint"
