"""The colour images of MVTec 3D-AD (Bergmann et al., VISAPP 2022), as its archive unpacks; depth is not read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from datasets.folder import Counts, DatasetSpec, Item, Scan
from datasets.walk import image_files, is_good, subfolders, unused
from default import UsageError

COUNTS = {
    "bagel": Counts(train=244, held_out=22, good=22, bad=88),
    "cable_gland": Counts(train=223, held_out=23, good=21, bad=87),
    "carrot": Counts(train=286, held_out=29, good=27, bad=132),
    "cookie": Counts(train=210, held_out=22, good=28, bad=103),
    "dowel": Counts(train=288, held_out=34, good=26, bad=104),
    "foam": Counts(train=236, held_out=27, good=20, bad=80),
    "peach": Counts(train=361, held_out=42, good=26, bad=106),
    "potato": Counts(train=300, held_out=33, good=22, bad=92),
    "rope": Counts(train=298, held_out=33, good=32, bad=69),
    "tire": Counts(train=210, held_out=29, good=25, bad=87),
}


def scan_3d(folder: Path, class_index: int, good_names: Sequence[str]) -> Scan:
    """What a class holds: CLASS/{train,validation,test}/KIND/{rgb,gt}/NAME.png.

    Raises:
        UsageError: images or masks are missing.
    """
    normal = [item for item in items_of(folder / "train", class_index, good_names) if not item.label]
    kept = [item for item in items_of(folder / "validation", class_index, good_names) if not item.label]
    test = items_of(folder / "test", class_index, good_names)
    for part, found in (("train/good/rgb", normal), ("test/KIND/rgb", test)):
        if not found:
            raise UsageError(f"--data-path: {folder} lacks images in {part}")
    train = [*normal, *(replace(item, held_out=True) for item in kept)]
    return Scan(train=train, test=test, ignored=unused(folder, [*train, *test]))


def items_of(part: Path, class_index: int, good_names: Sequence[str]) -> list[Item]:
    """The images in the `rgb` folders of a part of a class."""
    found = []
    for kind in subfolders(part):
        good = is_good(kind.name, good_names)
        for path in image_files(kind / "rgb"):
            mask = None if good else kind / "gt" / path.with_suffix(".png").name
            if mask is not None and not mask.is_file():
                raise UsageError(f"{path}: no mask at {mask}")
            found.append(
                Item(
                    path=path,
                    mask_path=mask,
                    label=int(not good),
                    class_index=class_index,
                    kind=kind.name,
                    name=path.stem,
                )
            )
    return found


SPEC = DatasetSpec(
    title="MVTec 3D-AD",
    classes=tuple(COUNTS),
    places=("data/mvtec_3d_anomaly_detection", "data/mvtec_3d"),
    inner=("mvtec_3d_anomaly_detection",),
    scan=scan_3d,
    counts=COUNTS,
    layout="CLASS/{train,validation}/good/rgb, CLASS/test/KIND/rgb/NAME.png and CLASS/test/KIND/gt/NAME.png",
    licence="CC BY-NC-SA 4.0",
    citation="Bergmann et al., The MVTec 3D-AD Dataset, VISAPP 2022, arXiv 2112.09045",
    hint="; unpack MVTec 3D-AD there (https://www.mvtec.com/company/research/datasets/mvtec-3d-ad)",
)
