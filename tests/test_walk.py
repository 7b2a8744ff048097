"""Folders: which are good, how deep they are walked, what is read, what is left out, and what is said of it."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import build_datasets, present_classes, split_holdout
from datasets.cache import cache_key
from datasets.folder import ImageFolder
from datasets.loaders import ordered_loader
from datasets.walk import image_files, suffixes
from default import DataConfig, UsageError
from fake_data import make_mvtec, make_visa_original, picture, save
from utils.run.text import printable

COLOURED = picture(np.random.default_rng(0))[0]


def load(root: Path, *names: str, **options: object) -> tuple[ImageFolder, ImageFolder]:
    data = DataConfig(dataset="folder", data_path=str(root), input_size=32, **options)  # type: ignore[arg-type]
    return build_datasets(data, names or ("bottle",))


@pytest.mark.parametrize("name", ["Good", "OK", "ok", "Normal", "pass", "Defect-Free", "defect free"])
def test_names_of_good_folders(tmp_path: Path, name: str) -> None:
    root = make_mvtec(tmp_path, ("bottle",))
    for part in ("train", "test"):
        (root / "bottle" / part / "good").rename(root / "bottle" / part / name)
    train, test = load(root)
    assert len(train) == 6
    assert [item.label for item in test.items].count(0) == 3
    assert {item.kind for item in test.items if not item.label} == {name}


def test_other_names_of_good_folders(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path, ("bottle",))
    for part in ("train", "test"):
        (root / "bottle" / part / "good").rename(root / "bottle" / part / "Gut")
    with pytest.raises(UsageError, match=r"lacks images in train/good; train holds Gut, and --good-names says what"):
        load(root)
    train, test = load(root, good_names=("gut", "prima"))
    assert (len(train), sum(item.label for item in test.items)) == (6, 6)
    with pytest.raises(UsageError, match=r"lacks images in train/prima"):
        load(root, good_names=("prima",))


def test_nested_folders_are_walked(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path, ("bottle",))
    before = [(sample.label, sample.mask.sum()) for sample in load(root)[1]]
    moves = {"train/good": "cam1", "test/good": "cam1/day", "test/broken": "cam1", "test/scratch": "cam1"}
    for place, inner in moves.items():
        folder = root / "bottle" / place
        folder.rename(root / "away")
        (folder / inner).parent.mkdir(parents=True)
        (root / "away").rename(folder / inner)
    truth = root / "bottle" / "ground_truth" / "scratch"
    truth.rename(root / "away")
    truth.mkdir()
    (root / "away").rename(truth / "cam1")  # ground_truth/broken stays flat
    train, test = load(root)
    assert len(train) == 6
    assert [(sample.label, sample.mask.sum()) for sample in test] == before
    assert {i.name for i in test.items if i.kind == "scratch"} == {"cam1/000", "cam1/001", "cam1/002"}
    (root / "bottle" / "test" / "broken" / "cam2").mkdir()
    save(root / "bottle" / "test" / "broken" / "cam2" / "000.png", COLOURED)
    with pytest.raises(UsageError, match=r"broken.000_mask\.png: is the mask of two images, .*cam1.*cam2"):
        load(root)


@pytest.mark.parametrize("place", ["calibration/good", "validation/OK", "validation/good/cam1"])
def test_images_that_are_kept_out_of_training(tmp_path: Path, place: str, capsys: pytest.CaptureFixture) -> None:
    root = make_mvtec(tmp_path, ("bottle",))
    for name in ("000.png", "001.png"):
        save(root / "bottle" / place / name, COLOURED)
    save(root / "bottle" / place.split("/")[0] / "broken" / "000.png", COLOURED)
    normal, test = load(root)
    assert [item.held_out for item in normal.items] == [False] * 6 + [True] * 2
    assert not any(item.held_out for item in test.items)
    kept, held_out = split_holdout(normal, 0.5)
    assert (len(kept), len(held_out)) == (6, 2)
    line = "bottle: train 6, calibration 2, good 3, defective 6, masks 6, ignored 2 ("
    assert line in capsys.readouterr().out
    assert [len(part) for part in split_holdout(load(root, limit=1)[0], 0)] == [1, 1]


def test_links_are_followed_once(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path / "data", ("bottle",))
    good = root / "bottle" / "train" / "good"
    (root / "bottle" / "train" / "bad").mkdir()
    save(root / "bottle" / "train" / "bad" / "000.png", COLOURED)
    save(tmp_path / "elsewhere" / "900.png", COLOURED)
    links = {"self": good, "up": good.parent, "more": tmp_path / "elsewhere", "again": tmp_path / "elsewhere"}
    try:
        for name, target in links.items():
            (good / name).symlink_to(target, target_is_directory=True)
        (good / "circle").symlink_to(good / "circle")
    except OSError:
        pytest.skip("this system makes no links")
    assert [p.name for p in image_files(good)] == [*(f"{i:03d}.png" for i in range(6)), "900.png"]


def test_every_picture_that_pillow_opens_is_read(tmp_path: Path) -> None:
    assert {".png", ".jpg", ".pgm", ".ppm", ".gif", ".jp2", ".tga", ".jfif", ".webp", ".bmp", ".tif"} <= suffixes()
    assert not {".pdf", ".eps", ".mpg", ".h5", ".wmf", ".txt", ""} & suffixes()
    root = make_mvtec(tmp_path, ("bottle",))
    good = root / "bottle" / "train" / "good"
    for suffix in ("pgm", "gif", "tga", "PPM", "jp2"):
        Image.fromarray(COLOURED).convert("L" if suffix == "pgm" else "RGB").save(good / f"new.{suffix}")
    train, _ = load(root)
    assert len(train) == 11
    assert {train[n].image.shape for n in range(11)} == {(3, 32, 32)}


def test_what_is_there_is_said_before_anything_is_computed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_mvtec(tmp_path, ("bottle", "grid"))
    bottle = root / "bottle"
    (root / "grid" / "license.txt").unlink()
    for name in ("train/good/a.csv", "train/good/b.CSV", "test/c.txt", "test/README", "train/good/Thumbs.db", ".x.png"):
        (bottle / name).write_text("")
    save(bottle / "train" / "bad" / "000.png", COLOURED)
    save(bottle / "ground_truth" / "broken" / "009_mask.png", COLOURED)
    load(root, "bottle", "grid")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "bottle: train 6, good 3, defective 6, masks 6, ignored 7 (.csv 2, .txt 2, ground_truth/broken 1, no suffix 1, "
        "train/bad 1)",
        "grid: train 6, good 3, defective 6, masks 6, ignored 0",
    ]
    assert err == ""
    visa = make_visa_original(tmp_path / "visa", ("candle",))
    (visa / "candle" / "image_anno.csv").write_text("")
    data = DataConfig(dataset="visa", data_path=str(visa), input_size=32)
    build_datasets(data, ("candle",))
    assert "candle: train 6, good 3, defective 3, masks 3, ignored 1 (.csv)" in capsys.readouterr().out


@pytest.mark.parametrize(("kinds", "lost"), [(("good",), "good"), (("broken", "scratch"), "defective")])
def test_a_class_without_good_or_defective_images_is_said_loudly(
    tmp_path: Path, capsys: pytest.CaptureFixture, kinds: tuple[str, ...], lost: str
) -> None:
    root = make_mvtec(tmp_path, ("bottle",))
    for kind in kinds:
        (root / "bottle" / "test" / kind).rename(root / kind)
    load(root)
    err = capsys.readouterr().err
    assert err.startswith(f"warning: bottle has no {lost} test images: ")
    assert err.count("\n") == 1


def test_a_tree_may_hold_some_of_a_models_classes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = DataConfig(data_path=str(make_mvtec(tmp_path, ("bottle", "grid"))))
    assert present_classes(data, ("grid", "bottle")) == ("grid", "bottle")
    assert capsys.readouterr().out == ""
    assert present_classes(data, ("grid", "tile", "wood")) == ("grid",)
    assert "holds 1 of the model's 3 classes: grid" in capsys.readouterr().out
    assert present_classes(data, ("tile",)) == ()


# --- names that are not UTF-8


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A tree whose class and files have bytes in their names that are not UTF-8."""
    root = make_mvtec(tmp_path, ("bottle",))
    if sys.platform in ("win32", "darwin"):
        pytest.skip("this system's file names are always text")
    for place, name in (
        (b"train/good", b"000.png"),
        (b"test/broken", b"000.png"),
        (b"ground_truth/broken", b"000_mask.png"),
    ):
        old = os.fsencode(root / "bottle") + b"/" + place + b"/"
        Path(os.fsdecode(old + name)).rename(os.fsdecode(old + b"\xc2\xdd" + name))
    (root / "bottle").rename(root / os.fsdecode(b"bo\xffttle"))
    return root


def test_names_need_not_be_utf_8(odd: Path, capsys: pytest.CaptureFixture) -> None:
    name = os.fsdecode(b"bo\xffttle")
    train, test = load(odd, name)
    assert len(train) == 6
    assert r"bo\xffttle: train 6" in capsys.readouterr().out
    assert cache_key(train) != cache_key(test)
    paths = [path for batch in ordered_loader(test, batch_size=4, workers=0) for path in batch.path]
    assert next(os.fsencode(p) for p in paths if "\udcdd" in p).endswith(b"/bo\xffttle/test/broken/\xc2\xdd000.png")
    assert printable(name) == r"bo\xffttle"
    assert printable("plain é") == "plain é"
