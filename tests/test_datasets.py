"""Layouts, image modes, masks, order, bad input and worker processes."""

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_datasets, resolve_classes, resolve_root
from datasets.folder import ImageFolder
from datasets.loaders import EpochSampler, ordered_loader, resolve_workers, train_loader
from datasets.masks import load_mask
from datasets.transforms import to_picture
from datasets.walk import natural
from default import MVTEC_CLASSES, DataConfig, UsageError
from fake_data import load_image, make_mvtec, make_visa_original, make_visa_rearranged, picture, save


def data(dataset: str, root: Path, **options: object) -> DataConfig:
    return DataConfig(dataset=dataset, data_path=str(root), input_size=32, **options)  # type: ignore[arg-type]


def load(config: DataConfig) -> tuple[ImageFolder, ImageFolder]:
    return build_datasets(config, resolve_classes(config))


def test_mvtec_layout(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path, ("bottle", "grid"))
    train, test = load(data("mvtec", root, class_names=("grid", "bottle")))
    assert (len(train), len(test)) == (12, 18)
    assert [i.class_index for i in train.items] == [0] * 6 + [1] * 6
    assert train.items[0].path.parts[-4] == "grid", "classes come in the data set's order"
    kinds = [(i.kind, i.label, i.mask_path is None) for i in test.items[:9:3]]
    assert kinds == [("broken", 1, False), ("good", 0, True), ("scratch", 1, False)]
    for number in range(9):
        assert bool(test[number].mask.any()) == bool(test[number].label)


@pytest.mark.parametrize("make", [make_visa_rearranged, make_visa_original])
def test_both_visa_layouts_are_recognised(tmp_path: Path, make) -> None:
    root = make(tmp_path)
    train, test = load(data("visa", root, class_names=("candle", "pcb1")))
    assert (len(train), len(test)) == (12, 12)
    bad = [test[i] for i in range(12) if test.items[i].label]
    assert len(bad) == 6
    assert all(int(s.mask.sum()) == 64 for s in bad)


def test_masks_shrink_to_the_nearest_pixel(tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((40, 40)) < 0.5
    save(tmp_path / "m.png", (mask * 255).astype(np.uint8), "L")
    np.testing.assert_array_equal(load_mask(tmp_path / "m.png", 8), mask[2::5, 2::5])


def test_modes_become_rgb_by_what_they_are(tmp_path: Path) -> None:
    image = picture(np.random.default_rng(0))[0]
    grey = np.asarray(Image.fromarray(image).convert("L"))
    save(tmp_path / "l.png", image, "L")
    Image.fromarray(np.dstack([image, np.full_like(grey, 255)])).save(tmp_path / "rgba.png")
    save(tmp_path / "rgb.png", image)
    palette = Image.fromarray(image).quantize(32)
    palette.save(tmp_path / "p.png")
    Image.fromarray(image).convert("1").save(tmp_path / "one.png")
    Image.fromarray(np.dstack([255 - image, np.zeros_like(grey)]), "CMYK").save(tmp_path / "cmyk.tif")
    loaded = {p.stem: to_picture(load_image(p, 64)) for p in tmp_path.iterdir()}
    np.testing.assert_array_equal(loaded["l"], np.repeat(grey[..., None], 3, 2))
    for name in ("rgb", "rgba"):
        np.testing.assert_array_equal(loaded[name], image)
    np.testing.assert_array_equal(loaded["p"], np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(loaded["cmyk"], image)
    assert set(np.unique(loaded["one"])) == {0, 255}


def test_resize_is_pillows_lanczos_to_unit_range(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 77, 3), dtype=np.uint8)
    save(tmp_path / "a.png", image)
    expected = np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.LANCZOS)) / 255.0
    np.testing.assert_allclose(load_image(tmp_path / "a.png", 40).permute(1, 2, 0), expected, atol=1e-6)


def test_natural_order_and_limit(tmp_path: Path) -> None:
    names = ["10.png", "2.png", "1.png", "a1.png"]
    assert [p.name for p in sorted(map(Path, names), key=natural)] == ["1.png", "2.png", "10.png", "a1.png"]
    mixed = ["1.png", "01.png", "\u00b2.png"]  # equal numbers, and a digit that int() refuses
    assert sorted(map(Path, mixed), key=natural) == sorted(map(Path, reversed(mixed)), key=natural)
    train, test = load(data("folder", make_mvtec(tmp_path), limit=2))
    assert (len(train), len(test)) == (4, 12)


