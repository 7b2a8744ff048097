"""The ONNX file of a trained model says what the model says."""

from pathlib import Path

import numpy as np
import pytest

from datasets import build_datasets
from default import from_dict
from fake_data import METHOD, TINY, make_mvtec
from main import main
from stage import Stage, load_detector
from test import evaluate
from utils.run.checkpoint import read_checkpoint

runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training on a small extractor; tracing takes as long as the network is deep."""
    place = tmp_path_factory.mktemp("export")
    argv = [*TINY, *METHOD, "--extractor", "test_resnet", "--no-pretrained", "--dataset", "mvtec", "--no-report"]
    argv += ["--data-path", str(make_mvtec(place / "data")), "--class-names", "bottle", "--work-dir", str(place / "w")]
    argv += ["--memory", "4", "--image-score", "surprise", "--pixel-score", "contrast", "--eval-size", "48"]
    assert main(argv) == 0
    return next(p for p in (place / "w").iterdir() if p.name != "cache")


def test_an_exported_model_scores_as_an_evaluation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["--mode", "export", "--eval_ckpt", str(folder)]) == 0
    assert "model.onnx: image (B, 3, 64, 64) -> map, score; off by" in capsys.readouterr().out
    session = runtime.InferenceSession(str(folder / "model.onnx"))
    content = read_checkpoint(folder / "last.pt")
    stage = Stage(from_dict(content["config"]))
    test = build_datasets(stage.config.data, ("bottle",), stage.config.score_size)[1]
    image = np.stack([test[i].image.numpy() for i in range(len(test))])
    maps, scores = session.run(None, {"image": image})
    assert maps.shape == (len(test), 48, 48)
    detector = load_detector(content, stage, "")
    result = evaluate(detector, stage.ordered_features(test).epoch(0), ["bottle"], stage.config.eval)
    expected = [shown.score for shown in result.images]
    np.testing.assert_allclose(scores, expected, rtol=1e-2, atol=2e-3 * np.abs(expected).max())
    np.testing.assert_allclose(session.run(None, {"image": image[2:3]})[1], scores[2:3], rtol=1e-4)


def test_export_wants_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mode", "export"]) == 2
    assert "--eval_ckpt: expected a checkpoint" in capsys.readouterr().err
