"""What an evaluation found, to look at: pictures and the report's pages."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from datasets import are_unseen
from datasets.folder import ImageFolder
from datasets.transforms import to_picture
from default import CALIBRATED, EvalConfig, UsageError
from models.detector import Detector
from models.scorer import image_scores
from stage import Stage
from utils.metrics import NAN
from utils.report.gallery import NORMAL_IMAGES, Look, Shot, Show, Views, drawn, normal_range
from utils.report.images import EvalResult, NormalRange, first_of_each
from utils.report.page import ClassPage, class_page
from utils.report.plots import save_picture
from utils.run.text import printable

MEDIAN_IMAGES = 4  # per class, where the checkpoint's thresholds leave only the scale's zero to find


def look_at(stage: Stage, detector: Detector, dataset: ImageFolder, *, remembered: bool = False) -> Look:
    """Says of images of a data set, by their numbers, what the detector, put into eval mode, finds in them.

    `remembered` images were trained on: what the memory holds of an image itself does not count.
    """
    config = stage.config.eval
    detector.eval()

    def look(numbers: Sequence[int]) -> Views:
        images = torch.stack([dataset[n].image for n in numbers])
        maps = detector.judge(stage.extract(images.to(stage.device)), own=not remembered).maps
        return Views(
            heat=getattr(maps, config.shown_score).cpu().numpy(),
            scores=image_scores(getattr(maps, config.image_score), config.top_k).cpu().numpy(),
        )

    return look


def shown_by(dataset: ImageFolder, maps: Mapping[int, NDArray]) -> Show:
    """Shows images of a data set by their numbers, with the maps that an evaluation kept of them."""

    def show(number: int) -> Shot:
        sample = dataset[number]
        return Shot(image=to_picture(sample.image), mask=sample.mask.numpy(), heat=maps[number].astype(np.float32))

    return show


def pictured(dataset: ImageFolder, config: EvalConfig) -> list[int]:
    """Numbers of the images that `save_pictures` draws: the first --pictures of each class and kind."""
    return first_of_each([(item.class_index, item.kind) for item in dataset.items], config.pictures)


def present(
    stage: Stage,
    detector: Detector,
    datasets: tuple[ImageFolder, ImageFolder, ImageFolder],
    result: EvalResult,
    folder: Path,
    share: int,
) -> dict[str, ClassPage]:
    """Write the pictures of an evaluation into `folder`, and give what the report says of its classes.

    Nothing of what --no-report and --pictures 0 leave out is computed.

    Args:
        datasets: training images, normal images that calibrate, and the test images that were evaluated.
        share: classes in the whole report.
    """
    kept, normal, test = datasets
    config, names = stage.config.eval, list(result.classes)
    wanted = pictured(test, config)
    if not (config.report or wanted):
        return {}
    remembered, normal = not are_unseen(kept, normal), normal.tiled
    look, show = look_at(stage, detector, normal, remembered=remembered), shown_by(test, result.maps)
    with tqdm(total=len(names) * (1 + config.report) + len(wanted), desc="pictures", leave=False, disable=None) as bar:
        ranges = {}
        for index, name in enumerate(names):
            numbers = [n for n, item in enumerate(normal.items) if item.class_index == index]
            with spared(f"pictures of {name}"):
                ranges[name] = range_of(stage.config.eval, detector, look, numbers)
            bar.update()
        images = {n: i.within(ranges[i.class_name]) for n, i in enumerate(result.images) if i.class_name in ranges}
        for number in (n for n in wanted if n in images):
            item, image = test.items[number], images[number]
            place = folder / image.class_name / f"{item.kind}_{item.name.replace('/', '_')}.jpg"
            with spared(place):
                save_picture(place, drawn(show(number), image, ranges[image.class_name]))
            bar.update()
        pages = {}
        for name in ranges if config.report else []:
            with spared(f"report of {name}"):
                pages[name] = class_page(
                    result=result.classes[name], extra=result.extra.get(name, {}), curves=result.curves[name],
                    images={n: image for n, image in images.items() if image.class_name == name}, normal=ranges[name],
                    show=show, share=share,
                )  # fmt: skip
            bar.update()
    return pages


@contextlib.contextmanager
def spared(what: Path | str) -> Iterator[None]:
    """Where `what`, a file or what it is of, cannot be made, a warning says so and the rest goes on."""
    try:
        yield
    except (UsageError, OSError, MemoryError) as error:
        print(printable(f"warning: {what} is left out: {error}"), file=sys.stderr)


def range_of(config: EvalConfig, detector: Detector, look: Look, numbers: Sequence[int]) -> NormalRange:
    """What is normal in a class, from its normal images of these numbers.

    A checkpoint's thresholds leave only the zero of the scale to find: calibrated scores have it, in others a few
    images' median tells.
    """
    if detector.decision is None:
        return normal_range(look, numbers, NORMAL_IMAGES)
    if config.shown_score in CALIBRATED:
        return NormalRange(low=0.0, high=NAN, threshold=NAN, count=0)
    return normal_range(look, numbers, MEDIAN_IMAGES)
