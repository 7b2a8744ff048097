"""The data sets of the field: each in a generated copy of its layout, and what is said of a wrong one."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import SPECS, build_datasets, resolve_classes, scan_classes
from datasets.cache import cache_key
from datasets.cifar10 import GROUPS
from datasets.folder import Counts, ImageFolder
from datasets.geometry import Geometry
from default import DATASETS, Config, DataConfig, UsageError, make_config
from fake_data import make_visa_original
from fake_sets import (
    make_3d,
    make_ad_2,
    make_autovi,
    make_btad,
    make_cifar,
    make_kolektor,
    make_ksdd2,
    make_list,
    make_loco,
    make_mpdd,
    make_real_iad,
    make_vad,
    make_visa_split,
)


def load(dataset: str, root: Path, *names: str, **options: object) -> tuple[ImageFolder, ImageFolder]:
    data = DataConfig(dataset=dataset, data_path=str(root), input_size=32, **options)  # type: ignore[arg-type]
    return build_datasets(data, names or resolve_classes(data))


# Data set, how a copy is made, classes in it, and what each class then has.
TREES: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], Counts]] = {
    "btad": (make_btad, ("01", "02", "03"), Counts(train=3, good=3, bad=3)),
    "mpdd": (make_mpdd, ("connector", "tubes"), Counts(train=3, good=3, bad=3)),
    "mvtec-ad-2": (make_ad_2, ("can", "vial"), Counts(train=3, held_out=3, good=6, bad=6)),
    "mvtec-loco": (make_loco, ("pushpins",), Counts(train=3, held_out=3, good=3, bad=6)),
    "mvtec-3d": (make_3d, ("bagel",), Counts(train=3, held_out=3, good=3, bad=3)),
    "real-iad": (make_real_iad, ("audiojack",), Counts(train=10, good=14, bad=6)),
    "ksdd2": (make_ksdd2, ("ksdd2",), Counts(train=4, good=4, bad=2)),
    "kolektorsdd": (make_kolektor, ("fold1", "fold2", "fold3"), Counts(train=12, good=6, bad=2)),
    "autovi": (make_autovi, ("tank_screw",), Counts(train=3, good=3, bad=3)),
    "vad": (make_vad, ("vad",), Counts(train=3, good=3, bad=6)),
    "cifar10": (make_cifar, GROUPS, Counts(train=50, good=10, bad=10)),
}
IGNORED = {  # what a class has beside its images and masks
    "mvtec-ad-2": {"test_private": 3, "test_private_mixed": 3},
    "mvtec-loco": {".json": 1},
    "mvtec-3d": {"test/good": 6, "train/good": 3, "validation/good": 3},
    "vad": {"train/bad": 3},
    "ksdd2": {"train/defect": 2, "copies": 2},
    "kolektorsdd": {"train/defect": 4},
}
WITHOUT_MASKS = ("vad", "cifar10")


def test_every_name_has_a_data_set_with_licence_and_source() -> None:
    assert set(SPECS) == set(DATASETS)
    for name in TREES:
        spec = SPECS[name]
        assert spec.layout and spec.licence and spec.citation and spec.places and spec.hint
        assert set(spec.counts) <= set(spec.classes or ())


@pytest.mark.parametrize("dataset", TREES)
def test_each_layout(dataset: str, tmp_path: Path) -> None:
    make, names, counts = TREES[dataset]
    data = DataConfig(dataset=dataset, data_path=str(make(tmp_path)), input_size=32)
    scans = scan_classes(data, names)
    assert {name: scan.counts for name, scan in scans.items()} == dict.fromkeys(names, counts)
    for scan in scans.values():
        assert dict(scan.ignored) == IGNORED.get(dataset, {})
    train, test = build_datasets(data, names)
    assert not any(item.label for item in train.items)
    names_there = [(item.kind, item.name, item.class_index) for item in test.items]
    assert len(names_there) == len(set(names_there)), "no two pictures of one name"
    for number, item in enumerate(test.items):
        empty = dataset == "btad" and item.path.parts[-4:] == ("02", "test", "ko", "0000.png")
        assert bool(test[number].mask.any()) == (bool(item.label) and dataset not in WITHOUT_MASKS and not empty)


@pytest.mark.parametrize("dataset", TREES)
def test_a_wrong_tree_says_what_was_expected(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "something").mkdir()
    (tmp_path / "something" / "else.txt").touch()
    names = SPECS[dataset].classes
    assert names is not None
    with pytest.raises(UsageError) as caught:
        load(dataset, tmp_path, names[0])
    text = str(caught.value)
    assert text.startswith("--data-path: ") and "\n" not in text
    assert SPECS[dataset].layout in text


@pytest.mark.parametrize("dataset", sorted(set(TREES) - {"cifar10", "vad", "ksdd2", "kolektorsdd"}))
def test_a_missing_mask_is_named(dataset: str, tmp_path: Path) -> None:
    make, names, _ = TREES[dataset]
    _, test = load(dataset, make(tmp_path), *names[:1])
    item = next(item for item in test.items if item.mask_path)
    assert item.mask_path is not None
    for path in [*item.mask_path.glob("*.png")] if item.mask_path.is_dir() else [item.mask_path]:
        path.unlink()
    with pytest.raises(UsageError, match=r"no masks? |which is missing") as caught:
        load(dataset, tmp_path, *names[:1])
    assert item.path.name in str(caught.value) or item.mask_path.name in str(caught.value)


@pytest.mark.parametrize("make", [make_ksdd2, make_kolektor])
def test_kolektor_needs_all_masks(make: Callable[[Path], Path], tmp_path: Path) -> None:
    dataset, name = ("ksdd2", "10003_GT.png") if make is make_ksdd2 else ("kolektorsdd", "Part2_label.bmp")
    next(make(tmp_path).rglob(name)).unlink()
    with pytest.raises(UsageError, match=f"no mask at .*{name}"):
        load(dataset, tmp_path, *(SPECS[dataset].classes or ())[:1])


def test_folds_are_of_whole_parts_and_never_of_one_model(tmp_path: Path) -> None:
    make_kolektor(tmp_path)
    tested = [
        {item.path.parent.name for item in load("kolektorsdd", tmp_path, fold)[1].items}
        for fold in ("fold1", "fold2", "fold3")
    ]
    assert sorted(part for fold in tested for part in fold) == [f"kos{n:02d}" for n in range(1, 7)]
    train, test = load("kolektorsdd", tmp_path, "fold2")
    assert not {i.path.parent for i in train.items} & {i.path.parent for i in test.items}
    data = DataConfig(dataset="kolektorsdd", data_path=str(tmp_path), multi_class=True)
    with pytest.raises(UsageError, match="--multi-class: fold1, fold2, fold3 of KolektorSDD are splits of the same"):
        resolve_classes(data)
    single = DataConfig(dataset="kolektorsdd", data_path=str(tmp_path), multi_class=True, class_names=("fold2",))
    assert resolve_classes(single) == ("fold2",)


def test_masks_of_an_image_count_together(tmp_path: Path) -> None:
    _, test = load("mvtec-loco", make_loco(tmp_path), "pushpins")
    number = next(n for n, item in enumerate(test.items) if item.label)
    folder = test.items[number].mask_path
    assert folder is not None and folder.is_dir()
    parts = [np.asarray(Image.open(path)) > 0 for path in sorted(folder.iterdir())]
    assert len(parts) == 2 and not (parts[0] & parts[1]).any()
    large = ImageFolder(test.items, Geometry(input_size=64))
    np.testing.assert_array_equal(large[number].mask.numpy(), parts[0] | parts[1])


def test_another_mask_is_another_cache(tmp_path: Path) -> None:
    _, test = load("mvtec-loco", make_loco(tmp_path), "pushpins")
    before = cache_key(test)
    path = next(tmp_path.rglob("logical_anomalies/000/001.png"))
    os.utime(path, ns=(1, 1))
    assert cache_key(test) != before


def test_real_iad_also_with_a_folder_more_and_other_sizes(tmp_path: Path) -> None:
    make_real_iad(tmp_path, nested=True)
    assert len(load("real-iad", tmp_path, "audiojack")[1]) == 20
    (tmp_path / "realiad_512").rename(tmp_path / "realiad_raw")
    _, test = load("real-iad", tmp_path, "audiojack")
    assert test.items[0].path.parts[-5] == "realiad_raw"
    (tmp_path / "realiad_jsons" / "realiad_jsons" / "audiojack.json").write_text("[]")
    with pytest.raises(UsageError, match=r"audiojack\.json: expected meta"):
        load("real-iad", tmp_path, "audiojack")


@pytest.mark.parametrize("nested", [False, True])
def test_other_splits_of_real_iad(nested: bool, tmp_path: Path) -> None:
    make_real_iad(tmp_path, nested=nested)
    train, test = load("real-iad-sv", tmp_path, "audiojack")
    assert (len(train), len(test), sum(item.label for item in test.items)) == (2, 4, 2)
    train, test = load("real-iad-noise-0.2", tmp_path, "audiojack")
    assert (len(train), len(test), sum(item.label for item in test.items)) == (15, 15, 3)
    assert {item.kind for item in train.items} == {"good", "BX"} and not any(item.label for item in train.items)
    with pytest.raises(UsageError, match=r"no folder of the class 'audiojack' .*; expected realiad_jsons_fuiad_0\.4"):
        load("real-iad-noise-0.4", tmp_path, "audiojack")


def test_real_iad_reads_nothing_outside_its_images(tmp_path: Path) -> None:
    make_real_iad(tmp_path / "data")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "data" / "realiad_512").rename(elsewhere)
    (tmp_path / "data" / "realiad_512").mkdir()
    (tmp_path / "data" / "realiad_512" / "audiojack").symlink_to(elsewhere / "audiojack")
    assert len(load("real-iad", tmp_path / "data", "audiojack")[1]) == 20, "a class may lie on another disk"
    split = tmp_path / "data" / "realiad_jsons" / "audiojack.json"
    whole = split.read_text()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.jpg")
    for text in (
        whole.replace("OK/S0000/audiojack_0000_OK_C1_20230921.jpg", "../../secret.jpg"),
        whole.replace("OK/S0000/audiojack_0000_OK_C1_20230921.jpg", (tmp_path / "secret.jpg").as_posix()),
    ):
        split.write_text(text)
        with pytest.raises(UsageError, match=r"audiojack\.json lists .*secret\.jpg, which leads out of .*realiad_512"):
            load("real-iad", tmp_path / "data", "audiojack")


@pytest.mark.parametrize("name", ["fewshot", "highshot"])
def test_two_class_splits_of_visa(name: str, tmp_path: Path) -> None:
    make_visa_split(make_visa_original(tmp_path), name)
    train, test = load(f"visa-{name}", tmp_path, "candle", "pcb1")
    assert (len(train), len(test)) == (6, 16)
    assert not any(item.label for item in train.items)
    (tmp_path / "split_csv" / f"2cls_{name}.csv").unlink()
    with pytest.raises(UsageError, match=f"no such file: .*2cls_{name}.csv"):
        load(f"visa-{name}", tmp_path, "candle")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_lists(suffix: str, tmp_path: Path) -> None:
    path = make_list(tmp_path, suffix)
    for root in (path, tmp_path):
        data = DataConfig(dataset=suffix[1:], data_path=str(root), input_size=32)
        assert resolve_classes(data) == ("bolt", "nut")
        train, test = build_datasets(data, ("bolt", "nut"))
        assert [sum(item.held_out for item in train.items), len(train), len(test)] == [2, 8, 8]
        kinds = [(item.kind, item.label, item.mask_path is not None) for item in test.items]
        assert kinds[:4] == [("good", 0, False), ("good", 0, False), ("scratch", 1, True), ("bad", 1, True)]
        assert kinds[6:] == [("scratch", 1, False), ("bad", 1, False)]
        assert test[2].mask.any() and not test[6].mask.any()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("pictures/nut-0.png", "pictures/gone.png", r"line 10: no such file: .*gone\.png"),
        ("drawn/bolt-1.png", "", r"bolt-bad1\.png is defective and has no mask, but others of its class have"),
        ("drawn/bolt-1.png", "gone.png", r"line 9: no such file: .*gone\.png"),
        ("pictures/nut-1.png", "pictures/nut-0.png", r"line 11: pictures/nut-0.png is listed in line 10, too"),
        ("nut-0.png,train", "nut-0.png,dev", r"line 10: split 'dev'; choose from train, test, calibration, validation"),
        ("path,split", "file,split", "line 2: lacks path; expected path, split, label, mask, class"),
    ],
)
def test_a_wrong_row_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = make_list(tmp_path, ".csv")
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=message):
        load("csv", path)


def test_a_list_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such folder: .*gone\.csv; give the \.csv file"):
        load("csv", tmp_path / "gone.csv")
    (tmp_path / "other").touch()
    with pytest.raises(UsageError, match=r"expected a \.csv file, or one in .*, but there is none"):
        load("csv", tmp_path)
    (tmp_path / "a.jsonl").write_text('{"path": 1}\nno json')
    with pytest.raises(UsageError, match="line 2: is no JSON"):
        load("jsonl", tmp_path)


# --- what else a name means


def test_the_limit_of_aupro_is_the_papers() -> None:
    assert make_config(dataset="mvtec-ad-2").eval.fpr_limit == 0.05
    assert make_config(dataset="mvtec-ad-2", fpr_limit=0.3).eval.fpr_limit == 0.3
    assert make_config(dataset="mvtec").eval.fpr_limit == Config().eval.fpr_limit == 0.3


def test_official_counts_are_those_of_the_papers() -> None:
    total = {name: sum(c.train for c in SPECS[name].counts.values()) for name in DATASETS}
    assert (total["mvtec"], total["visa"], total["mpdd"], total["btad"]) == (3629, 8659, 888, 1799)
    assert (total["mvtec-loco"], total["mvtec-3d"]) == (1778, 2656)
    tested = {name: sum(c.good + c.bad for c in SPECS[name].counts.values()) for name in DATASETS}
    assert (tested["mvtec"], tested["visa"], tested["mvtec-loco"], tested["mvtec-3d"]) == (1725, 2162, 1568, 1197)
