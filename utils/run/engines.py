"""Other engines than PyTorch: onnxruntime and OpenVINO on an ONNX file whose input is `image`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from default import UsageError
from utils.run.log import optional
from utils.run.precision import Images

EXTRAS = {"onnxruntime": "export", "openvino": "openvino"}  # of each engine
Run = Callable[[Images], Mapping[str, NDArray]]  # pictures (B, S, S, 3) -> what the file gives, by names


def pictures(image: Tensor) -> Images:
    """Images (B, 3, S, S) in [0, 1] as a graph takes them, (B, S, S, 3) in 8 bits."""
    return (image * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def has_8_bits(image: Tensor) -> bool:
    """Whether 8 bits per channel lose nothing of images in [0, 1]."""
    level = image * 255
    return bool((level - level.round()).abs().max() < 1e-3)


def runtime_session(file: Path | bytes, device: str) -> Any:
    """onnxruntime's session of a file or its content, on "cpu", "cuda" or "cuda:N", or, "auto", on a GPU if it can.

    Raises:
        UsageError: it is not installed, cannot compute there, or the file is none.
    """
    runtime = optional("onnxruntime", "--eval_ckpt: for an ONNX file", EXTRAS["onnxruntime"])
    kind, _, number = device.partition(":")
    there = "CUDAExecutionProvider" in runtime.get_available_providers()
    if kind == "mps" or (kind == "cuda" and not there):
        raise UsageError(f"--device: onnxruntime, as it is installed here, computes on cpu, not on {device}")
    places: list[Any] = [("CUDAExecutionProvider", {"device_id": int(number or 0)})] if there and kind != "cpu" else []
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        source = file if isinstance(file, bytes) else str(file)
        return runtime.InferenceSession(source, options, providers=[*places, "CPUExecutionProvider"])
    except Exception as error:  # of an extension: it has no class of its own for files that are none
        name = file if isinstance(file, Path) else "the graph"
        raise UsageError(f"--eval_ckpt: cannot read {name} as an ONNX file") from error


def runtime_run(session: Any) -> Run:
    names = [output.name for output in session.get_outputs()]
    return lambda images: dict(zip(names, session.run(names, {"image": images}), strict=True))


def openvino_run(file: Path | bytes) -> Run:
    """OpenVINO on a file or its content, on the CPU, in float32 throughout.

    Raises:
        UsageError: it is not installed, or cannot compute the file.
    """
    openvino = optional("openvino", "--engine openvino", EXTRAS["openvino"])
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    try:
        made = core.compile_model(core.read_model(file if isinstance(file, bytes) else str(file)), "CPU", settings)
    except RuntimeError as error:
        name = file if isinstance(file, Path) else "the graph"
        raise UsageError(f"--engine openvino: cannot compute {name}") from error
    return lambda images: {out.get_any_name(): np.array(value) for out, value in made({"image": images}).items()}
