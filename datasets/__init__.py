"""Data sets by name: which classes they have, where they lie, how they are read."""

from __future__ import annotations

from pathlib import Path

from datasets import folder, mvtec, sample, visa
from datasets.folder import DatasetSpec, ImageFolder, Item
from default import DataConfig, UsageError

CALIBRATION = 16  # training images per class that calibrate where none are held out
SPECS: dict[str, DatasetSpec] = {
    "mvtec": mvtec.SPEC, "visa": visa.SPEC, "folder": folder.SPEC, "sample": sample.SPEC,
}  # fmt: skip


def resolve_root(data: DataConfig) -> Path:
    """The data set's folder; the built-in sample is made there on first use.

    Raises:
        UsageError: there is no such folder, or it is empty.
    """
    spec = SPECS[data.dataset]
    places = [Path(place) for place in (spec.places if data.data_path is None else (data.data_path,))]
    root = next((place for place in places if place.is_dir() and any(place.iterdir())), places[0])
    if data.dataset == "sample":
        sample.make_sample(root)
    if not root.is_dir():
        raise UsageError(f"--data-path: no such folder: {root}{spec.hint}")
    if not any(root.iterdir()):
        raise UsageError(f"--data-path: {root} is empty{spec.hint}")
    return root


def resolve_classes(data: DataConfig) -> tuple[str, ...]:
    """The classes that --class-names asks for, in the data set's order.

    Raises:
        UsageError: a class that the data set does not have, or no classes in the folder.
    """
    spec, root = SPECS[data.dataset], resolve_root(data)
    known = spec.classes or tuple(p.name for p in folder.subfolders(root) if (p / "train").is_dir())
    if not known:
        raise UsageError(f"--data-path: no folder in {root} has a train folder; expected {root}/CLASS/train/good")
    for name in data.class_names:
        if name not in ("all", *known):
            article = "an" if spec.title[0] in "AEIOM" else "a"
            kind = f"{article} {spec.title} class" if spec.classes else f"a class in {root}"
            raise UsageError(f"--class-names: {name!r} is not {kind}; choose from all, {', '.join(known)}")
    return known if "all" in data.class_names else tuple(name for name in known if name in data.class_names)


def build_datasets(
    data: DataConfig, class_names: tuple[str, ...], mask_size: int | None = None
) -> tuple[ImageFolder, ImageFolder]:
    """Training and test images of the classes, in deterministic order; the latter with masks at `mask_size`.

    Raises:
        UsageError: a class's folder is missing or incomplete.
    """
    root, train, test = resolve_root(data), [], []
    for index, name in enumerate(class_names):
        if not (root / name).is_dir():
            raise UsageError(f"--data-path: no folder of the class {name!r} in {root}")
        found = SPECS[data.dataset].scan(root / name, index)
        train += limited(found[0], data.limit)
        test += limited(found[1], data.limit)
    return ImageFolder(train, data.input_size), ImageFolder(test, data.input_size, mask_size)


def evenly_spread(dataset: ImageFolder, share: float = 0.0) -> tuple[int, ...]:
    """Numbers of some images of each class at equal distances: a `share` of them, one at least; without a share at
    most `CALIBRATION`."""
    chosen: list[int] = []
    for index in sorted({item.class_index for item in dataset.items}):
        numbers = [n for n, item in enumerate(dataset.items) if item.class_index == index]
        count = max(round(share * len(numbers)), 1) if share else min(CALIBRATION, len(numbers))
        chosen += [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]
    return tuple(chosen)


def split_holdout(train: ImageFolder, share: float) -> tuple[ImageFolder, ImageFolder]:
    """Training images, and a `share` of each class (one at least) at equal distances that is kept out of training.

    Without a share: all images, and for calibration some of them, at most `CALIBRATION` of each class.
    """
    chosen = set(evenly_spread(train, share))
    held = [item for n, item in enumerate(train.items) if n in chosen]
    kept = [item for n, item in enumerate(train.items) if n not in chosen] if share else list(train.items)
    if not kept:
        raise UsageError(f"--holdout: {share} of the training images leaves none to train on")
    return ImageFolder(kept, train.input_size), ImageFolder(held, train.input_size)


def limited(items: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` items of each kind, the first ones."""
    kept: dict[str, list[Item]] = {}
    for item in items:
        kept.setdefault(item.kind, []).append(item)
    return [item for group in kept.values() for item in group[:limit]]
