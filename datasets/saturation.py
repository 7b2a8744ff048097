"""sPRO of a data set whose masks are one file a region, with saturations in CLASS/defects_config.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from datasets.decode import read_pixels
from datasets.folder import Item
from datasets.masks import mask_files
from datasets.pixels import read_header
from default import UsageError
from utils.metrics import NAN, nanmean
from utils.metrics.seven import auroc, ranked
from utils.metrics.spro import SproAccumulator, saturation
from utils.run.threads import in_threads

CONFIG = "defects_config.json"
LIMIT, LIMITS = 0.05, (0.01, 0.05, 0.1, 0.3, 1.0)  # the headline's, and all that the official program writes
KINDS = {"logical_anomalies": "logical", "structural_anomalies": "structural"}


@dataclass(frozen=True, kw_only=True)
class Saturation:
    """Of a kind of region: how much of it is enough, a share or a number of pixels."""

    threshold: float
    relative: bool


def read_config(path: Path) -> dict[int, Saturation]:
    """Value of a mask's pixels -> the saturation of such regions.

    Raises:
        UsageError: the file is missing or cannot be read.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return {
            int(row["pixel_value"]): Saturation(
                threshold=float(row["saturation_threshold"]), relative=bool(row["relative_saturation"])
            )
            for row in rows
        }
    except FileNotFoundError as error:
        raise UsageError(f"--data-path: no such file: {path} (saturations of the regions)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: expected a list of pixel_value, saturation_threshold, relative_saturation"
        ) from error


class SproProtocol:
    """AU-sPRO and image AUROC, logical and structural anomalies apart and their mean, as MVTec LOCO asks; all kinds
    together where there are others.

    Maps are enlarged to the images' own size, in whose pixels saturations count. The image score is the model's own;
    the official program takes whatever is submitted.
    """

    def __init__(self, items: Sequence[Item], saturations: dict[int, Saturation]) -> None:
        self.items, self.saturations = {str(item.path): item for item in items}, saturations
        kinds = {item.kind for item in items if item.label}
        self.names = KINDS if kinds and kinds <= KINDS.keys() else dict.fromkeys(kinds, "")
        groups = dict.fromkeys(self.names.values())
        self.areas = {name: SproAccumulator() for name in groups}
        self.good: list[float] = []
        self.bad: dict[str, list[float]] = {name: [] for name in groups}

    @classmethod
    def of(cls, items: Sequence[Item]) -> SproProtocol | None:
        """For the test images of a class; None where it has no defects_config.json."""
        path = items[0].path.parents[2] / CONFIG if items else None
        return cls(items, read_config(path)) if path is not None and path.is_file() else None

    def check(self) -> None:
        """Raise `UsageError` for a mask of another size than its image, or with values that are not told of."""
        in_threads(self.regions_of, list(self.items.values()))

    def add(self, path: str, label: int, score: float, heat: Tensor) -> None:
        item = self.items[path]
        regions = self.regions_of(item)
        width, height = read_header(item.path).size
        large = torch.from_numpy(cv2.resize(heat.float().cpu().numpy(), (width, height)))
        if label:
            self.bad[self.names[item.kind]].append(score)
            self.areas[self.names[item.kind]].add(large, regions)
            return
        self.good.append(score)
        for area in self.areas.values():
            area.add(large)

    def merge(self, other: SproProtocol) -> None:
        self.good += other.good
        for name, area in self.areas.items():
            area.merge(other.areas[name])
            self.bad[name] += other.bad[name]

    def regions_of(self, item: Item) -> list[tuple[Tensor, int]]:
        """Masks (H, W) and saturations of an image's regions, one of each file that marks something.

        Raises:
            UsageError: a mask of another size than the image, with several values, or with one that the data set does
                not tell of.
        """
        width, height = read_header(item.path).size
        found = []
        for path in mask_files(item.mask_path) if item.mask_path else ():
            values = level(path)
            kinds = np.unique(values[values > 0])
            if values.shape != (height, width):
                raise UsageError(f"{path}: has another size than its image, {item.path}")
            if not len(kinds):
                continue
            if len(kinds) > 1 or int(kinds[0]) not in self.saturations:
                known = ", ".join(map(str, self.saturations))
                shown = " ".join(map(str, kinds))
                raise UsageError(f"{path}: expected pixels of one value out of {known} ({CONFIG}), but got {shown}")
            mask, kind = torch.from_numpy(values > 0), self.saturations[int(kinds[0])]
            found.append((mask, saturation(int(mask.sum()), kind.threshold, relative=kind.relative)))
        return found

    def results(self) -> dict[str, float]:
        """Fractions: the headline at a false-positive rate of 0.05, then the other limits."""
        curves = {name: {limit: area.area(limit) for limit in LIMITS} for name, area in self.areas.items()}
        images = {name: auroc_of(self.bad[name], self.good) for name in self.areas}
        parts = [name for name in self.areas if name]
        found = {f"I-AUROC {name}": images[name] for name in parts}
        found |= {"I-AUROC mean": nanmean(list(images.values()))} if parts else {}
        found |= {f"AU-sPRO@{LIMIT:g} {name}": curves[name][LIMIT] for name in parts}
        others = (LIMIT, *(limit for limit in LIMITS if limit != LIMIT))
        return found | {f"AU-sPRO@{limit:g}": nanmean([c[limit] for c in curves.values()]) for limit in others}


def level(path: Path) -> np.ndarray:
    """The values of a grey mask (H, W), or the highest channel."""
    image = read_pixels(path).image
    if image is None:
        raise UsageError(f"{path}: expected a mask of 8 bits")
    values = np.asarray(image if image.mode in ("L", "P") else image.convert("RGB"))
    return values.max(2) if values.ndim == 3 else values


def auroc_of(bad: Sequence[float], good: Sequence[float]) -> float:
    """Of image scores; NaN without either."""
    positive, negative = (torch.tensor(values, dtype=torch.float64) for values in (bad, good))
    return auroc(*ranked(positive, negative)) if len(positive) and len(negative) else NAN
