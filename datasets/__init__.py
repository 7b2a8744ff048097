"""Data sets by name: which classes they have, where they lie, how they are read."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from datasets import (
    autovi,
    btad,
    cifar10,
    kolektor,
    loco,
    manifest,
    mpdd,
    mvtec,
    mvtec_3d,
    mvtec_ad_2,
    real_iad,
    sample,
    vad,
    visa,
    walk,
)
from datasets.checks import check_items
from datasets.folder import DatasetSpec, ImageFolder, Item, Protocol, Scan
from datasets.geometry import Geometry
from datasets.reading import Reading, check_flags, decide
from default import DataConfig, UsageError
from utils.run.text import one_line

CALIBRATION = 16  # training images per class that calibrate where none are held out
DEFAULT_LAYOUT = "{}/CLASS/train/good, or good images alone"
SPECS: dict[str, DatasetSpec] = {
    "mvtec": mvtec.SPEC, "visa": visa.SPEC, "folder": walk.SPEC, "sample": sample.SPEC,
    "visa-fewshot": visa.FEWSHOT, "visa-highshot": visa.HIGHSHOT, "btad": btad.SPEC, "mpdd": mpdd.SPEC,
    "mvtec-ad-2": mvtec_ad_2.SPEC, "mvtec-loco": loco.SPEC, "mvtec-3d": mvtec_3d.SPEC, "real-iad": real_iad.SPEC,
    "ksdd2": kolektor.SECOND, "kolektorsdd": kolektor.FIRST, "cifar10": cifar10.SPEC, "autovi": autovi.SPEC,
    "vad": vad.SPEC, "jsonl": manifest.JSONL, "csv": manifest.CSV, "real-iad-sv": real_iad.SINGLE_VIEW,
    **{f"real-iad-noise-{share}": spec for share, spec in zip(real_iad.NOISE, real_iad.NOISY, strict=True)},
}  # fmt: skip


def resolve_root(data: DataConfig) -> Path:
    """The data set's folder (its file, where it is one); what is made on first use is made there.

    Raises:
        UsageError: there is no such folder, or it is empty.
    """
    spec = SPECS[data.dataset]
    places = [Path(place) for place in (spec.places if data.data_path is None else (data.data_path,))]
    root = next((place for place in places if place.is_file() or walk.is_filled(place)), places[0])
    if data.dataset == "sample":
        sample.make_sample(root)
    if not root.is_dir() and not (root.is_file() and spec.found):
        raise UsageError(f"--data-path: no such folder: {root}{spec.hint}")
    if root.is_dir() and not walk.is_filled(root):
        raise UsageError(f"--data-path: {root} is empty{spec.hint}")
    root = next((root / inner for inner in spec.inner if (root / inner).is_dir()), root)
    if spec.prepare:
        spec.prepare(root)
    return root


def resolve_classes(data: DataConfig) -> tuple[str, ...]:
    """The classes that --class-names asks for, in the data set's order.

    Raises:
        UsageError: a class that the data set does not have, or no classes in the folder.
    """
    spec, root = SPECS[data.dataset], resolve_root(data)
    known = spec.classes or tuple(spec.found(root) if spec.found else walk.own_classes(root, data.good_names))
    if not known:
        raise UsageError(f"--data-path: no images in {root}; expected {spec.layout or DEFAULT_LAYOUT.format(root)}")
    for name in data.class_names:
        if name not in ("all", *known):
            article = "an" if spec.title[0] in "AEIOM" else "a"
            kind = f"{article} {spec.title} class" if spec.classes else f"a class in {root}"
            raise UsageError(f"--class-names: {name!r} is not {kind}; choose from all, {', '.join(known)}")
    asked = known if "all" in data.class_names else tuple(name for name in known if name in data.class_names)
    if spec.overlapping and data.multi_class and len(asked) > 1:
        raise UsageError(
            f"--multi-class: {', '.join(asked)} of {spec.title} are splits of the same images, and a model of one "
            "would be trained on the other's test images; leave it out, or choose one with --class-names"
        )
    return asked


def class_folder(data: DataConfig, name: str) -> Path:
    """Where a class of the data set lies, or would; the root / NAME also where classes are no folders."""
    return class_folders(data, (name,))[name]


def class_folders(data: DataConfig, names: Sequence[str]) -> dict[str, Path]:
    """As `class_folder`, of several classes: the root is looked at once."""
    spec, root = SPECS[data.dataset], resolve_root(data)
    own = {} if spec.classes or spec.found else walk.own_classes(root, data.good_names)
    return {name: own.get(name, root / name) for name in names}


def those_there(data: DataConfig, names: Sequence[str]) -> set[str]:
    """Those of some classes that the data set holds."""
    found = SPECS[data.dataset].found
    if found is not None:
        return set(names) & set(found(resolve_root(data)))
    return {name for name, folder in class_folders(data, names).items() if folder.is_dir()}


def present_classes(data: DataConfig, class_names: Sequence[str]) -> tuple[str, ...]:
    """Those of a model's classes that the data set holds; a line says so if it does not hold all of them."""
    root, known = resolve_root(data), those_there(data, class_names)
    there = tuple(name for name in class_names if name in known)
    if len(there) < len(class_names):
        names = ", ".join(there) or "none"
        print(one_line(f"{root} holds {len(there)} of the model's {len(class_names)} classes: {names}"))
    return there


