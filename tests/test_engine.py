"""Other engines than PyTorch say what PyTorch says, and are refused where they do not."""

import csv
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import predict
from datasets.transforms import to_picture
from default import UsageError
from detector import load_detector
from engine import Answer, Engine, has_8_bits, pictures, quickest
from fake_data import METHOD, TINY, load_image, make_mvtec, picture, png16
from main import main

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvtec(tmp_path_factory.mktemp("data"), train=16)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two classes that lacks a memory: tracing takes as long as a graph is large."""
    work = tmp_path_factory.mktemp("work")
    argv = [
        *TINY,
        *METHOD,
        "--extractor",
        "test_resnet",
        "--no-pretrained",
        "--dataset",
        "mvtec",
        "--data-path",
        str(data),
    ]
    argv += ["--class-names", "bottle", "grid", "--image-score", "surprise", "--pixel-score", "surprise"]
    assert main([*argv, "--holdout", "0.5", "--false-alarm-rate", "0.2", "--work-dir", str(work), "--no-report"]) == 0
    return next(p for p in work.iterdir() if p.name != "cache")


@pytest.fixture(scope="module")
def file(run: Path) -> Path:
    assert main(["--mode", "export", "--eval_ckpt", str(run), "--false-alarm-rate", "0.4"]) == 0
    return run / "model.onnx"
