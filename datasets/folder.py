"""A folder of images: the one directory walk and the one Dataset class.

MVTec layout: CLASS/train/good/*, CLASS/test/KIND/*, CLASS/ground_truth/KIND/NAME_mask.png.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from datasets.transforms import load_image, load_mask
from default import UsageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
GOOD = "good"


@dataclass(frozen=True, kw_only=True)
class Item:
    """An image file: its mask (None: no defect, or none drawn), label (1 defective), class and kind of defect."""

    path: Path
    mask_path: Path | None
    label: int
    class_index: int
    kind: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image: `image` (3, S, S) float32 in [0, 1], `mask` (M, M) bool, the rest as in `Item`."""

    image: Tensor
    mask: Tensor
    label: int
    class_index: int
    path: str


@dataclass(frozen=True, kw_only=True)
class Batch:
    """`image` (B, 3, S, S) in [0, 1], `mask` (B, M, M) bool, `label` and `class_index` (B,) int64, `path` B names."""

    image: Tensor
    mask: Tensor
    label: Tensor
    class_index: Tensor
    path: tuple[str, ...]

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        """On another device."""
        moved = {
            n: getattr(self, n).to(device, non_blocking=non_blocking) for n in ("image", "mask", "label", "class_index")
        }
        return replace(self, **moved)

    def pin_memory(self) -> Batch:
        """In page-locked memory; called by the loader."""
        return replace(self, **{n: getattr(self, n).pin_memory() for n in ("image", "mask", "label", "class_index")})


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """What a data set is.

    Attributes:
        classes: names, or None where they are the folders' names.
        places: default folders, the first one that exists counts.
        scan: class folder (root / name), class index -> training items, test items.
        hint: said when the folder is missing.
    """

    title: str
    classes: tuple[str, ...] | None
    places: tuple[str, ...]
    scan: Callable[[Path, int], tuple[list[Item], list[Item]]]
    hint: str = ""


class ImageFolder(Dataset[Sample]):
    """The images of some items at one size, their masks at that size too unless `mask_size` says another one."""

    def __init__(self, items: Sequence[Item], input_size: int, mask_size: int | None = None) -> None:
        self.items, self.input_size, self.mask_size = tuple(items), input_size, mask_size or input_size

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Sample:
        item, size = self.items[index], self.mask_size
        mask = torch.zeros(size, size, dtype=torch.bool) if item.mask_path is None else load_mask(item.mask_path, size)
        return Sample(
            image=load_image(item.path, self.input_size),
            mask=mask,
            label=item.label,
            class_index=item.class_index,
            path=str(item.path),
        )

    def without_masks(self) -> set[int]:
        """Classes that have defective images but no mask of any of them."""
        defective = {i.class_index for i in self.items if i.label}
        return defective - {i.class_index for i in self.items if i.mask_path is not None}


def collate(samples: Sequence[Sample]) -> Batch:
    """Samples as one batch."""
    return Batch(
        image=torch.stack([s.image for s in samples]),
        mask=torch.stack([s.mask for s in samples]),
        label=torch.tensor([s.label for s in samples]),
        class_index=torch.tensor([s.class_index for s in samples]),
        path=tuple(s.path for s in samples),
    )


def natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts 2.png before 10.png, the same on every machine; 1.png and 01.png are told apart by the second part."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder in natural order, hidden ones left out; none if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
    return sorted((p for p in found if p.is_file()), key=natural)


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder by name, hidden ones left out; none if there is no such folder."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((p for p in found if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name)


def find_mask(image: Path, folder: Path) -> Path:
    """The mask of an image: NAME_mask.png or NAME.png (or another image suffix) in `folder`.

    Raises:
        UsageError: there is none.
    """
    for stem in (f"{image.stem}_mask", image.stem):
        for suffix in (".png", *sorted(SUFFIXES)):
            for candidate in (folder / f"{stem}{suffix}", folder / f"{stem}{suffix.upper()}"):
                if candidate.is_file():
                    return candidate
    raise UsageError(f"{image}: no mask at {folder / (image.stem + '_mask.png')}")


def scan_mvtec(folder: Path, class_index: int, *, masks_optional: bool = False) -> tuple[list[Item], list[Item]]:
    """Training and test items of a class in MVTec layout.

    With `masks_optional` a class may have no ground_truth folder at all; a folder that lacks one mask is an error.

    Raises:
        UsageError: no train/good or test, no images in them, or a defect image without its mask.
    """
    train = [
        Item(path=p, mask_path=None, label=0, class_index=class_index, kind=GOOD)
        for p in image_files(folder / "train" / GOOD)
    ]
    if not train:
        raise UsageError(f"--data-path: {folder} lacks images in train/good")
    unmasked = masks_optional and not (folder / "ground_truth").is_dir()
    test = []
    for kind in subfolders(folder / "test"):
        for p in image_files(kind):
            good = kind.name == GOOD
            mask = None if good or unmasked else find_mask(p, folder / "ground_truth" / kind.name)
            test.append(Item(path=p, mask_path=mask, label=int(not good), class_index=class_index, kind=kind.name))
    if not test:
        raise UsageError(
            f"--data-path: {folder} lacks images in test (test/good and one folder for each kind of defect)"
        )
    return train, test


def scan_own(folder: Path, class_index: int) -> tuple[list[Item], list[Item]]:
    """A class of the user's own images: MVTec layout, masks as a whole optional."""
    return scan_mvtec(folder, class_index, masks_optional=True)


SPEC = DatasetSpec(title="folder", classes=None, places=("data/folder",), scan=scan_own)
