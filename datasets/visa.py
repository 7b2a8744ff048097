"""VisA (Zou et al., ECCV 2022), as its archive unpacks or rearranged into MVTec layout; recognised by itself."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from datasets.folder import GOOD, Counts, DatasetSpec, Item, Scan
from datasets.walk import natural, scan_mvtec, unused
from default import VISA_CLASSES, UsageError

SPLITS = Path("split_csv")
SPLIT = SPLITS / "1cls.csv"
COLUMNS = {"object", "split", "label", "image", "mask"}
KNOWN = {"split": ("train", "test"), "label": ("normal", "anomaly")}  # what may stand in a column


def scan_visa(folder: Path, class_index: int, good_names: Sequence[str]) -> Scan:
    """What a class holds in either layout.

    Rearranged: CLASS/{train/good, test/good, test/bad, ground_truth/bad/NAME.png}. Original:
    CLASS/Data/{Images/Normal, Images/Anomaly, Masks/Anomaly} and split_csv/1cls.csv beside the classes.

    Raises:
        UsageError: images, masks or the split file are missing.
    """
    if not (folder / "Data" / "Images").is_dir():
        return scan_mvtec(folder, class_index, good_names)
    return scan_split(folder, class_index, good_names, split=SPLIT)


def scan_split(folder: Path, class_index: int, good_names: Sequence[str], *, split: Path) -> Scan:
    """What a file of splits gives a class: normal images to train on (defective ones are not), and test images.

    Raises:
        UsageError: images, masks or the split file are missing.
    """
    train: list[Item] = []
    test: list[Item] = []
    for row in read_split(folder.parent / split):
        if row["object"] != folder.name:
            continue
        item = row_item(row, folder.parent, class_index, split)
        if row["split"] != "train":
            test.append(item)
        elif not item.label:
            train.append(item)
    if not train or not test:
        raise UsageError(f"--data-path: {folder.parent / split} lists no training or no test images of {folder.name}")
    return Scan(train=sorted(train, key=_order), test=sorted(test, key=_order), ignored=unused(folder, [*train, *test]))


def _order(item: Item) -> tuple:
    """The order of the rearranged layout: by kind, then naturally by file name."""
    return item.kind, natural(item.path)


def row_item(row: dict[str, str], root: Path, class_index: int, split: Path) -> Item:
    """The image of one row of the split file.

    Raises:
        UsageError: a split or label that VisA does not have, a path that leads out of the class's folder, or a file
            that is missing.
    """
    for column, known in KNOWN.items():
        if row[column] not in known:
            raise UsageError(
                f"--data-path: {root / split}: expected {' or '.join(known)} as {column} of {row['image']}, but got "
                f"{row[column]!r}"
            )
    bad = row["label"] != "normal"
    path = inside(root, row["object"], row["image"], split)
    mask = inside(root, row["object"], row["mask"], split) if bad and row["mask"] else root if bad else None
    if not path.is_file():
        raise UsageError(f"--data-path: {split} lists {path}, which is missing")
    if mask is not None and not mask.is_file():
        raise UsageError(f"{path}: no mask at {mask if row['mask'] else f'its row of {root / split}'}")
    kind = "bad" if bad else GOOD
    return Item(path=path, mask_path=mask, label=int(bad), class_index=class_index, kind=kind, name=path.stem)


def inside(root: Path, name: str, place: str, split: Path) -> Path:
    """A file in the folder of the class `name`, from what the file of splits says.

    Raises:
        UsageError: it says another place.
    """
    parts = Path(place).parts
    if "\0" in place or ".." in parts or parts[:1] != (name,):
        raise UsageError(f"--data-path: {root / split} lists {place!r}, which is not in the folder of {name}")
    return root / place


def read_split(path: Path) -> list[dict[str, str]]:
    """Rows of an official split."""
    if not path.is_file():
        raise UsageError(f"--data-path: no such file: {path} (VisA's split of training and test images)")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        raise UsageError(f"--data-path: {path}: cannot be read as a table ({error})") from error
    if not rows or not rows[0].keys() >= COLUMNS:
        raise UsageError(f"--data-path: {path}: expected the columns {', '.join(sorted(COLUMNS))}")
    return [{name: (row[name] or "").strip() for name in COLUMNS} for row in rows]


COUNTS = {
    "candle": Counts(train=900, good=100, bad=100), "capsules": Counts(train=542, good=60, bad=100),
    "cashew": Counts(train=450, good=50, bad=100), "chewinggum": Counts(train=453, good=50, bad=100),
    "fryum": Counts(train=450, good=50, bad=100), "macaroni1": Counts(train=900, good=100, bad=100),
    "macaroni2": Counts(train=900, good=100, bad=100), "pcb1": Counts(train=904, good=100, bad=100),
    "pcb2": Counts(train=901, good=100, bad=100), "pcb3": Counts(train=905, good=101, bad=100),
    "pcb4": Counts(train=904, good=101, bad=100), "pipe_fryum": Counts(train=450, good=50, bad=100),
}  # fmt: skip
SPEC = DatasetSpec(
    title="VisA",
    classes=VISA_CLASSES,
    places=("data/VisA", "data/VisA_pytorch/1cls"),
    scan=scan_visa,
    counts=COUNTS,
    layout="CLASS/Data/{Images,Masks} and split_csv/1cls.csv, or CLASS/{train,test,ground_truth}",
    licence="CC BY 4.0",
    citation="Zou et al., SPot-the-Difference, ECCV 2022, arXiv 2207.14315",
    hint="; unpack VisA there (https://github.com/amazon-science/spot-diff)",
)
FEWSHOT, HIGHSHOT = (
    replace(
        SPEC,
        title=f"VisA's {name} split",
        places=("data/VisA",),
        scan=partial(scan_split, split=SPLITS / f"2cls_{name}.csv"),
        counts={},
        total=total,
        layout=f"CLASS/Data/{{Images,Masks}} and split_csv/2cls_{name}.csv",
    )
    for name, total in (
        ("fewshot", Counts(train=1924, good=7697, bad=960)),
        ("highshot", Counts(train=5773, good=3848, bad=480)),
    )
)