def build_datasets(
    data: DataConfig,
    class_names: tuple[str, ...],
    mask_size: int | None = None,
    readings: Mapping[str, Reading] | None = None,
) -> tuple[ImageFolder, ImageFolder]:
    """Normal images (see `split_holdout`) and test images of the classes, in deterministic order.

    The latter have masks at `mask_size`.

    Everything that can be known of images and masks beforehand is checked, and lines say what there is. `readings`
    say by class how a model reads its images; without them that is decided from the training images.

    Raises:
        UsageError: a class's folder is missing or incomplete, or an image or mask cannot be read.
    """
    scans = scan_classes(data, class_names)
    for name, scan in scans.items():
        announce(name, scan)
    settled = [settle(name, scan, data, readings) for name, scan in scans.items()]
    tell_readings(dict(zip(scans, settled, strict=True)))
    train, test = [], []
    checked = replace(data, trust_masks=data.trust_masks or SPECS[data.dataset].trusts_masks)
    for scan, reading in zip(scans.values(), settled, strict=True):
        parts = limited(scan.train, data.limit), limited(scan.test, data.limit)
        check_items([*parts[0], *parts[1]], reading, checked)
        train += parts[0]
        test += parts[1]
    for protocol in protocols(data, class_names, test).values():
        protocol.check()
    made = ImageFolder(train, Geometry.of(data), None, settled, data.max_pixels)
    return made, made.having(test, mask_size)


def unlabelled(data: DataConfig) -> dict[str, list[Path]]:
    """The images that lie in `test` itself, by class, of classes that have any; of a user's own images alone."""
    if SPECS[data.dataset].classes or SPECS[data.dataset].found:
        return {}
    folders = class_folders(data, resolve_classes(data))
    found = {name: walk.loose_images(folder / "test") for name, folder in folders.items()}
    return {name: paths for name, paths in found.items() if paths}


def scan_classes(data: DataConfig, class_names: Sequence[str]) -> dict[str, Scan]:
    """What the folder of each class holds.

    Raises:
        UsageError: there is none, or it is incomplete.
    """
    spec, scans, there = SPECS[data.dataset], {}, those_there(data, class_names)
    folders = class_folders(data, class_names)
    expected = f"; expected {spec.layout}" if spec.layout else ""
    for index, name in enumerate(class_names):
        if name not in there:
            raise UsageError(f"--data-path: no folder of the class {name!r} in {resolve_root(data)}{expected}")
        try:
            scans[name] = spec.scan(folders[name], index, data.good_names)
        except UsageError as error:
            if not str(error).startswith("--data-path"):  # of a single file, not of the tree
                raise
            raise UsageError(f"{error}{expected}") from error
    return scans


def protocols(data: DataConfig, class_names: Sequence[str], items: Sequence[Item]) -> dict[str, Protocol]:
    """The metrics of its own that the data set asks for, by class; empty for most."""
    make = SPECS[data.dataset].protocol
    if make is None:
        return {}
    made = {n: make([item for item in items if item.class_index == i]) for i, n in enumerate(class_names)}
    return {name: protocol for name, protocol in made.items() if protocol is not None}


