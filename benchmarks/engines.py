"""How fast PyTorch, onnxruntime and OpenVINO judge pictures with one trained model, and how far each is from PyTorch.

    python main.py --mode export --eval_ckpt RUN --precision float32 float16 int8
    python benchmarks/engines.py RUN --batch 1 --rounds 9

RUN is a run folder or a checkpoint with exported files beside it. Every engine runs once a round, one after the other,
so that all see the same machine; a figure is the median over the rounds, a ratio the median of each round's ratio to
PyTorch in that round. From pictures of the model's size in memory to scores; nothing is decoded or resized.
OpenVINO takes part where it is installed (pip install openvino).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from default import PRECISIONS, make_config
from engine import Features, Torch
from export import file_of
from stage import Stage, find_checkpoints, load_detector, normalization_of, settled_config
from utils.run.checkpoint import read_checkpoint
from utils.run.precision import Images

Judge = Callable[[Images], NDArray[np.float32]]  # pictures (B, S, S, 3) -> scores (B,)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Something that judges pictures."""

    name: str
    judge: Judge


def pytorch(path: Path) -> tuple[Engine, int]:
    """The program itself, and the size of its images."""
    content = read_checkpoint(path)
    own = settled_config(content, make_config(device="cpu"), {"device": "cpu"}, str(path))
    stage = Stage(own, normalization_of(content))
    program = Torch(Features(stage), load_detector(content, stage, str(path)))

    def judge(images: Images) -> NDArray[np.float32]:
        return np.array([one.score for one in program(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)])

    return Engine(name="PyTorch", judge=judge), own.data.view_size


def onnx_engine(path: Path, precision: str, threads: int) -> Engine:
    """onnxruntime on a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Engine(name=f"onnxruntime {precision}", judge=lambda images: session.run(["score"], {"image": images})[0])


def openvino_engine(path: Path, precision: str, threads: int) -> Engine | None:
    """OpenVINO on a file, None where it is not installed."""
    try:
        import openvino
    except ImportError:
        return None
    made = openvino.Core().compile_model(
        str(path), "CPU", {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    )
    return Engine(name=f"OpenVINO {precision}", judge=lambda images: np.array(made({"image": images})["score"]))


def engines_of(path: Path, threads: int) -> tuple[list[Engine], int]:
    """PyTorch first, then both engines on each exported file that is there; the size of their images."""
    first, size = pytorch(path)
    there = [(file_of(path, precision), precision) for precision in PRECISIONS]
    made = [
        build(file, precision, threads)
        for build in (onnx_engine, openvino_engine)
        for file, precision in there
        if file.is_file()
    ]
    return [first, *(engine for engine in made if engine is not None)], size


def seconds_of(engines: Sequence[Engine], images: Images, rounds: int) -> list[list[float]]:
    """Seconds of each engine in each round, after one that warms up."""
    seconds: list[list[float]] = [[] for _ in engines]
    for number in range(rounds + 1):
        for engine, own in zip(engines, seconds, strict=True):
            begin = time.perf_counter()
            engine.judge(images)
            if number:
                own.append(time.perf_counter() - begin)
    return seconds


def table(engines: Sequence[Engine], images: Images, rounds: int) -> str:
    """A Markdown table."""
    seconds, ours = seconds_of(engines, images, rounds), engines[0].judge(images)
    lines = ["| engine | images/s | times PyTorch | scores off by at most |", "|---|---|---|---|"]
    for engine, own in zip(engines, seconds, strict=True):
        ratio = median(a / b for a, b in zip(seconds[0], own, strict=True))
        off = float(np.abs(engine.judge(images) - ours).max() / np.abs(ours).max())
        lines.append(f"| {engine.name} | {len(images) / median(own):.3g} | {ratio:.2f} | {off:.1g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="a run folder, or a checkpoint, with exported files beside it")
    parser.add_argument("--batch", type=int, default=1, help="pictures at a time (default: 1)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds (default: 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of each engine")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engines, size = engines_of(find_checkpoints(options.run, ("all",))[0], options.threads)
    images = np.random.default_rng(0).integers(0, 256, (options.batch, size, size, 3), dtype=np.uint8)
    print(f"batch {options.batch}, {options.threads} threads, {size} x {size}, medians of {options.rounds} rounds")
    print(table(engines, images, options.rounds))


if __name__ == "__main__":
    main()
