"""Other engines than PyTorch say what PyTorch says, and are refused where they do not."""

import csv
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import predict
from datasets.transforms import to_picture
from default import UsageError
from detector import ImageDetector, load_detector
from engine import Answer, Engine, quickest
from fake_data import TINY, load_image, make_mvtec, picture
from main import main
from utils.run.checkpoint import read_checkpoint, write_checkpoint
from utils.run.engines import has_8_bits, pictures

pytest.importorskip("onnx", reason="the extra 'export' is not installed")
pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two classes without a memory: tracing takes as long as a graph is large."""
    work, data = tmp_path_factory.mktemp("work"), make_mvtec(tmp_path_factory.mktemp("data"), train=16)
    argv = [*TINY, "--multi-class", "--quantize-enable", "--no-pattern-quantize", "--extractor", "test_resnet"]
    argv += ["--no-pretrained", "--dataset", "mvtec", "--data-path", str(data), "--class-names", "bottle", "grid"]
    argv += ["--image-score", "surprise"]
    assert main([*argv, "--holdout", "0.5", "--false-alarm-rate", "0.2", "--work-dir", str(work), "--no-report"]) == 0
    return next(p for p in work.iterdir() if p.name != "cache")


@pytest.fixture(scope="module")
def quick(run: Path) -> ImageDetector:
    """The run in onnxruntime; its graph is there afterwards."""
    return load_detector(run, device="cpu", engine="onnxruntime")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good and defective ones."""
    place, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(3)
    for i in range(8):
        Image.fromarray(picture(rng, defect=bool(i % 2))[0]).save(place / f"{i}.png")
    return place


def test_onnxruntime_agrees_with_pytorch(run: Path, quick: ImageDetector, images: Path) -> None:
    original, paths = load_detector(run, device="cpu"), sorted(images.iterdir())
    assert (original.engine, quick.engine) == ("torch", "onnxruntime")
    verdicts = []
    for found, expected in zip(quick(paths), original(paths), strict=True):
        off = 1e-3 * np.abs(expected.map).max()
        np.testing.assert_allclose(found.map, expected.map, atol=off)
        assert (found.threshold, found.pixel_threshold) == (expected.threshold, expected.pixel_threshold)
        assert found.concept == expected.concept
        if abs(expected.score - expected.threshold) > off:
            verdicts.append(expected.defective)
            assert (found.defective, found.p_value) == (expected.defective, expected.p_value)
    assert set(verdicts) == {True, False}
    assert quick.rules() == original.rules()


def test_a_graph_is_made_once_for_a_checkpoint(run: Path, quick: ImageDetector, tmp_path: Path) -> None:
    (place,) = run.glob("last.graph-*.onnx")
    before = place.stat().st_mtime_ns
    again = load_detector(run / "last.pt", device="cpu", engine="onnxruntime", false_alarm_rate=0.4)
    assert again.engine == "onnxruntime", "thresholds are the checkpoint's: another rate needs no other graph"
    assert place.stat().st_mtime_ns == before
    graph = load_detector(run, device="cpu").graph
    assert graph is not None
    assert (graph.place, graph.ready) == (place, True)
    assert load_detector(run, device="cpu", top_k=0.5, engine="torch").graph.place != place
    write_checkpoint(tmp_path / "last.pt", read_checkpoint(run / "last.pt") | {"epoch": 9})
    assert load_detector(tmp_path, device="cpu").graph.place.name != place.name
    assert not list(tmp_path.glob("*.onnx"))


def test_deeper_images_are_left_to_pytorch(quick: ImageDetector, run: Path) -> None:
    values = picture(np.random.default_rng(1))[0] / 255 * 0.99
    assert quick(values).score == load_detector(run, device="cpu")(values).score


def test_few_images_are_not_worth_a_trial(
    run: Path, quick: ImageDetector, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    words = ["--mode", "predict", "--eval_ckpt", str(run), "--device", "cpu", "--no-overlays", str(images)]
    assert main([*words, "--output", str(tmp_path / "few")]) == 0
    assert "computed by torch" in capsys.readouterr().out
    monkeypatch.setattr(predict, "SOME_IMAGES", 8)
    assert main([*words, "--output", str(tmp_path / "some")]) == 0
    said = capsys.readouterr().out
    assert "engine: " in said
    assert "(images/s of those that are installed: torch " in said
    assert "onnxruntime " in said
    assert main([*words, "--output", str(tmp_path / "asked"), "--engine", "torch"]) == 0
    assert "engine: " not in capsys.readouterr().out
    tables = [(tmp_path / name / "scores.csv").open(encoding="utf-8") for name in ("few", "some", "asked")]
    few, some, asked = ([float(row["score"]) for row in csv.DictReader(table)] for table in tables)
    assert few == asked == pytest.approx(some, rel=1e-3)


class Slow:
    """Says nothing for a while, then `value` of every place."""

    rule, deep = None, True

    def __init__(self, name: str, value: float, seconds: float) -> None:
        self.name, self.value, self.seconds = name, value, seconds

    def __call__(self, image: Tensor) -> list[Answer]:
        time.sleep(self.seconds)
        return [Answer(map=np.full((2, 2), self.value, np.float32), score=self.value) for _ in image]


def test_the_quickest_that_agrees() -> None:
    engines: list[Engine] = [Slow("torch", 3.0, 0.03), Slow("quick", 3.001, 0.01), Slow("wrong", 3.1, 0.0)]
    best, told = quickest(engines, torch.zeros(2, 3, 4, 4))
    assert best.name == "quick"
    assert told.startswith("engine: quick (images/s")
    assert "wrong" not in told
    assert quickest(engines[::2], torch.zeros(2, 3, 4, 4))[0].name == "torch"


def test_engines_are_for_the_cpu_and_must_be_there(run: Path, quick: ImageDetector) -> None:
    try:
        import openvino  # noqa: F401
    except ImportError:
        with pytest.raises(UsageError, match=r"--engine openvino: the package openvino is not installed; pip install"):
            load_detector(run, device="cpu", engine="openvino")
    else:
        assert load_detector(run, device="cpu", engine="openvino").engine == "openvino"


def test_a_picture_of_8_bits_is_itself(images: Path) -> None:
    image = load_image(images / "0.png", 64)[None]
    assert has_8_bits(image)
    np.testing.assert_array_equal(pictures(image)[0], to_picture(image[0]))
    np.testing.assert_array_equal(pictures(image)[0], np.asarray(Image.open(images / "0.png")))
    assert not has_8_bits(image * 0.9987)