def test_own_images_may_have_no_masks_at_all(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path, ("mug", "pen"))
    shutil.rmtree(root / "pen" / "ground_truth")
    _, test = load(data("folder", root))
    assert {item.class_index for item in test.items if item.label and item.mask_path is None} == {1}
    (root / "mug" / "ground_truth" / "broken" / "001_mask.png").unlink()
    with pytest.raises(UsageError, match=r"001\.png: no mask at .*001_mask\.png"):
        load(data("folder", root))


def lose(part: str, instead: str | None = None):
    """Moves a part of the data away; returns how, giving the folder to load."""

    def spoil(root: Path) -> Path:
        (root / part).rename(root / "lost")
        if instead is not None:
            (root / instead).mkdir(parents=True)
        return root

    return spoil


def void(root: Path) -> Path:
    (root / "void").mkdir()
    return root / "void"


def test_strangers_among_the_images_are_ignored(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path)
    before = [i for part in load(data("folder", root)) for i in part.items]
    good = root / "bottle" / "train" / "good"
    for name in ("Thumbs.db", ".hidden.png", "._000.png", "readme.txt"):
        (good / name).write_text("not an image")
    (good / "folder.png").mkdir()
    save(root / "bottle" / "test" / ".ipynb_checkpoints" / "000.png", picture(np.random.default_rng(0))[0])
    (root / ".cache" / "train").mkdir(parents=True)
    assert [i for part in load(data("folder", root)) for i in part.items] == before
    (good / "000.png").rename(good / "000.PNG")
    assert len(load(data("folder", root))[0]) == 12, "the case of a suffix does not matter"


def test_default_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--data-path: no such folder: data.VisA; unpack VisA"):
        resolve_root(DataConfig(dataset="visa"))
    (tmp_path / "data" / "VisA").mkdir(parents=True)
    make_visa_rearranged(tmp_path / "data" / "VisA_pytorch" / "1cls", ("candle",))
    assert resolve_root(DataConfig(dataset="visa")) == Path("data/VisA_pytorch/1cls"), "an empty folder does not count"
    make_mvtec(tmp_path / "data" / "MVTec", ("bottle",))
    assert resolve_root(DataConfig()) == Path("data/MVTec")
    assert resolve_classes(DataConfig()) == MVTEC_CLASSES


