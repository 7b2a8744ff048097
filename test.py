"""The evaluation loop: a model over the test images, once, into the metrics of every class."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from datasets import are_unseen, build_datasets, present_classes, resolve_classes, split_holdout
from datasets.features import FeatureBatch
from datasets.folder import ImageFolder
from datasets.transforms import to_picture
from default import Config, EvalConfig, UsageError
from models.detector import Detector, Judgement
from models.scorer import image_scores
from stage import Stage, find_checkpoints, image_readings, load_detector, normalization_of, settled_config
from utils.metrics import ClassAccumulator, ClassResult, mean_results
from utils.metrics.bootstrap import bootstrap
from utils.metrics.concepts import agreement
from utils.metrics.published import comparison_rows
from utils.report.gallery import Look, Shot, Show, Views, drawn, normal_range
from utils.report.images import Album, ImageResult, first_of_each
from utils.report.page import ClassPage, Curves, class_page, curves_of, report_run
from utils.report.plots import save_picture
from utils.report.results import Results, write_results
from utils.run.checkpoint import read_checkpoint
from utils.run.folders import new_run, write_config


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Seven metrics per class and their mean, every image, each class's curves, and the shown maps of some images by
    their numbers (see `Album`)."""

    classes: dict[str, ClassResult]
    mean: ClassResult
    images: tuple[ImageResult, ...]
    curves: dict[str, Curves]
    maps: Mapping[int, NDArray]


def evaluate(
    detector: Detector,
    batches: Iterable[FeatureBatch],
    class_names: Sequence[str],
    config: EvalConfig,
    *,
    wanted: Collection[int] = (),
) -> EvalResult:
    """Score every image of `batches`, whose masks have the detector's size, and compute each class's metrics.

    The detector is put into eval mode, and back as it was. Shown maps are kept of the `wanted` images in any case.
    """
    was_training = detector.training
    detector.eval()
    accumulators = {name: ClassAccumulator(fpr_limit=config.fpr_limit) for name in class_names}
    images: list[ImageResult] = []
    album = Album(wanted)
    for batch in batches:
        judgement = detector.judge(batch.features)
        maps = judgement.maps
        scores = image_scores(getattr(maps, config.image_score), config.top_k)
        for index, own in by_class(batch.class_index):
            accumulators[class_names[index]].update(
                labels=batch.label[own], scores=scores[own], masks=batch.mask[own],
                maps=getattr(maps, config.pixel_score)[own], pro_maps=getattr(maps, config.pro_score)[own],
            )  # fmt: skip
        shown = getattr(maps, config.shown_score)
        for found, heat in zip(image_results(batch, judgement, scores, shown, class_names), shown, strict=True):
            album.add(len(images), (found.class_name, found.label, found.hit), found.score, heat.cpu().numpy())
            images.append(found)
    detector.train(was_training)
    classes = {name: accumulator.compute() for name, accumulator in accumulators.items()}
    curves = {name: curves_of(accumulator) for name, accumulator in accumulators.items()}
    return EvalResult(classes=classes, mean=mean_results(classes), images=tuple(images), curves=curves, maps=album.maps)


