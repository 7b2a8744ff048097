"""Real-IAD (Wang et al., CVPR 2024): 30 products, five views of each sample, splits in json files.

A file of each class says the split: `realiad_jsons/CLASS.json`, of the single-view setting `realiad_jsons_sv/...`, of
the settings with noise `realiad_jsons_fuiad_0.1/...`, where that share of the training images is defective and no label
says which. Of several sizes of the images the largest of 1024, 512 and 256 pixels is read, or else the raw ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from datasets.folder import GOOD, Counts, DatasetSpec, Item, Scan
from datasets.saturation import auroc_of
from datasets.walk import is_inside
from default import UsageError

CLASSES = (
    "audiojack", "bottle_cap", "button_battery", "end_cap", "eraser", "fire_hood", "mint", "mounts", "pcb",
    "phone_battery", "plastic_nut", "plastic_plug", "porcelain_doll", "regulator", "rolled_strip_base",
    "sim_card_set", "switch", "tape", "terminalblock", "toothbrush", "toy", "toy_brick", "transistor1", "u_block",
    "usb", "usb_adaptor", "vcpill", "wooden_beads", "woodstick", "zipper",
)  # fmt: skip
IMAGES = ("realiad_1024", "realiad_512", "realiad_256", "realiad_raw")
SPLITS = "realiad_jsons"
NOISE = ("0.0", "0.1", "0.2", "0.4")
SAMPLE = re.compile(r"([a-zA-Z][a-zA-Z0-9_]*_[0-9]{4}_[A-Z][A-Z_]*[A-Z])_C[0-9]_")  # without the view


def split_of(root: Path, name: str, splits: str) -> Path | None:
    """The split file of a class, None if it is missing; its folder may lie in one more of the archive's."""
    places = (root / splits, root / SPLITS / splits)
    return next((p for p in (place / f"{name}.json" for place in places) if p.is_file()), None)


def found(root: Path, splits: str = SPLITS) -> tuple[str, ...]:
    """The classes whose split file is there."""
    return tuple(name for name in CLASSES if split_of(root, name, splits))


def scan_real_iad(
    folder: Path, class_index: int, good_names: Sequence[str], *, splits: str = SPLITS, noisy: bool = False
) -> Scan:
    """What the split file of a class lists; its defective training images are not used unless it is `noisy`.

    Raises:
        UsageError: it cannot be read, or an image or mask that it lists is missing or not one of the class's.
    """
    root, name = folder.parent, folder.name
    split = split_of(root, name, splits)
    images = next((root / place for place in IMAGES if (root / place / name).is_dir()), None)
    if split is None or images is None:
        raise UsageError(f"--data-path: {root} lacks {name}.json in {splits}, or {name} in one of {', '.join(IMAGES)}")
    try:
        content = json.loads(split.read_text(encoding="utf-8"))
        normal = str(content["meta"]["normal_class"])
        places = (images / content["meta"]["prefix"], images / name)
        train, test = ([item_of(row, normal, places, class_index) for row in content[p]] for p in ("train", "test"))
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{split}: expected meta (prefix, normal_class), train and test") from error
    for path in (p for item in (*train, *test) for p in (item.path, item.mask_path) if p is not None):
        if not is_inside(path, images, images / name):
            raise UsageError(f"--data-path: {split} lists {path}, which leads out of {images}")
    kept = [replace(item, label=0, mask_path=None) for item in train if noisy or not item.label]
    if not kept or not test:
        raise UsageError(f"--data-path: {split} lists no normal training images, or no test images")
    dropped = len(train) - len(kept)
    return Scan(train=kept, test=test, ignored={"train/defective": dropped} if dropped else {})


def item_of(row: dict[str, Any], normal: str, places: Sequence[Path], class_index: int) -> Item:
    """An image of the split file; it is normal without a mask or in the normal class."""
    kind, label = str(row["anomaly_class"]), int(row["mask_path"] is not None and row["anomaly_class"] != normal)
    path = listed(str(row["image_path"]), places)
    mask = listed(str(row["mask_path"]), places) if label else None
    return Item(
        path=path, mask_path=mask, label=label, class_index=class_index, kind=kind if label else GOOD, name=path.stem
    )


def listed(name: str, places: Sequence[Path]) -> Path:
    """A file that the split names, in the first of the places that has it."""
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        raise UsageError(f"--data-path: the split lists {places[0] / name}, which is missing")
    return path


class SampleProtocol:
    """S-AUROC: of samples instead of images, each scored by the highest of its views."""

    def __init__(self) -> None:
        self.samples: dict[str, tuple[int, float]] = {}

    @classmethod
    def of(cls, items: Sequence[Item]) -> SampleProtocol:
        return cls()

    def check(self) -> None:
        pass

    def add(self, path: str, label: int, score: float, heat: Tensor) -> None:
        match = SAMPLE.search(Path(path).name)
        self._note(match[1] if match else Path(path).stem, label, score)

    def merge(self, other: SampleProtocol) -> None:
        for key, (label, score) in other.samples.items():
            self._note(key, label, score)

    def _note(self, key: str, label: int, score: float) -> None:
        before = self.samples.get(key, (label, score))
        self.samples[key] = max(before[0], label), max(before[1], score)

    def results(self) -> dict[str, float]:
        scores = {bad: [score for label, score in self.samples.values() if label == bad] for bad in (0, 1)}
        return {"S-AUROC": auroc_of(scores[1], scores[0])}


SPEC = DatasetSpec(
    title="Real-IAD",
    classes=CLASSES,
    places=("data/Real-IAD", "data/realiad"),
    scan=scan_real_iad,
    found=found,
    total=Counts(train=36465, good=63256, bad=51329),
    protocol=SampleProtocol.of,
    layout="realiad_jsons/CLASS.json and realiad_1024/CLASS (or _512, _256, _raw)",
    licence="CC BY-NC-SA 4.0",
    citation="Wang et al., Real-IAD, CVPR 2024, arXiv 2403.12580",
    hint="; unpack Real-IAD there (https://realiad4ad.github.io/Real-IAD/)",
)
SINGLE_VIEW, *NOISY = (
    replace(
        SPEC,
        title=f"Real-IAD's {title} split",
        scan=partial(scan_real_iad, splits=splits, noisy=noisy),
        found=partial(found, splits=splits),
        total=None,
        protocol=SPEC.protocol if noisy else None,
        layout=f"{splits}/CLASS.json and realiad_1024/CLASS (or _512, _256, _raw)",
    )
    for title, splits, noisy in (
        ("single-view", f"{SPLITS}_sv", False),
        *((f"{100 * float(share):.0f} % noise", f"{SPLITS}_fuiad_{share}", True) for share in NOISE),
    )
)
