"""The one walk through folders of images.

MVTec layout: CLASS/train/good/*, CLASS/test/KIND/*, CLASS/ground_truth/KIND/NAME_mask.png, and normal images that are
not trained on in CLASS/validation/good/* (MVTec AD 2, MVTec LOCO) or CLASS/calibration/good/*; each of these folders
may hold nested ones.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from PIL import Image

from datasets.folder import GOOD, DatasetSpec, Item, Scan
from datasets.masks import mask_files
from default import UsageError

# Pillow opens them, but they are documents, films, drawings, or stubs that need another program.
NO_PICTURES = ("BUFR", "EPS", "FLI", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF")
JUNK = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "icon\r")
HELD_OUT = ("calibration", "validation")  # folders of normal images that are not trained on
Tree = dict[tuple[str, ...], dict[str, list[Path]]]  # folder below ground_truth -> stem -> files


@cache
def suffixes() -> frozenset[str]:
    """Suffixes of the files that are read as images, in lower case: all pictures that Pillow opens."""
    known = Image.registered_extensions()
    return frozenset(s for s, kind in known.items() if kind in Image.OPEN and kind not in NO_PICTURES)


def is_image(path: Path) -> bool:
    return path.suffix.lower() in suffixes()


def natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Sorts 2.png before 10.png, the same on every machine; 1.png and 01.png are told apart by the second part."""
    parts = re.split(r"(\d+)", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name


def entries(folder: Path) -> list[Path]:
    """What lies in a folder in natural order, without hidden files and what file managers leave behind."""
    if not folder.is_dir():
        return []
    found = [p for p in folder.iterdir() if not p.name.startswith(".") and p.name.lower() not in JUNK]
    return sorted(found, key=natural)


def is_filled(folder: Path) -> bool:
    """Whether there is such a folder with something in it."""
    return folder.is_dir() and any(folder.iterdir())


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder by name, hidden ones left out; none if there is no such folder."""
    return sorted((p for p in entries(folder) if p.is_dir()), key=lambda p: p.name)


def walk(folder: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """The files in a folder and below it, each folder's before those of its subfolders; a link that leads to a folder
    that was seen, or to one around the first, is not followed."""
    place = folder.resolve()
    if seen is None:
        seen = set(place.parents)
    if place in seen:
        return
    seen.add(place)
    found = entries(folder)
    yield from (p for p in found if p.is_file())
    for inner in (p for p in found if p.is_dir()):
        yield from walk(inner, seen)


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and below it; none if there is no such folder."""
    return [p for p in walk(folder) if is_image(p)]


def spelled(name: str) -> str:
    """What is the same in names of folders: Defect-Free, defect free, defect_free."""
    return re.sub(r"[\s-]+", "_", name.casefold())


def is_good(name: str, good_names: Sequence[str]) -> bool:
    return spelled(name) in {spelled(good) for good in good_names}


def mask_tree(folder: Path) -> Tree:
    """The image files below ground_truth."""
    tree: Tree = {}
    for path in image_files(folder):
        place = path.parent.relative_to(folder).parts
        tree.setdefault((*(p.casefold() for p in place[:1]), *place[1:]), {}).setdefault(path.stem, []).append(path)
    return tree


def find_mask(image: Path, kind: Path, truth: Path, tree: Tree) -> Path:
    """The mask of an image: NAME_mask.png or NAME.png (or another suffix) in the folder of its kind below `truth`, or
    in the same nested folder as the image's.

    Raises:
        UsageError: there is none.
    """
    nested = image.parent.relative_to(kind).parts
    own = kind.name.casefold()
    for place in ((own, *nested), (own,)):
        for stem in (f"{image.stem}_mask", image.stem):
            found = tree.get(place, {}).get(stem)
            if found:
                return min(found, key=lambda p: (p.suffix.lower() != ".png", p.suffix))
    raise UsageError(f"{image}: no mask at {truth.joinpath(kind.name, *nested) / (image.stem + '_mask.png')}")


def mask_folder(image: Path, kind: Path, truth: Path, tree: Tree) -> Path:
    """The folder of an image's masks, one a region: truth/KIND/NAME/000.png, 001.png, ...

    Raises:
        UsageError: there is none, or it is empty.
    """
    place = truth / kind.name / image.stem
    if not tree.get((kind.name.casefold(), image.stem)):
        raise UsageError(f"{image}: no masks in {place}")
    return place


def scan_mvtec(
    folder: Path,
    class_index: int,
    good_names: Sequence[str],
    *,
    masks_optional: bool = False,
    test_name: str = "test",
    truth_name: str = "ground_truth",
    mask_of: Callable[[Path, Path, Path, Tree], Path] = find_mask,
) -> Scan:
    """What a class in MVTec layout holds, or in one with other names of folders and another place of masks.

    With `masks_optional` a class may have no ground_truth folder at all (a folder that lacks one mask is an error), no
    test images, and its good images without a train folder around them.

    Raises:
        UsageError: no training images, no test images where there must be some, or a defective image without its mask.
    """
    train, test = normal_items(folder / "train", class_index, good_names), []
    if masks_optional and not (folder / "train").is_dir():
        train = loose_items(folder, class_index, good_names)
    if not train:
        there = ", ".join(kind.name for kind in subfolders(folder / "train"))
        held = f"; train holds {there}, and --good-names says what is good" if there else ""
        raise UsageError(f"--data-path: {folder} lacks images in train/{good_names[0]}{held}")
    for place in HELD_OUT:
        train += [replace(item, held_out=True) for item in normal_items(folder / place, class_index, good_names)]
    truth = folder / truth_name
    tree = mask_tree(truth)
    unmasked = masks_optional and not truth.is_dir()
    for kind in subfolders(folder / test_name):
        if kind == truth:
            continue
        good = is_good(kind.name, good_names)
        for p in image_files(kind):
            mask = None if good or unmasked else mask_of(p, kind, truth, tree)
            test.append(made_item(p, kind, mask, int(not good), class_index))
    if not test and not masks_optional:
        raise UsageError(
            f"--data-path: {folder} lacks images in {test_name} "
            f"({test_name}/{GOOD} and one folder for each kind of defect)"
        )
    return Scan(train=train, test=test, ignored=unused(folder, [*train, *test]))


def normal_items(folder: Path, class_index: int, good_names: Sequence[str]) -> list[Item]:
    """The images in the good ones of a folder's folders."""
    kinds = [kind for kind in subfolders(folder) if is_good(kind.name, good_names)]
    return [made_item(p, kind, None, 0, class_index) for kind in kinds for p in image_files(kind)]


def loose_items(folder: Path, class_index: int, good_names: Sequence[str]) -> list[Item]:
    """The good images of a class without a train folder: those in CLASS/good, else those that lie in CLASS itself."""
    loose = [replace(made_item(p, folder, None, 0, class_index), kind=GOOD) for p in loose_images(folder)]
    return normal_items(folder, class_index, good_names) or loose


def loose_images(folder: Path) -> list[Path]:
    """The images that lie in a folder itself."""
    return [p for p in entries(folder) if is_image(p) and p.is_file()]


def own_classes(root: Path, good_names: Sequence[str]) -> dict[str, Path]:
    """The classes of a user's own images and their folders: those with a train folder; without any, `root` itself if it
    holds train, test, a good folder or images; else the folders with images in them.

    Raises:
        UsageError: images lie beside folders that may be classes.
    """
    folders = subfolders(root)
    trained = {p.name: p for p in folders if (p / "train").is_dir()}
    if trained:
        return trained
    names = {p.name.casefold() for p in folders}
    whole = bool(names & {"train", "test"}) or any(is_good(name, good_names) for name in names)
    others = {p.name: p for p in folders if image_files(p)}
    loose = loose_images(root)
    if loose and others and not whole:
        raise UsageError(
            f"--data-path: {root} holds both images ({loose[0].name}) and folders of them ({', '.join(others)}); "
            "expected one folder of good images, or one for each class"
        )
    return {root.resolve().name: root} if whole or loose else others


def made_item(path: Path, kind: Path, mask: Path | None, label: int, class_index: int) -> Item:
    name = path.relative_to(kind).with_suffix("").as_posix()
    return Item(path=path, mask_path=mask, label=label, class_index=class_index, kind=kind.name, name=name)


def unused(folder: Path, items: Sequence[Item]) -> dict[str, int]:
    """How many files of a class are neither image nor mask of the items: others by suffix, images by their folder."""
    masks = {path for item in items if item.mask_path for path in mask_files(item.mask_path)}
    used = masks | {item.path for item in items}
    left = Counter(sort_of(p, folder) for p in walk(folder) if p not in used)
    return dict(sorted(left.items(), key=lambda pair: (-pair[1], pair[0])))


def sort_of(path: Path, folder: Path) -> str:
    """The suffix of a file that is no image; the folder, down to the kind, of one that is."""
    if not is_image(path):
        return path.suffix.lower() or "no suffix"
    return "/".join(path.parent.relative_to(folder).parts[:2]) or path.suffix.lower()


def scan_own(folder: Path, class_index: int, good_names: Sequence[str]) -> Scan:
    """A class of the user's own images: MVTec layout, masks and test images optional, or good images alone."""
    return scan_mvtec(folder, class_index, good_names, masks_optional=True)


SPEC = DatasetSpec(title="folder", classes=None, places=("data/folder",), scan=scan_own)