def image_results(
    batch: FeatureBatch, judgement: Judgement, scores: Tensor, shown: Tensor, class_names: Sequence[str]
) -> list[ImageResult]:
    """What is said of the images of a batch: image `scores` (B,), and of the `shown` maps (B, H, W) the peaks."""
    (height, width), concept = shown.shape[1:], judgement.output.concept
    values, places = shown.flatten(1).max(1)
    masks = batch.mask.flatten(1)
    inside, marked = masks.gather(1, places[:, None])[:, 0].tolist(), masks.any(1).tolist()
    concepts = [None] * len(scores) if concept is None else concept.tolist()
    rows = zip(batch.path, batch.class_index.tolist(), batch.label.tolist(), scores.tolist(), concepts, strict=True)
    peaks = zip(places.tolist(), values.tolist(), inside, marked, strict=True)
    return [
        ImageResult(
            path=path, class_name=class_names[c], label=label, score=score, concept=chosen, peak_value=value,
            peak=((place % width + 0.5) / width, (place // width + 0.5) / height), hit=within if known else None,
        )
        for (path, c, label, score, chosen), (place, value, within, known) in zip(rows, peaks, strict=True)
    ]  # fmt: skip


def by_class(class_index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each class in the batch and the rows that belong to it."""
    for index in class_index.unique().tolist():
        yield index, (class_index == index).nonzero().flatten()


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
    look, show = look_at(stage, detector, normal, remembered=not are_unseen(kept, normal)), shown_by(test, result.maps)
    with tqdm(total=len(names) * (1 + config.report) + len(wanted), desc="pictures", leave=False) as bar:
        ranges = {}
        for index, name in enumerate(names):
            ranges[name] = normal_range(look, [n for n, i in enumerate(normal.items) if i.class_index == index])
            bar.update()
        images = [image.within(ranges[image.class_name]) for image in result.images]
        for number in wanted:
            item, image = test.items[number], images[number]
            place = folder / image.class_name / f"{item.kind}_{item.name.replace('/', '_')}.jpg"
            save_picture(place, drawn(show(number), image, ranges[image.class_name]))
            bar.update()
        pages = {}
        for name in names if config.report else []:
            pages[name] = class_page(
                result=result.classes[name], curves=result.curves[name], normal=ranges[name], show=show, share=share,
                images={n: image for n, image in enumerate(images) if image.class_name == name},
            )  # fmt: skip
            bar.update()
    return pages


def finish(
    folder: Path,
    config: Config,
    parts: Sequence[EvalResult],
    best: dict[str, dict[str, float]] | None,
    pages: dict[str, ClassPage],
    *,
    unseen: bool,
) -> None:
    """Write the tables of all `parts` (one, or one per single-class model) and the report into the run folder.

    `unseen`: no image that calibrates was trained on.
    """
    classes = {name: result for part in parts for name, result in part.classes.items()}
    by_name: dict[str, list[ImageResult]] = {name: [] for name in classes}
    for image in (image for part in parts for image in part.images):
        by_name[image.class_name].append(image)
    drawn = {name: ([i.label for i in images], [i.score for i in images]) for name, images in by_name.items()}
    count = config.eval.bootstrap
    intervals = bootstrap(drawn, count, config.run.seed) if count else None
    chosen = [(image.concept, image.class_name) for part in parts for image in part.images if image.concept is not None]
    shared = config.data.multi_class  # models of their own have concepts of their own
    concepts = agreement(*zip(*chosen, strict=True)) if chosen and shared and len(classes) > 1 else None
    results = Results(
        classes=classes, best_on_test=best, intervals=intervals, concepts=concepts, config=config, unseen=unseen
    )
    lines = [write_results(folder, results), f"run folder: {folder}"]
    if pages:
        rows = comparison_rows(config.data.dataset) if config.compared else []
        lines.append(f"report: {report_run(folder, pages, config, unseen=unseen, published=rows)}")
    print("\n".join(lines))  # when all is written


def on_classes_there(content: dict[str, Any], config: Config, chosen: dict[str, Any]) -> Config | None:
    """Unless classes were asked for by name: those of a checkpoint's classes that the data set holds, None if none.

    Raises:
        UsageError: a class was asked for that the checkpoint does not have.
    """
    own, asked = content.get("classes"), chosen.get("class_names", ("all",))
    if own is None:  # an official checkpoint names none
        return config
    for name in asked:
        if name not in ("all", *own):
            raise UsageError(f"--class-names: the model has no class {name!r}; choose from all, {', '.join(own)}")
    names = present_classes(config.data, own) if "all" in asked else config.data.class_names
    return replace(config, data=replace(config.data, class_names=names)) if names else None


def run_test(config: Config, chosen: dict[str, Any]) -> None:
    """Evaluate a checkpoint, or all single-class checkpoints of a run folder.

    Args:
        config: the resolved configuration.
        chosen: what the preset and the user chose by name; a checkpoint's own settings stand for the rest.
    """
    assert config.eval.eval_ckpt is not None
    folder: Path | None = None
    parts: list[EvalResult] = []
    pages: dict[str, ClassPage] = {}
    unseen = True
    paths = find_checkpoints(Path(config.eval.eval_ckpt), config.data.class_names)
    for path in paths:
        content = read_checkpoint(path)
        settled = on_classes_there(content, settled_config(content, config, chosen, str(path)), chosen)
        if settled is None:
            continue
        own = settled
        class_names = resolve_classes(own.data)
        readings = image_readings(content, class_names)
        train, test = build_datasets(own.data, class_names, own.score_size, readings)
        stage = Stage(own, normalization_of(content))
        detector = load_detector(content, stage, str(path))
        source = stage.ordered_features(test)
        batches = tqdm(source.epoch(0), total=len(source), desc="evaluation", leave=False)
        parts.append(evaluate(detector, batches, class_names, own.eval, wanted=pictured(test, own.eval)))
        folder = folder or new_run(own)
        sets = (*split_holdout(train, own.data.holdout), test)
        unseen = unseen and are_unseen(*sets[:2])
        pages |= present(stage, detector, sets, parts[-1], folder / "pictures", len(class_names) * len(paths))
    if folder is None:
        raise UsageError(f"--data-path: no class of {config.eval.eval_ckpt} is there")
    own = replace(own, data=replace(own.data, class_names=tuple(n for part in parts for n in part.classes)))
    write_config(folder, own)
    finish(folder, own, parts, None, pages, unseen=unseen)