BAD = {
    "missing": (lambda root: root / "nowhere", "--data-path: no such folder: {root}/nowhere; unpack MVTec AD"),
    "empty": (void, "--data-path: {root}/void is empty"),
    "no class": (lose("bottle"), "--data-path: no folder of the class 'bottle' in {root}"),
    "no train": (lose("bottle/train/good"), "--data-path: {root}/bottle lacks images in train/good"),
    "empty train": (lose("bottle/train/good", "bottle/train/good"), "--data-path: {root}/bottle lacks images in train"),
    "no test": (lose("bottle/test"), "--data-path: {root}/bottle lacks images in test"),
    "no masks": (lose("bottle/ground_truth"), "{root}/bottle/test/broken/000.png: no mask at {root}/bottle/ground"),
    "no mask": (
        lose("bottle/ground_truth/scratch/002_mask.png"),
        "{root}/bottle/test/scratch/002.png: no mask at {root}/bottle/ground_truth/scratch/002_mask.png",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_named(tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    root = make_mvtec(tmp_path / "data")
    with pytest.raises(UsageError) as caught:
        load(data("mvtec", spoil(root), class_names=("bottle", "grid")))
    assert str(caught.value).replace("\\", "/").startswith(message.format(root=root.as_posix()))
    assert "\n" not in str(caught.value)


def test_bad_split_files_are_named(tmp_path: Path) -> None:
    root = make_visa_original(tmp_path, ("candle",))
    config, split = data("visa", root, class_names=("candle",)), root / "split_csv" / "1cls.csv"
    whole = split.read_text()
    for text, message in (
        (whole.replace("Masks/Anomaly/001.png", "Masks/Anomaly/9.png"), r"001\.JPG: no mask at .*9\.png"),
        (whole.replace("candle/Data/Masks/Anomaly/001.png", ""), r"001\.JPG: no mask at its row of .*1cls\.csv"),
        (
            whole.replace("Normal/0001.JPG", "Normal/9.JPG"),
            r"--data-path: .*1cls\.csv lists .*9\.JPG, which is missing",
        ),
        (
            whole.replace(",test,", ",tset,", 1),
            r"1cls\.csv: expected train or test as split of .*'tset'",
        ),
        (
            whole.replace(",anomaly,", ",bad,", 1),
            r"expected normal or anomaly as label of .*, but got 'bad'",
        ),
        (
            whole.replace("candle/Data/Images/Normal/0001", "../secret"),
            r"lists '\.\./secret\.JPG', which is not",
        ),
        (whole.replace("candle/Data/Images/Normal/0001", "/etc/a"), r"lists '/etc/a\.JPG', which is not in the folder"),
        (whole.replace("candle/Data/Masks", "candle/../../Masks", 1), r"which is not in the folder of candle"),
        (whole.replace("candle/Data/Masks", "pcb1/Data/Masks", 1), r"which is not in the folder of candle"),
        ("object,label\ncandle,normal\n", "--data-path: .*1cls.csv: expected the columns image, label, mask"),
        ("", "--data-path: .*1cls.csv: expected the columns"),
        ("object,split,label,image,mask\nfryum,train\n", "lists no training or no test images of candle"),
    ):
        split.write_text(text)
        with pytest.raises(UsageError, match=message):
            load(config)
    split.unlink()
    with pytest.raises(UsageError, match=r"--data-path: no such file: .*1cls\.csv"):
        load(config)


def test_links_do_not_lead_visas_split_out_of_a_class(tmp_path: Path) -> None:
    root = make_visa_original(tmp_path / "visa", ("candle",))
    config = data("visa", root, class_names=("candle",))
    count = len(load(config)[0])
    (root / "candle").rename(tmp_path / "candle")
    (root / "candle").symlink_to(tmp_path / "candle")
    assert len(load(config)[0]) == count, "a class may lie on another disk"
    image = tmp_path / "candle" / "Data" / "Images" / "Normal" / "0001.JPG"
    image.rename(image.with_name("moved.JPG"))
    image.symlink_to("moved.JPG")
    assert len(load(config)[0]) == count, "a link within the class"
    image.with_name("moved.JPG").rename(tmp_path / "secret.JPG")
    image.unlink()
    image.symlink_to(tmp_path / "secret.JPG")
    with pytest.raises(UsageError, match=r"1cls\.csv lists 'candle/\S+0001\.JPG', a link that leads out of the folder"):
        load(config)


def test_damaged_images_are_named_whatever_the_decoder_says(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    save(path, picture(np.random.default_rng(0))[0])
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:20], whole[: len(whole) // 2], whole[:40] + b"\0" * 40 + whole[80:]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"a\.png: cannot be read as an image \("):
            load_image(path, 32)


def test_unknown_class_lists_the_choices(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--class-names: 'botle' is not an MVTec AD class; choose from all, carpet"):
        resolve_classes(data("mvtec", make_mvtec(tmp_path), class_names=("botle",)))


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = EpochSampler(20, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    torch.manual_seed(99)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    assert sorted(first) == sorted(second) == list(range(20))


def test_a_batch_larger_than_the_data_holds_all_of_them(tmp_path: Path) -> None:
    train, _ = load(data("folder", make_mvtec(tmp_path)))
    assert [len(batch.path) for batch in train_loader(train, batch_size=13, workers=0, seed=0)] == [12]


def test_spawned_workers_give_the_same_batches_and_errors(tmp_path: Path) -> None:
    train, test = load(data("folder", make_mvtec(tmp_path)))
    alone, many = (list(train_loader(train, batch_size=4, workers=n, seed=5)) for n in (0, 2))
    assert [b.path for b in alone] == [b.path for b in many]
    assert all(torch.equal(a.image, b.image) for a, b in zip(alone, many, strict=True))
    bad = test.items[4].path
    bad.write_bytes(b"not an image")
    for workers in (0, 2):
        with pytest.raises(UsageError) as caught:
            list(ordered_loader(test, batch_size=4, workers=workers))
        assert str(caught.value).startswith(f"{bad}: cannot be read as an image")
        assert "\n" not in str(caught.value)
        del caught  # and with it, in its traceback, what holds the workers
        gc.collect()


def test_a_batch_has_the_promised_types(tmp_path: Path) -> None:
    batch = next(iter(ordered_loader(load(data("folder", make_mvtec(tmp_path)))[1], batch_size=4, workers=0)))
    assert (batch.image.shape, batch.image.dtype) == ((4, 3, 32, 32), torch.float32)
    assert (batch.mask.shape, batch.mask.dtype) == ((4, 32, 32), torch.bool)
    assert batch.label.dtype == batch.class_index.dtype == torch.int64
    moved = batch.to(torch.device("meta"), non_blocking=True)
    assert moved.mask.device.type == moved.image.device.type == "meta"
    assert moved.path == batch.path


def test_default_workers() -> None:
    assert resolve_workers(None, "cpu") == 0
    assert 1 <= resolve_workers(None, "cuda") <= 8
    assert resolve_workers(3, "cpu") == 3
