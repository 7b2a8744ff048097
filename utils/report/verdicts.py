"""One row for each image: scores.csv of an evaluation, scores.csv and scores.jsonl of a prediction."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from default import UsageError
from utils.report.images import ImageResult
from utils.report.tables import csv_cell, csv_text, write_all
from utils.run.text import printable
from utils.run.writer import write_whole

TESTED = ("class", "label", "score", "p_value", "threshold", "verdict", "hit", "concept")
PREDICTED = (
    "path", "score", "p_value", "threshold", "verdict", "concept", "peak_x", "peak_y", "peak_value", "regions",
    "seconds", "error",
)  # fmt: skip
WORDS = {None: None, True: "defect", False: "good"}


def write_scores(folder: Path, images: Iterable[ImageResult]) -> None:
    """Write scores.csv: the test images with what was said of them; `hit` is 1 if the map's peak lies in the mask."""
    rows = [(image.path, tested_row(image)) for image in images]
    write_all(folder, "scores", {"csv": csv_text(rows, TESTED, first="path")})


def tested_row(image: ImageResult) -> dict[str, Any]:
    return {
        "class": image.class_name, "label": image.label, "score": image.score, "p_value": image.p_value,
        "threshold": image.threshold, "verdict": WORDS[image.defective],
        "hit": None if image.hit is None else int(image.hit), "concept": image.concept,
    }  # fmt: skip


class Rows:
    """Writes scores.csv and scores.jsonl row by row, at once: a kill loses nothing but the image that is looked at.

    Rows that are there already are kept; scores.jsonl tells them, and scores.csv is made anew from it.

    Raises:
        UsageError: they cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            path = folder / "scores.jsonl"
            rows = list(old_rows(path))
            write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())  # without half a line
            self._lines = path.open("a", encoding="utf-8")
            self._table = (folder / "scores.csv").open("w", encoding="utf-8", newline="")
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"--output: cannot go on with the rows in {folder}: {error}") from error
        self._writer = csv.writer(self._table, lineterminator="\n")
        self._writer.writerow(PREDICTED)
        self.done: dict[str, str | None] = {}  # path -> verdict, or "error"
        for row in rows:
            self._tabulate(row)

    def add(self, row: Mapping[str, Any]) -> None:
        """Values by `PREDICTED`; of `regions` the table holds the number, the lines hold all."""
        self._lines.write(json.dumps({name: row[name] for name in PREDICTED}) + "\n")
        self._lines.flush()
        self._tabulate(row)

    def _tabulate(self, row: Mapping[str, Any]) -> None:
        """Add a row to scores.csv."""
        cells = dict(row) | {"regions": None if row["regions"] is None else len(row["regions"])}
        self._writer.writerow([csv_cell(cells[name]) for name in PREDICTED])
        self._table.flush()
        self.done[row["path"]] = "error" if row["error"] else row["verdict"]

    def is_done(self, path: Path) -> bool:
        return printable(str(path)) in self.done

    def verdict(self, path: Path) -> str | None:
        """Of an image that is in the table: good, defect, error, or None without thresholds."""
        return self.done[printable(str(path))]

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._table.close()


def old_rows(path: Path) -> Iterable[dict[str, Any]]:
    """The whole lines of a scores.jsonl; none if there is no such file. A killed program may have left half a line."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)
