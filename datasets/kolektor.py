"""KolektorSDD (Tabernik et al., JIM 2020) and KolektorSDD2 (Bozic et al., 2021), as their archives unpack.

Every image has a mask, and is defective where that is not black. Only normal images are trained on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from datasets.folder import GOOD, Counts, DatasetSpec, Item, Scan
from datasets.masks import read_marks
from datasets.walk import image_files, subfolders
from default import UsageError
from utils.run.threads import in_threads

BAD = "defect"
FOLDS = {f"fold{number + 1}": number for number in range(3)}


def scan_second(folder: Path, class_index: int, good_names: Sequence[str]) -> Scan:
    """What {train,test}/NAME.png with NAME_GT.png beside the class's would-be folder hold.

    The training set has a copy of one image, `10301 (copy).png`, which is left out as in its users' code.

    Raises:
        UsageError: images or masks are missing.
    """
    root = folder.parent
    parts = {}
    for part in ("train", "test"):
        images = [p for p in image_files(root / part) if not p.stem.endswith("_GT") and "(copy)" not in p.stem]
        parts[part] = labelled([(p, p.with_name(f"{p.stem}_GT.png")) for p in images], class_index)
        if not parts[part]:
            raise UsageError(f"--data-path: {root} lacks images in {part}")
    copies = sum("(copy)" in p.stem for p in image_files(root / "train"))
    return normal_only(parts["train"], parts["test"], copies)


def scan_fold(folder: Path, class_index: int, good_names: Sequence[str]) -> Scan:
    """One of three folds: every third part of kos01 ... kos50 is tested, the others' normal images are trained on.

    The official folds are of parts, too, but their lists are pickles, which are not read.

    Raises:
        UsageError: parts, images or masks are missing.
    """
    train: list[Item] = []
    test: list[Item] = []
    for number, part in enumerate(parts_of(folder.parent)):
        images = [p for p in image_files(part) if not p.stem.endswith("_label")]
        items = labelled([(p, p.with_name(f"{p.stem}_label.bmp")) for p in images], class_index, part.name)
        (test if number % len(FOLDS) == FOLDS[folder.name] else train).extend(items)
    if not train or not test:
        raise UsageError(f"--data-path: {folder.parent} lacks images in kos01, kos02, ...")
    return normal_only(train, test)


def labelled(pairs: Sequence[tuple[Path, Path]], class_index: int, part: str = "") -> list[Item]:
    """Items of images and their masks, which say whether there is a defect.

    Raises:
        UsageError: there is no such mask.
    """
    for path, mask in pairs:
        if not mask.is_file():
            raise UsageError(f"{path}: no mask at {mask}")
    bad = in_threads(lambda pair: bool(read_marks(pair[1]).any()), pairs)
    return [
        Item(
            path=path,
            mask_path=mask if is_bad else None,
            label=int(is_bad),
            class_index=class_index,
            kind=BAD if is_bad else GOOD,
            name=f"{part}_{path.stem}" if part else path.stem,
        )
        for (path, mask), is_bad in zip(pairs, bad, strict=True)
    ]


def normal_only(train: Sequence[Item], test: Sequence[Item], copies: int = 0) -> Scan:
    """Without defective images to train on, which are counted as ignored."""
    ignored = Counter({"train/defect": sum(item.label for item in train), "copies": copies})
    normal = [item for item in train if not item.label]
    return Scan(train=normal, test=list(test), ignored={sort: n for sort, n in ignored.items() if n})


def parts_of(root: Path) -> list[Path]:
    return [p for p in subfolders(root) if p.name.startswith("kos")]


def found_folds(root: Path) -> tuple[str, ...]:
    return tuple(FOLDS) if parts_of(root) else ()


def found_second(root: Path) -> tuple[str, ...]:
    return ("ksdd2",) if (root / "train").is_dir() and (root / "test").is_dir() else ()


FIRST = DatasetSpec(
    title="KolektorSDD",
    classes=tuple(FOLDS),
    places=("data/KolektorSDD",),
    inner=("KolektorSDD",),
    scan=scan_fold,
    found=found_folds,
    total=Counts(train=2 * 347, good=347, bad=52),  # each image is tested in one fold, each good one trained on in two
    overlapping=True,
    layout="kos01/Part0.jpg, kos01/Part0_label.bmp, ... kos50",
    licence="CC BY-NC-SA 4.0",
    citation="Tabernik et al., Segmentation-based deep-learning approach for surface-defect detection, JIM 2020",
    hint="; unpack KolektorSDD there (https://www.vicos.si/resources/kolektorsdd)",
)
SECOND = DatasetSpec(
    title="KolektorSDD2",
    classes=("ksdd2",),
    places=("data/KolektorSDD2",),
    inner=("KolektorSDD2",),
    scan=scan_second,
    found=found_second,
    counts={"ksdd2": Counts(train=2085, good=894, bad=110)},
    layout="train/10000.png, train/10000_GT.png and so in test",
    licence="CC BY-NC-SA 4.0",
    citation="Bozic et al., Mixed supervision for surface-defect detection, 2021, arXiv 2104.06064",
    hint="; unpack KolektorSDD2 there (https://www.vicos.si/resources/kolektorsdd2)",
)
