"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from default import UsageError

FORMAT = "vqflow-1"


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write to a temporary file beside `path`, then move it there, so that a kill leaves the old file."""
    temporary = path.with_name(path.name + ".part")
    torch.save({"format": FORMAT} | content, temporary)
    temporary.replace(path)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The dictionary in a checkpoint file, loaded with weights_only.

    Raises:
        UsageError: no such file, truncated, not a checkpoint, or a pickle with code in it.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--eval_ckpt: no such file: {path}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = (
            "it holds code or objects, which are not loaded" if "nsupported" in str(error) else "it is not a checkpoint"
        )
        raise UsageError(f"--eval_ckpt: cannot read {path}: {reason}") from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError) as error:
        raise UsageError(f"--eval_ckpt: cannot read {path}: it is truncated or not a checkpoint") from error
    if not isinstance(content, dict):
        raise UsageError(f"--eval_ckpt: {path} is not a checkpoint: it holds a {type(content).__name__}")
    return content
