"""Images of several shapes from training to the exported file, and their metrics at their own sizes."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_datasets
from default import from_dict
from fake_data import METHOD, TINY, make_mvtec, picture, save
from main import main
from stage import Stage, image_readings, load_detector
from test import evaluate
from utils.metrics import evaluate_maps
from utils.run.checkpoint import read_checkpoint

SIZES = [(96, 64), (64, 130), (70, 70), (200, 50)]  # width, height
SMALL = [*TINY, *METHOD, "--extractor", "test_resnet", "--no-pretrained", "--dataset", "folder", "--no-report"]


def cut(size: tuple[int, int], rng: np.random.Generator, defect: bool) -> tuple[np.ndarray, np.ndarray]:
    """A picture of some size with a defect in its middle, and its mask."""
    image = picture(rng, size=max(size))[0][: size[1], : size[0]].copy()
    mask = np.zeros(image.shape[:2], bool)
    if defect:
        mask[size[1] // 2 - 8 : size[1] // 2 + 8, size[0] // 2 - 8 : size[0] // 2 + 8] = True
        image[mask] = 255
    return image, mask


def make(root: Path) -> Path:
    """Two classes: images of several sizes, and one with a single image to train on."""
    rng = np.random.default_rng(0)
    for name, count in (("many", 5), ("one", 1)):
        for i in range(count):
            save(root / name / "train/good" / f"{i}.png", cut(SIZES[i % 4], rng, False)[0])
        for i, size in enumerate(SIZES):
            save(root / name / "test/good" / f"{i}.png", cut(size, rng, False)[0])
            image, mask = cut(size, rng, True)
            save(root / name / "test/bad" / f"{i}.png", image)
            save(root / name / "ground_truth/bad" / f"{i}.png", (mask * 255).astype(np.uint8), "L")
    return root


@pytest.fixture(scope="module", params=["pad", "crop"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with --resize and --center-crop, evaluated at the images' own sizes."""
    place = tmp_path_factory.mktemp(request.param)
    words = ["--data-path", str(make(place / "data")), "--work-dir", str(place / "work"), "--image-score", "surprise"]
    words += ["--resize", request.param, "--center-crop", "56", "--eval-size", "native", "--pixel-score", "surprise"]
    assert main([*SMALL, *words, "--batch-size", "16", "--false-alarm-rate", "0.3"]) == 0
    return next(p for p in (place / "work").iterdir() if p.name != "cache")


def test_the_results_say_how_images_were_made_square(run: Path) -> None:
    notes = (run / "results.md").read_text(encoding="utf-8")
    assert "maps and masks at each image's own size" in notes
    assert f"images (--resize {run.parents[1].name[:-1]}): " in notes
    assert "of which the middle 56 x 56 counts" in notes


def test_native_metrics_are_those_of_all_pixels_that_are_seen(run: Path) -> None:
    content = read_checkpoint(run / "last.pt")
    config = from_dict(content["config"])
    stage = Stage(config)
    readings = image_readings(content, content["classes"])
    test = build_datasets(config.data, tuple(content["classes"]), config.score_size, readings)[1]
    detector = load_detector(content, stage, "")
    batches = stage.ordered_features(test)
    found = evaluate(detector, batches.epoch(0), content["classes"], config.eval, test=test)
    pixels: dict[str, tuple[list, list]] = {name: ([], []) for name in content["classes"]}
    for number, item in enumerate(test.items):
        maps = detector.judge(stage.extract(test[number].image[None])).maps.surprise[0]
        place = test.place(number)
        marks = np.zeros(place.size[::-1], bool)
        if item.mask_path:
            marks = np.asarray(Image.open(item.mask_path)) > 0
        rows, columns = place.seen(place.size)
        kept = pixels[content["classes"][item.class_index]]
        kept[0].append(marks[rows, columns].ravel())
        kept[1].append(place.drawn(maps.numpy())[rows, columns].ravel())
    for name, (masks, maps) in pixels.items():
        flat = np.concatenate(masks)[None, None], np.concatenate(maps)[None, None]
        expected = evaluate_maps([1], [0.0], *flat)
        assert found.classes[name].pixel_auroc == pytest.approx(expected.pixel_auroc, abs=1e-4)
        assert found.classes[name].pixel_ap == pytest.approx(expected.pixel_ap, abs=1e-3)
        assert 0 < found.classes[name].aupro <= 1


def test_predictions_have_the_images_own_sizes(run: Path, tmp_path: Path) -> None:
    images = sorted((run.parents[1] / "data/many/test").rglob("*.png"))
    words = ["--output", str(tmp_path / "out"), "--device", "cpu", "--save-maps", "npy", *map(str, images)]
    assert main(["--mode", "predict", "--eval_ckpt", str(run), *words]) == 0
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, path in zip(rows, sorted((tmp_path / "out" / "maps").iterdir()), strict=True):
        values = np.load(path)
        with Image.open(row["path"]) as image:
            assert values.shape == image.size[::-1]
        assert values[int(row["peak_y"]), int(row["peak_x"])] == values.max()


def test_a_checkpoint_keeps_its_shape(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = run.parents[1] / "data"
    words = ["--mode", "test", "--eval_ckpt", str(run), "--data-path", str(data), "--resize", "squash"]
    assert main([*words, "--work-dir", str(run.parent), "--device", "cpu"]) == 2
    assert "--resize: " in capsys.readouterr().err
    assert torch.load(run / "last.pt", weights_only=True)["config"]["data"]["center_crop"] == 56


def test_one_image_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that can be known of a data set of a single picture: another one is stranger than itself."""
    data = make_mvtec(tmp_path / "data", ("bottle",))
    (only,) = (data / "bottle/train/good").glob("000.png")
    (tmp_path / "one").mkdir()
    only.rename(tmp_path / "one" / only.name)
    words = ["--preset", "cpu", *TINY, "--dataset", "folder", "--data-path", str(tmp_path / "one"), "--no-report"]
    assert main([*words, "--work-dir", str(tmp_path / "runs"), "--name", "run"]) == 0
    assert "--memory: left out, as there is a single training image" in capsys.readouterr().out
    (run,) = (tmp_path / "runs").glob("run*")
    bad = next((data / "bottle/test").glob("scratch/*.png"))
    asked = ["--mode", "predict", "--eval_ckpt", str(run), "--device", "cpu", "--output", str(tmp_path / "said")]
    assert main([*asked, str(tmp_path / "one"), str(bad)]) == 0
    with (tmp_path / "said" / "scores.csv").open(encoding="utf-8") as file:
        own, other = (float(row["score"]) for row in csv.DictReader(file))
    assert own < other
