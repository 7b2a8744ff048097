"""The built-in sample: deterministic, disjoint, exact masks."""

import hashlib
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import are_unseen, build_datasets, resolve_classes, split_holdout
from datasets.sample import (
    CALIBRATION,
    DEFECTS,
    MARKER,
    PER_KIND,
    SOURCES,
    TEST_GOOD,
    TRAIN,
    draw_defect,
    generator,
    make_sample,
    random_crop,
    random_place,
    read_source,
    region_of,
)
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
        roles = {role: len([*(root / name / role).rglob("*.png")]) for role in ("train", "calibration", "test")}
        assert roles == {"train": 48, "calibration": 24, "test": 12 + 5 * len(DEFECTS)}
        assert {p.name for p in (root / name / "test").iterdir()} == {"good", *DEFECTS}
    make_sample(tmp_path / "again")
    assert digest(root) == digest(tmp_path / "again")
    stamp = (root / "brick" / "train" / "good" / "000.png").stat().st_mtime_ns
    make_sample(root)
    assert stamp == (root / "brick" / "train" / "good" / "000.png").stat().st_mtime_ns


def crops(name: str) -> dict[str, list[tuple[int, int]]]:
    """Left and top of all crops of a class, by role."""
    source = SOURCES[name]
    test = [("good", n) for n in range(TEST_GOOD)] + [(kind, n) for kind in DEFECTS for n in range(PER_KIND)]
    keys = {
        "train": [("train", n) for n in range(TRAIN)], "test": test,
        "calibration": [("calibration", n) for n in range(CALIBRATION)],
    }  # fmt: skip
    return {
        role: [random_place(source, region_of(source, role, key[1]), generator(name, *key)) for key in found]
        for role, found in keys.items()
    }


def cut(name: str, place: tuple[int, int]) -> np.ndarray:
    (x, y), side = place, SOURCES[name].crop
    return read_source(SOURCES[name])[y : y + side, x : x + side]


@pytest.mark.parametrize("name", SOURCES)
def test_no_crop_overlaps_one_of_another_role(root: Path, name: str) -> None:
    source, places = SOURCES[name], crops(name)
    for role in places:
        for number in (0, 11):
            path = root / name / role / "good" / f"{number:03d}.png"
            np.testing.assert_array_equal(np.asarray(Image.open(path)), cut(name, places[role][number]))
    for first, second in combinations(places, 2):
        for a, b in product(places[first], places[second]):
            apart = max(abs(a[0] - b[0]), abs(a[1] - b[1])) - source.crop
            assert apart >= 8, f"{first} and {second}: pixels between crops"
    height, width, _ = read_source(source).shape
    for _, _, right, bottom in (source.train, *source.calibration, source.test):
        assert right <= width and bottom <= height
    deciding = {region_of(source, "calibration", n) for n in range(1, CALIBRATION, 2)}
    assert deciding == set(source.calibration), "from both sides"


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
    normal, test = build_datasets(config, resolve_classes(config))
    assert (len(normal), len(test)) == (4 * len(SOURCES), 10 * len(SOURCES))
    for share in (0.0, 0.05):
        kept, held_out = split_holdout(normal, share)
        assert {item.path.parts[-3] for item in kept.items} == {"train"} and len(kept) == 2 * len(SOURCES)
        assert {item.path.parts[-3] for item in held_out.items} == {"calibration"} and are_unseen(kept, held_out)
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
