"""Large images in tiles: every pixel once, no seams, and a small defect found."""

import json
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import build_datasets
from datasets.geometry import Geometry, Stitch
from default import DataConfig, UsageError, from_dict
from detector import load_detector as load_image_detector
from export import describe, whole
from fake_data import METHOD, TINY, save
from main import main
from stage import Stage, image_readings, load_detector
from test import evaluate
from utils.metrics import evaluate_maps
from utils.run.checkpoint import read_checkpoint

SIZES = [(300, 200), (90, 70), (128, 300)]  # width, height
SPOT = 12


@pytest.mark.parametrize("size", [(1000, 700), (64, 64), (65, 64), (10, 300), (129, 127)])
@pytest.mark.parametrize("overlap", [0, 8, 50])
def test_tiles_cover_an_image(size: tuple[int, int], overlap: int) -> None:
    boxes = Geometry(input_size=32, tile=64, overlap=overlap).tiles(size)
    covered = np.zeros(size[::-1], int)
    for left, top, right, bottom in boxes:
        assert (right - left, bottom - top) == (min(64, size[0]), min(64, size[1]))
        covered[top:bottom, left:right] += 1
    assert covered.min() == 1 or overlap
    assert covered.min() >= 1
    columns = sorted({box[0] for box in boxes})
    assert all(after - before <= 64 - overlap for before, after in pairwise(columns))
    assert len(columns) == max(-(-(size[0] - overlap) // (64 - overlap)), 1)


def test_tiles_are_stitched_without_seams() -> None:
    """A ramp over the image, of which each tile says its part; what tiles say otherwise may not show as a step."""
    geometry, size = Geometry(input_size=64, tile=64, overlap=32), (200, 150)
    exact, noisy = Stitch(size, 32), Stitch(size, 32)
    plane = np.add.outer(np.arange(150) * 2.0, np.arange(200) * 1.0)
    for number, (left, top, right, bottom) in enumerate(geometry.tiles(size)):
        exact.add(plane[top:bottom, left:right], (left, top, right, bottom))
        noisy.add(np.full((8, 8), number % 2), (left, top, right, bottom))
    np.testing.assert_allclose(exact.map, plane, atol=1e-3)
    steps = max(np.abs(np.diff(noisy.map, axis=axis)).max() for axis in (0, 1))
    assert steps < 2 / 32, "two tiles pass into each other over the overlap"
    small = Stitch((200, 150), 32, (50, 50))
    for left, top, right, bottom in geometry.tiles(size):
        small.add(np.ones((8, 8)), (left, top, right, bottom))
    np.testing.assert_allclose(small.map, np.ones((50, 50)), atol=1e-6)


def test_memory_does_not_grow_with_the_number_of_tiles() -> None:
    peaks = []
    for overlap, count in ((0, 16**2), (56, 121**2)):
        boxes = Geometry(input_size=64, tile=64, overlap=overlap).tiles((1024, 1024))
        assert len(boxes) == count
        tracemalloc.start()
        whole, says = Stitch((1024, 1024), overlap), np.ones((8, 8), np.float32)
        for box in boxes:
            whole.add(says, box)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 1.05 * min(peaks) < 10 * 2**20, "two maps of four bytes a pixel, and a tile"


def make(root: Path) -> Path:
    """A fine texture in several sizes, some smaller than a tile; a class with a single image."""
    rng = np.random.default_rng(0)

    def image(size: tuple[int, int], place: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        wave = np.sin(np.arange(size[1]) / 5)[:, None] + np.cos(np.arange(size[0]) / 4)
        made = (110 + 30 * wave[..., None] * [1, 0.8, 0.6] + rng.normal(0, 4, (*size[::-1], 3))).clip(0, 255)
        mask = np.zeros(size[::-1], np.uint8)
        if place:
            mask[place[1] : place[1] + SPOT, place[0] : place[0] + SPOT] = 255
            made[mask > 0] = 255
        return made.astype(np.uint8), mask

    for name, count in (("many", 9), ("one", 1)):
        for i in range(count):
            save(root / name / "train/good" / f"{i}.png", image(SIZES[i % 3])[0])
        for i, size in enumerate(SIZES):
            save(root / name / "test/good" / f"{i}.png", image(size)[0])
            made, mask = image(size, (size[0] * 3 // 5, size[1] * 2 // 5))
            save(root / name / "test/bad" / f"{i}.png", made)
            save(root / name / "ground_truth/bad" / f"{i}.png", mask, "L")
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tiles")
    words = [*TINY, *METHOD, "--extractor", "test_resnet", "--no-pretrained", "--dataset", "folder", "--no-report"]
    words += ["--data-path", str(make(place / "data")), "--tile", "96", "--overlap", "32", "--memory", "50"]
    words += ["--work-dir", str(place / "work"), "--pictures", "1", "--holdout", "0.4", "--top-k", "0.01"]
    words += ["--image-score", "surprise", "--pixel-score", "surprise", "--pro-score", "surprise"]
    assert main([*words, "--false-alarm-rate", "0.3"]) == 0
    return next(p for p in (place / "work").iterdir() if p.name != "cache")


def test_training_looks_at_tiles_and_decides_on_images(run: Path) -> None:
    content = read_checkpoint(run / "last.pt")
    config = from_dict(content["config"])
    train = build_datasets(config.data, tuple(content["classes"]))[0]
    boxes = train.geometry.tiles((300, 200))
    assert len(boxes) == 5 * 3
    tiles = train.tiled
    first = [n for n, item in enumerate(tiles.items) if item.path == train.items[0].path]
    with Image.open(train.items[0].path) as image:
        for n, box in zip(first, boxes, strict=True):
            expected = np.asarray(image.crop(box).resize((64, 64), Image.Resampling.LANCZOS))
            np.testing.assert_array_equal((tiles[n].image * 255).round().permute(1, 2, 0).numpy(), expected)
    assert len(content["decision"]["scores"]) < len(train.items), "one score an image, not one a tile"


def test_metrics_are_of_the_stitched_maps_and_predictions_the_same(run: Path) -> None:
    content = read_checkpoint(run / "last.pt")
    config, names = from_dict(content["config"]), tuple(content["classes"])
    stage = Stage(config)
    test = build_datasets(config.data, names, config.score_size, image_readings(content, names))[1]
    found = evaluate(
        load_detector(content, stage, ""), stage.ordered_features(test).epoch(0), names, config.eval, test=test
    )
    batches = [len(batch.label) for batch in stage.test_features(test).epoch(0)]
    assert max(batches) == config.train.batch_size and sum(batches) == len(test.tiled), "15 tiles in 4 batches"
    judge = load_image_detector(run, device="cpu")
    masks: list[np.ndarray] = []
    maps: list[np.ndarray] = []
    for item, image in zip(test.items, found.images, strict=True):
        said = judge(item.path)
        with Image.open(item.path) as opened:
            assert said.map.shape == opened.size[::-1]
        assert said.score == pytest.approx(image.score, rel=0.02, abs=0.02)
        assert said.threshold == pytest.approx(image.threshold)
        mask = np.zeros(said.map.shape, bool)
        if item.mask_path:
            mask = np.asarray(Image.open(item.mask_path)) > 0
            y, x = np.nonzero(mask)
            assert abs(said.peak.x - x.mean()) < 2 * SPOT
            assert abs(said.peak.y - y.mean()) < 2 * SPOT
        if names[item.class_index] == "many":
            masks.append(mask.ravel())
            maps.append(said.map.ravel())
    expected = evaluate_maps([1], [0.0], np.concatenate(masks)[None, None], np.concatenate(maps)[None, None])
    assert found.classes["many"].pixel_auroc == pytest.approx(expected.pixel_auroc, abs=2e-3)
    assert found.classes["many"].image_auroc == 1.0
    notes = (run / "results.md").read_text(encoding="utf-8")
    assert "tiles of 96 pixels that share 32, each resized to 64" in notes
    assert "maps and masks at each image's own size" in notes


def test_tiles_at_another_size(run: Path, tmp_path: Path) -> None:
    words = ["--mode", "test", "--eval_ckpt", str(run), "--eval-size", "100", "--work-dir", str(tmp_path)]
    assert main([*words, "--device", "cpu"]) == 0
    folder = next(p for p in tmp_path.iterdir() if p.name != "cache")
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert content["mean"]["image_auroc"] == json.loads((run / "results.json").read_text())["mean"]["image_auroc"]
    assert content["mean"]["pixel_auroc"] > 0.9
    assert "maps and masks at 100 x 100" in (folder / "results.md").read_text(encoding="utf-8")


def test_an_exported_file_says_how_it_wants_tiles(run: Path) -> None:
    """What is done with that, `test_export.py` compares."""
    onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
    content = read_checkpoint(run / "last.pt")
    config = from_dict(content["config"])
    traced = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    facts = describe(config, content, whole(content, config, ""), traced)
    assert (facts["tile"], facts["overlap"], facts["input_size"], facts["map_size"]) == (96, 32, 64, 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tile": 64, "overlap": 64}, "--overlap: expected less than --tile, which is 64, but got 64"),
        ({"tile": 64, "resize": "pad"}, "--resize pad: --tile cuts squares out of an image"),
        ({"tile": 64, "center_crop": 32}, "--center-crop: --tile cuts squares out of an image"),
    ],
)
def test_what_tiles_cannot_be(options: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        DataConfig(**options)
