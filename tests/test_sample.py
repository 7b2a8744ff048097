"""The built-in sample: deterministic, disjoint, exact masks."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from datasets import build_datasets, resolve_classes
from datasets.sample import (
    DEFECTS,
    MARKER,
    PER_KIND,
    SOURCES,
    draw_defect,
    generator,
    make_sample,
    random_crop,
    read_source,
)  # fmt: skip
from default import DataConfig, UsageError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / "sample"
    make_sample(folder)
    return folder


def digest(root: Path) -> str:
    files = sorted(p for p in root.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(p.relative_to(root).as_posix().encode() + p.read_bytes() for p in files)).hexdigest()


def test_layout_and_repetition(root: Path, tmp_path: Path) -> None:
    assert len(SOURCES) >= 5
    for name in SOURCES:
        assert {p.name for p in (root / name / "test").iterdir()} == {"good", *DEFECTS}
    make_sample(tmp_path / "again")
    assert digest(root) == digest(tmp_path / "again")
    stamp = (root / "brick" / "train" / "good" / "000.png").stat().st_mtime_ns
    make_sample(root)
    assert stamp == (root / "brick" / "train" / "good" / "000.png").stat().st_mtime_ns


def test_train_and_test_regions_are_disjoint_and_inside() -> None:
    for source in SOURCES.values():
        height, width, _ = read_source(source).shape
        (l1, t1, r1, b1), (l2, t2, r2, b2) = source.train, source.test
        assert r1 <= l2 or r2 <= l1 or b1 <= t2 or b2 <= t1
        assert max(r1, r2) <= width
        assert max(b1, b2) <= height


def test_masks_are_exactly_the_changed_pixels() -> None:
    pictures = {name: read_source(source) for name, source in SOURCES.items()}
    for name, source in SOURCES.items():
        for other in {*SOURCES} - {name}:
            for kind in DEFECTS:
                rng = generator(name, other, kind)
                before = random_crop(pictures[name], source, source.test, rng)
                after = before.copy()
                mask = draw_defect(kind, after, pictures[other], rng)
                np.testing.assert_array_equal(mask, (before != after).any(2))
                assert 0.005 < mask.mean() < 0.1, "clearly visible, but small"


def test_an_image_on_disk_follows_from_its_own_seed(root: Path) -> None:
    source, number = SOURCES["brick"], PER_KIND - 1
    undrawn = random_crop(read_source(source), source, source.test, generator("brick", "stain", number))
    drawn = np.asarray(Image.open(root / "brick" / "test" / "stain" / f"{number:03d}.png"))
    mask = np.asarray(Image.open(root / "brick" / "ground_truth" / "stain" / f"{number:03d}_mask.png"))
    np.testing.assert_array_equal((drawn != undrawn).any(2), mask > 0)


def test_train_and_test_images_are_crops_of_their_own_regions(root: Path) -> None:
    for name in ("grass", "retina"):
        source = SOURCES[name]
        for split, (left, top, right, bottom) in (("train", source.train), ("test", source.test)):
            crop = np.asarray(Image.open(root / name / split / "good" / "000.png"))
            part = read_source(source)[top:bottom, left:right]
            error = cv2.matchTemplate(part, crop, cv2.TM_SQDIFF)
            y, x = np.unravel_index(error.argmin(), error.shape)
            np.testing.assert_array_equal(part[y : y + source.crop, x : x + source.crop], crop)


def test_masks_on_disk_belong_to_defects(root: Path) -> None:
    for path in root.rglob("*_mask.png"):
        values = np.unique(np.asarray(Image.open(path)))
        assert values.tolist() == [0, 255], path


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(UsageError, match="is not the built-in sample"):
        make_sample(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "precious"
    assert not (tmp_path / MARKER).exists()


def test_use_of_the_data_set_makes_it(tmp_path: Path) -> None:
    config = DataConfig(dataset="sample", data_path=str(tmp_path / "deep" / "sample"), input_size=32, limit=2)
    train, test = build_datasets(config, resolve_classes(config))
    assert (len(train), len(test)) == (2 * len(SOURCES), 10 * len(SOURCES))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["sample"], "nothing temporary is left"


def test_an_outdated_sample_is_made_anew(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / MARKER).write_text("0")
    (tmp_path / "leftover.png").write_text("of the old version")
    monkeypatch.chdir(tmp_path)
    make_sample(Path())
    assert digest(tmp_path) == digest(root)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"--data-path: cannot write the sample to .*file.sample: "):
        make_sample(tmp_path / "file" / "sample")