def settle(name: str, scan: Scan, data: DataConfig, readings: Mapping[str, Reading] | None) -> Reading:
    """How the images of a class are read."""
    if readings is None:
        return decide([item.path for item in scan.train], data)
    check_flags(name, readings[name], data)
    return readings[name]


def announce(name: str, scan: Scan) -> None:
    """What there is of a class, and loudly what there is not."""
    print(one_line(scan.line(name)))
    if not scan.test:
        count = scan.ignored.get("test", 0)
        more = f"; its {count} images in test/ have no labels" if count else ""
        print(one_line(f"warning: {name} has no test images: it is not evaluated{more}"), file=sys.stderr)
        return
    labels = {item.label for item in scan.test}
    for label, kind, lost in ((0, "good", "metrics that compare with them"), (1, "defective", "nearly all metrics")):
        if label not in labels:
            line = f"warning: {name} has no {kind} test images: {lost} are not defined for it and left out of the mean"
            print(one_line(line), file=sys.stderr)


def tell_readings(readings: Mapping[str, Reading]) -> None:
    """One line for all classes that are read alike and otherwise than plain."""
    for reading in dict.fromkeys(readings.values()):
        names = [name for name, own in readings.items() if own == reading]
        whose = "all classes" if 1 < len(names) == len(readings) else ", ".join(names)
        if str(reading):
            print(one_line(f"{whose}: {reading}"))


def evenly_spread(dataset: ImageFolder, share: float = 0.0, seed: int | None = None) -> tuple[int, ...]:
    """Numbers of some images of each class at equal distances, with a seed random ones: a `share` of them, one at
    least, but never all; without a share at most `CALIBRATION`."""
    by_class: dict[int, list[int]] = {}
    for number, item in enumerate(dataset.items):
        by_class.setdefault(item.class_index, []).append(number)
    chosen: list[int] = []
    shuffle = random.Random(seed).shuffle if seed is not None else None
    for _, numbers in sorted(by_class.items()):
        part = min(max(round(share * len(numbers)), 1), len(numbers) - 1)
        count = part if share else min(CALIBRATION, len(numbers))
        if shuffle is not None:
            shuffle(numbers)
        chosen += [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]
    return tuple(chosen)


def split_holdout(normal: ImageFolder, share: float, seed: int | None = None) -> tuple[ImageFolder, ImageFolder]:
    """Of normal images those to train on, and those that calibrate.

    A class that brings images of its own for that (`Item.held_out`) is calibrated with them, and trained on all others.
    Of another class a `share` (see `evenly_spread`) is kept out of training; without a share, or where that is none at
    all, all are trained on, and some of them, at most `CALIBRATION`, calibrate, too.

    Raises:
        UsageError: nothing is left to train on.
    """
    items = normal.items
    own = {item.class_index for item in items if item.held_out}
    others = [number for number, item in enumerate(items) if item.class_index not in own]
    spread = evenly_spread(normal.having([items[number] for number in others]), share, seed)
    chosen = {others[place] for place in spread}
    out = [item for number, item in enumerate(items) if item.held_out or number in chosen]
    if share and not out:
        return split_holdout(normal, 0.0)
    kept = [item for number, item in enumerate(items) if not (item.held_out or (share and number in chosen))]
    if not kept:
        raise UsageError(f"--holdout: {share} of the training images leaves none to train on")
    return normal.having(kept), normal.having(out)


def are_unseen(kept: ImageFolder, calibrating: ImageFolder) -> bool:
    """Whether none of the images that calibrate is trained on."""
    return not {*kept.items} & {*calibrating.items}


def limited(items: list[Item], limit: int | None) -> list[Item]:
    """At most `limit` items of each kind, the first ones; those that are held out count for themselves."""
    kept: dict[tuple[str, bool], list[Item]] = {}
    for item in items:
        kept.setdefault((item.kind, item.held_out), []).append(item)
    return [item for group in kept.values() for item in group[:limit]]
