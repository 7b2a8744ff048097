"""Images anywhere, listed in a file: one row an image, as JSON lines or as a table of comma-separated values.

Columns: `path` and `mask` (relative to the file's folder), `split` (train, test, or calibration for normal images that
are not trained on), `label` (good or 0, or anything else for a kind of defect), `class` (one for all if there is none).
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets.folder import GOOD, DatasetSpec, Item, Scan
from datasets.walk import HELD_OUT, is_good
from default import UsageError

SPLITS = ("train", "test", *HELD_OUT)
NEEDED = ("path", "split", "label")
NORMAL = ("0", "0.0", "false")  # beside --good-names
BAD = ("1", "1.0", "true")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the file, `line` its number; empty texts where there is nothing."""

    line: int
    path: str
    split: str
    label: str
    mask: str
    of_class: str


def listing(root: Path, suffix: str) -> Path:
    """The file itself, or the only one of its kind in a folder.

    Raises:
        UsageError: none, or several.
    """
    if root.is_file():
        return root
    there = sorted(root.glob(f"*{suffix}"))
    if len(there) != 1:
        names = f"got {', '.join(p.name for p in there)}" if there else "there is none"
        raise UsageError(f"--data-path: expected a {suffix} file, or one in {root}, but {names}")
    return there[0]


def read_rows(path: Path) -> list[Row]:
    """All rows.

    Raises:
        UsageError: it cannot be read, lacks a column, or has a split that there is not.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        raw = parse_lines(text, path) if path.suffix.lower() == ".jsonl" else list(csv.DictReader(text.splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--data-path: {path}: cannot be read as a table ({error})") from error
    first = 1 if path.suffix.lower() == ".jsonl" else 2
    return [made_row(values, path, number) for number, values in enumerate(raw, first) if values]


def parse_lines(text: str, path: Path) -> list[dict[str, Any]]:
    """A dictionary of each line, an empty one of an empty line."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            values = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise UsageError(f"{path}: line {number}: is no JSON ({error})") from error
        if not isinstance(values, dict):
            raise UsageError(f"{path}: line {number}: expected an object with {', '.join(NEEDED)}")
        found.append(values)
    return found


def made_row(values: dict[str, Any], path: Path, line: int) -> Row:
    texts = {n: "" if values.get(n) is None else str(values[n]).strip() for n in (*NEEDED, "mask", "class")}
    lacking = [name for name in NEEDED if not texts[name]]
    if lacking:
        raise UsageError(f"{path}: line {line}: lacks {', '.join(lacking)}; expected path, split, label, mask, class")
    if texts["split"].lower() not in SPLITS:
        raise UsageError(f"{path}: line {line}: split {texts['split']!r}; choose from {', '.join(SPLITS)}")
    return Row(
        line=line, path=texts["path"], split=texts["split"].lower(), label=texts["label"], mask=texts["mask"],
        of_class=texts["class"],
    )  # fmt: skip


def class_of(row: Row, path: Path) -> str:
    return row.of_class or path.stem


def found(root: Path, *, suffix: str) -> tuple[str, ...]:
    """The classes in order of their first rows."""
    path = listing(root, suffix)
    return tuple(dict.fromkeys(class_of(row, path) for row in read_rows(path)))


def scan_rows(folder: Path, class_index: int, good_names: Sequence[str], *, suffix: str) -> Scan:
    """What the rows of a class list; defective images to train on are not used.

    Raises:
        UsageError: a file is missing, an image is listed twice, a class has no normal images to train on, or masks of
            some of its defective images only.
    """
    path = listing(folder.parent, suffix)
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    seen: dict[Path, int] = {}
    for row in read_rows(path):
        if class_of(row, path) != folder.name:
            continue
        item = item_of(row, path, class_index, good_names)
        if item.path in seen:
            raise UsageError(f"{path}: line {row.line}: {row.path} is listed in line {seen[item.path]}, too")
        seen[item.path] = row.line
        items[row.split].append(item)
    normal = [item for split in SPLITS if split != "test" for item in items[split] if not item.label]
    if not any(not item.held_out for item in normal):
        raise UsageError(f"--data-path: {path} lists no normal training images of {folder.name}")
    check_masks(items["test"], path)
    dropped = Counter(split for split in SPLITS if split != "test" for item in items[split] if item.label)
    return Scan(train=normal, test=items["test"], ignored={f"{split}/defective": n for split, n in dropped.items()})


def item_of(row: Row, path: Path, class_index: int, good_names: Sequence[str]) -> Item:
    """The image of a row.

    Raises:
        UsageError: it or its mask is missing.
    """
    place = path.parent / row.path
    mask = path.parent / row.mask if row.mask else None
    good = row.label.lower() in NORMAL or is_good(row.label, good_names)
    for file in (place, mask):
        if file is not None and not file.is_file():
            raise UsageError(f"{path}: line {row.line}: no such file: {file}")
    kind = GOOD if good else "bad" if row.label.lower() in BAD else row.label
    return Item(
        path=place, mask_path=None if good else mask, label=int(not good), class_index=class_index, kind=kind,
        name=Path(row.path).with_suffix("").as_posix().lstrip("./"), held_out=row.split in HELD_OUT,
    )  # fmt: skip


def check_masks(items: Sequence[Item], path: Path) -> None:
    """Raise `UsageError` if some defective images of a class have masks, and others have not."""
    bad = [item for item in items if item.label]
    without = [item for item in bad if item.mask_path is None]
    if without and len(without) < len(bad):
        raise UsageError(f"{path}: {without[0].path} is defective and has no mask, but others of its class have")


def spec_of(suffix: str) -> DatasetSpec:
    name = suffix.lstrip(".")
    return DatasetSpec(
        title=f"{name} list",
        classes=None,
        places=(f"data/{name}",),
        scan=partial(scan_rows, suffix=suffix),
        found=partial(found, suffix=suffix),
        layout=f"a {suffix} file with path, split, label, mask and class of each image",
        licence="yours",
        hint=f"; give the {suffix} file",
    )


JSONL, CSV = spec_of(".jsonl"), spec_of(".csv")
