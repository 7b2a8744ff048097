"""What is in a data set: every file looked at, the official counts compared, the same image found twice; no model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from datasets import SPECS, resolve_classes, resolve_root, scan_classes
from datasets.checks import check_item, check_shared
from datasets.decode import read_pixels
from datasets.duplicates import equal, near
from datasets.folder import DatasetSpec, Item
from datasets.masks import mask_files, read_marks
from datasets.pixels import Pixels, read_header
from datasets.reading import Reading, decide
from default import Config, DataConfig, UsageError
from utils.run.text import printable
from utils.run.threads import in_threads

SHOWN = 3  # files and groups of a kind that a line names
NO_HASHES = 'near-duplicates: not looked for, that needs the package imagehash: pip install -e ".[inspect]"'


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one image is: `size` WIDTHxHEIGHT, Pillow's `mode`, bits of a channel, format, a digest of the bytes, a
    perceptual hash (None without imagehash), and which share of its mask is marked (None without one)."""

    item: Item
    training: bool
    size: str
    mode: str
    depth: str
    format: str
    digest: bytes
    look: int | None
    area: float | None


@dataclass(frozen=True, kw_only=True)
class ClassFacts:
    """What a class is: numbers, how often there is what, and lines of what is wrong and of what is to be known."""

    name: str
    counts: dict[str, int] = field(default_factory=dict)
    official: dict[str, int] | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    masks: int = 0
    defect_area: dict[str, float] | None = None
    ignored: dict[str, int] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)
    duplicates: dict[str, list[list[str]]] = field(default_factory=dict)
    near_duplicates: dict[str, list[list[str]]] | None = None
    wrong: list[str] = field(default_factory=list)


def run_inspect(config: Config) -> int:
    """Look at all classes that --class-names asks for and say what is there; the status, 1 if something is wrong.

    Raises:
        UsageError: no such folder or class.
    """
    data = config.data
    spec, hashes = SPECS[data.dataset], image_hashes()
    quiet = contextlib.redirect_stdout(sys.stderr) if config.run.json else contextlib.nullcontext()
    with quiet:
        names = resolve_classes(replace(data, multi_class=False))  # which no model is trained on together here
        found = [inspect_class(data, name, hashes) for name in names]
    whole = total_faults(found, spec)
    wrong = len(whole) + sum(len(facts.wrong) for facts in found)
    if config.run.json:
        content = {
            "dataset": data.dataset, "licence": spec.licence, "citation": spec.citation,
            "root": str(resolve_root(data)), "classes": [asdict(f) for f in found], "total": whole,
            "near_duplicates_looked_for": hashes is not None, "wrong": wrong,
        }  # fmt: skip
        print(json.dumps(content, indent=2))
        return int(wrong > 0)
    if spec.citation:
        print(printable(f"{spec.title}: {spec.citation}; licence: {spec.licence}"))
    for facts in found:
        print(printable("\n".join(lines_of(facts))))
    for line in whole:
        print(f"wrong: all classes together: {line}")
    if hashes is None:
        print(NO_HASHES)
    print(f"{len(found)} classes: {'nothing is wrong' if not wrong else f'{wrong} things are wrong'}")
    return int(wrong > 0)


def image_hashes() -> ModuleType | None:
    """The package that makes perceptual hashes, None without it."""
    try:
        import imagehash
    except ImportError:
        return None
    return imagehash


