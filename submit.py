"""Score maps of MVTec AD 2's private test sets, whose labels are not public, in the form that its server takes.

anomaly_images/CLASS/{test_private,test_private_mixed}/NAME.tiff: float16 (H, W), at the images' own size, and
anomaly_images_thresholded/... .png: 0 and 255, cut at the mean plus three standard deviations of the pixels of the
class's validation images, as the data set's paper does (arXiv 2503.21622). Both in submission.tar.gz.
"""

from __future__ import annotations

import math
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from datasets import class_folder
from datasets.mvtec_ad_2 import COUNTS, IN_PRIVATE, PRIVATE
from datasets.walk import image_files
from default import Config, UsageError
from detector import ImageDetector, loaded
from stage import find_checkpoints
from utils.run.folders import new_folder
from utils.run.progress import progress
from utils.run.text import printable
from utils.run.writer import write_whole

MAPS, MASKS, ARCHIVE = "anomaly_images", "anomaly_images_thresholded", "submission.tar.gz"
HALF_MAX = 65504.0  # of half precision
DEVIATIONS = 3


class Spread:
    """Mean and standard deviation of the pixels of any number of maps."""

    def __init__(self) -> None:
        self.count, self.mean, self._squares = 0, 0.0, 0.0  # the last one: of distances to the mean

    def add(self, heat: NDArray) -> None:
        """Pixels of a map, joined as by Chan et al. (1979)."""
        values = heat.astype(np.float64)
        gap, total = values.mean() - self.mean, self.count + values.size
        self._squares += values.var() * values.size + gap * gap * self.count * values.size / total
        self.mean += gap * values.size / total
        self.count = total

    @property
    def threshold(self) -> float:
        return self.mean + DEVIATIONS * math.sqrt(self._squares / self.count)


def run_submit(config: Config, chosen: dict[str, Any]) -> None:
    """Judge the private images of all of a checkpoint's classes, or of all checkpoints of a run folder, and write them.

    Raises:
        UsageError: a model of another data set, or a class without private or validation images.
    """
    place = Path(str(config.eval.eval_ckpt))
    folder: Path | None = None
    written: dict[str, list[int]] = {}
    for path in find_checkpoints(place, config.data.class_names):
        own = replace(config, eval=replace(config.eval, eval_ckpt=str(path)))
        detector = loaded(own, chosen | {"eval_ckpt": str(path)})
        data = detector.config.data
        if data.dataset != "mvtec-ad-2":
            raise UsageError(
                f"--eval_ckpt: --mode submit is for a model of mvtec-ad-2, but {path} is one of {data.dataset}"
            )
        found = {name: images_of(class_folder(data, name)) for name in data.class_names}
        folder = folder or output_folder(config, place)
        for name, (validation, private) in found.items():
            write_class(detector, name, validation, private, folder)
            written[name] = [len(images) for images in private.values()]
    assert folder is not None
    write_whole(folder / ARCHIVE, partial(pack, folder))
    for line in lacking(written):
        print(printable(f"warning: not a whole submission: {line}"), file=sys.stderr)
    print(printable(f"{sum(map(sum, written.values()))} images; the submission is {folder / ARCHIVE}"))


def pack(folder: Path, file: BinaryIO) -> None:
    """Write the maps in a folder as an archive."""
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for part in (MAPS, MASKS):
            archive.add(folder / part, arcname=part)


def output_folder(config: Config, checkpoint: Path) -> Path:
    """--output, which must be empty or not be there yet, or a new folder beside the checkpoint.

    Raises:
        UsageError: it cannot be made, or holds something.
    """
    if config.predict.output is None:
        return new_folder(checkpoint if checkpoint.is_dir() else checkpoint.parent, "submission")
    folder = Path(config.predict.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output: cannot write in {folder}: {error.strerror}") from error
    if any(folder.iterdir()):
        raise UsageError(f"--output: {folder} is not empty, and a submission holds nothing else")
    return folder


def images_of(folder: Path) -> tuple[list[Path], dict[str, list[Path]]]:
    """The validation images of a class, and its private ones by test set.

    Raises:
        UsageError: there are none.
    """
    parts = {part: image_files(folder / part) for part in ("validation/good", *PRIVATE)}
    for part, images in parts.items():
        if not images:
            raise UsageError(f"--data-path: {folder} lacks images in {part}")
    return parts["validation/good"], {part: parts[part] for part in PRIVATE}


def maps_of(detector: ImageDetector, images: Sequence[Path], text: str) -> Iterator[tuple[Path, NDArray[np.float32]]]:
    """Each image's score map at its own size (H, W)."""
    for path in progress(images, total=len(images), text=text, unit="images"):
        yield path, detector(path).map


def write_class(
    detector: ImageDetector, name: str, validation: Sequence[Path], private: dict[str, list[Path]], folder: Path
) -> None:
    """The maps of a class's private images, whole and cut."""
    spread = Spread()
    for _, heat in maps_of(detector, validation, f"{name} validation"):
        spread.add(as_half(heat))
    for part, images in private.items():
        for path, heat in maps_of(detector, images, f"{name} {part}"):
            write_map(folder, Path(name) / part / path.stem, as_half(heat), spread.threshold)


def as_half(heat: NDArray[np.float32]) -> NDArray[np.float16]:
    """As it is stored, and so as it is cut."""
    return heat.clip(-HALF_MAX, HALF_MAX).astype(np.float16)


def write_map(folder: Path, name: Path, heat: NDArray[np.float16], threshold: float) -> None:
    """One map (H, W), and where it is above the threshold."""
    whole, cut = folder / MAPS / f"{name}.tiff", folder / MASKS / f"{name}.png"
    for path in (whole, cut):
        path.parent.mkdir(parents=True, exist_ok=True)
    marks = Image.fromarray(((heat.astype(np.float64) > threshold) * 255).astype(np.uint8))
    write_whole(whole, lambda file: tifffile.imwrite(file, heat), durable=False)
    write_whole(cut, lambda file: marks.save(file, "PNG"), durable=False)


def lacking(written: dict[str, list[int]]) -> list[str]:
    """What the server would miss: classes, and images of the ones that are there."""
    others = [name for name in COUNTS if name not in written]
    lines = [f"it lacks {', '.join(others)}"] if others else []
    for name, numbers in written.items():
        if set(numbers) != {IN_PRIVATE[name]}:
            have = " and ".join(map(str, numbers))
            lines.append(f"{name} has {have} private images, the official copy {IN_PRIVATE[name]} of each kind")
    return lines