def inspect_class(data: DataConfig, name: str, hashes: ModuleType | None) -> ClassFacts:
    """Look at every file of a class; nothing that is wrong with them is an error here."""
    known = SPECS[data.dataset].counts.get(name)
    official = None if known is None else asdict(known)
    try:
        scan = scan_classes(data, (name,))[name]
    except UsageError as error:
        return ClassFacts(name=name, official=official, wrong=[str(error)])
    items = [*scan.train, *scan.test]
    looked = in_threads(
        lambda n: attempt(lambda: facts_of(items[n], n < len(scan.train), data, hashes)), range(len(items))
    )
    facts = [found for found in looked if isinstance(found, Facts)]
    unreadable = [str(found) for found in looked if isinstance(found, UsageError)]
    same = by_part([[facts[n] for n in group] for group in equal([f.digest for f in facts])])
    similar = None if hashes is None else by_part([[facts[n] for n in group] for group in alike(facts)])
    areas = sorted(f.area for f in facts if f.area is not None)
    wrong = [*unreadable, *count_faults(asdict(scan.counts), official)]
    wrong += check_faults([f.item for f in facts], data)
    wrong += [f"the same image in training and test: {said(group)}" for group in same.get("across", [])]
    wrong += [f"the same image as good and defective: {said(group)}" for group in contradictions(facts)]
    return ClassFacts(
        name=name, counts=asdict(scan.counts), official=official,
        sizes=tally(f.size for f in facts), modes=tally(f.mode for f in facts), depths=tally(f.depth for f in facts),
        formats=tally(f.format for f in facts), masks=len(areas),
        defect_area={"least": areas[0], "median": areas[len(areas) // 2], "most": areas[-1]} if areas else None,
        ignored=dict(scan.ignored), unreadable=unreadable, duplicates=same, near_duplicates=similar, wrong=wrong,
    )  # fmt: skip


def attempt(work: Callable[[], Any]) -> Any:
    """What `work` gives, or its `UsageError`."""
    try:
        return work()
    except UsageError as error:
        return error


def facts_of(item: Item, training: bool, data: DataConfig, hashes: ModuleType | None) -> Facts:
    """Decode an image and its mask.

    Raises:
        UsageError: one of them cannot be read.
    """
    header, pixels = read_header(item.path, data.max_pixels), read_pixels(item.path, data.max_pixels)
    look = None if hashes is None else int(str(hashes.phash(grey(pixels))), 16)
    marks = None if item.mask_path is None else read_marks(item.mask_path, data.max_pixels)
    width, height = pixels.size
    return Facts(
        item=item, training=training, size=f"{width}x{height}", mode=mode_of(pixels), depth=depth_of(pixels),
        format=header.format, digest=hashlib.sha256(item.path.read_bytes()).digest(), look=look,
        area=None if marks is None else float(marks.mean()),
    )  # fmt: skip


def grey(pixels: Pixels) -> Image.Image:
    """An image as 8-bit grey: of deep ones between their lowest and highest value."""
    if pixels.image is not None:
        return pixels.image.convert("L")
    assert pixels.values is not None
    values = np.nan_to_num(pixels.values.astype(np.float64).mean(2))
    low, high = values.min(), values.max()
    return Image.fromarray(((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8))


def mode_of(pixels: Pixels) -> str:
    """Pillow's mode, or channels of a deep image."""
    if pixels.image is not None:
        return pixels.image.mode
    assert pixels.values is not None
    return ("grey" if pixels.values.shape[2] == 1 else "RGB") + (" with alpha" if pixels.alpha is not None else "")


def depth_of(pixels: Pixels) -> str:
    """Bits of a channel as stored."""
    if pixels.values is None:
        return "1 bit" if pixels.image is not None and pixels.image.mode == "1" else "8 bits"
    kind = pixels.values.dtype
    return f"{kind.itemsize * 8} bits{' floating-point' if kind.kind == 'f' else ''}"


def tally(values: Iterable[str]) -> dict[str, int]:
    """How often there is each, the most frequent first."""
    return dict(Counter(values).most_common())


def count_faults(found: dict[str, int], official: dict[str, int] | None) -> list[str]:
    """Where numbers differ from the official ones; missing and surplus images in words."""
    words = {"train": "training", "held_out": "held-out", "good": "good test", "bad": "defective test"}
    return [
        f"{found[n]} {words[n]} images, but the official copy has {official[n]} ({found[n] - official[n]:+d})"
        for n in words
        if official is not None and found[n] != official[n]
    ]


def total_faults(found: Sequence[ClassFacts], spec: DatasetSpec) -> list[str]:
    """Where the numbers of all classes together differ from the official ones; nothing of some of the classes."""
    if spec.total is None or len(found) != len(spec.classes or ()):
        return []
    official = asdict(spec.total)
    return count_faults({name: sum(facts.counts.get(name, 0) for facts in found) for name in official}, official)


def check_faults(items: Sequence[Item], data: DataConfig) -> list[str]:
    """What a training would refuse: masks that cannot be right, values beyond the class's range."""
    reading = attempt(lambda: decide([item.path for item in items if not item.label], data))
    if isinstance(reading, UsageError):
        return [str(reading)]
    if SPECS[data.dataset].trusts_masks or data.trust_masks:
        return mask_faults(items, data)
    shared = attempt(lambda: check_shared([item for item in items if item.mask_path is not None]))
    return [*([str(shared)] if shared else []), *mask_faults(items, data, reading)]


def mask_faults(items: Sequence[Item], data: DataConfig, reading: Reading | None = None) -> list[str]:
    """What is wrong with single images; with their masks, too, where there is a `reading`: masks that are trusted must
    only have their image's size."""

    def fault(item: Item) -> UsageError | None:
        if reading is not None:
            return attempt(lambda: check_item(item, reading, data))
        sizes = {read_header(path).size for path in (mask_files(item.mask_path) if item.mask_path else ())}
        wrong = sizes - {read_header(item.path, data.max_pixels).size}
        return UsageError(f"{item.mask_path}: has another size than its image") if wrong else None

    return [str(found) for found in in_threads(fault, items) if found is not None]


def by_part(groups: Sequence[Sequence[Facts]]) -> dict[str, list[list[str]]]:
    """Names of files that are alike: those in training, those in test, and groups that reach across."""
    found: dict[str, list[list[str]]] = {}
    for group in groups:
        sides = {f.training for f in group}
        part = "across" if len(sides) == 2 else "train" if True in sides else "test"
        found.setdefault(part, []).append([str(f.item.path) for f in group])
    return found


def alike(facts: Sequence[Facts]) -> list[list[int]]:
    """Numbers of images that look alike, those with the same bytes only once."""
    once = list({f.digest: n for n, f in enumerate(facts)}.values())
    hashes = [facts[n].look or 0 for n in once]
    return [[once[n] for n in group] for group in near(hashes)]


def contradictions(facts: Sequence[Facts]) -> list[list[str]]:
    """Files with the same bytes, of which some are good and others defective."""
    groups = [[facts[n] for n in group] for group in equal([f.digest for f in facts])]
    return [[str(f.item.path) for f in group] for group in groups if len({f.item.label for f in group}) == 2]


def said(names: Sequence[str]) -> str:
    """Some of them, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return " = ".join(names[:SHOWN]) + more


def lines_of(facts: ClassFacts) -> list[str]:
    """What people read of a class."""
    counts = ", ".join(f"{name} {n}" for name, n in facts.counts.items())
    lines = [f"{facts.name}: {counts}" if counts else f"{facts.name}:"]
    for name in ("sizes", "modes", "depths", "formats", "ignored"):
        values = getattr(facts, name)
        if values:
            lines.append(f"  {name}: " + ", ".join(f"{value} ({n})" for value, n in values.items()))
    if area := facts.defect_area:
        shares = ", ".join(f"{word} {share:.3%}" for word, share in area.items())
        lines.append(f"  masks: {facts.masks}, marked {shares}")
    for word, found in (("same bytes", facts.duplicates), ("near-duplicates", facts.near_duplicates or {})):
        for part, groups in found.items():
            where = "in training and test" if part == "across" else f"within {part}"
            lines.append(f"  {word} {where}: {len(groups)} groups, as {said(groups[0])}")
    if facts.official is not None and facts.official == facts.counts:
        lines.append("  as many images as the official copy")
    return [*lines, *(f"  wrong: {line}" for line in facts.wrong)]
