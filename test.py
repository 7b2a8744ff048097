"""The evaluation loop: a model over the test images, once, into the metrics of every class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets import build_datasets, present_classes, resolve_classes, split_holdout
from datasets.features import FeatureBatch
from datasets.folder import ImageFolder
from datasets.transforms import to_picture
from default import ABSOLUTE, Config, EvalConfig, UsageError, to_dict
from models.decision import Verdict
from models.detector import Detector
from models.scorer import image_scores
from stage import Stage, find_checkpoints, image_readings, load_detector, normalization_of, settled_config
from utils.metrics import ClassAccumulator, ClassResult, mean_results
from utils.metrics.bootstrap import bootstrap
from utils.metrics.concepts import agreement
from utils.metrics.decisions import Decided, Rate
from utils.metrics.published import comparison_rows
from utils.report.gallery import ImageResult, Look, Views, normal_range
from utils.report.page import ClassPage, Curves, class_page, curves_of, report_run
from utils.report.plots import save_picture, triptych
from utils.report.results import Results, write_results
from utils.report.verdicts import write_scores
from utils.run.checkpoint import read_checkpoint
from utils.run.folders import new_run, write_config
from utils.run.progress import progress


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Seven metrics per class and their mean, every image's score, and each class's curves."""

    classes: dict[str, ClassResult]
    mean: ClassResult
    images: tuple[ImageResult, ...]
    curves: dict[str, Curves]
    decided: Decided | None


def evaluate(
    detector: Detector, batches: Iterable[FeatureBatch], class_names: Sequence[str], config: EvalConfig
) -> EvalResult:
    """Score every image of `batches`, whose masks have the detector's size, and compute each class's metrics.

    The detector is put into eval mode, and back as it was.
    """
    was_training = detector.training
    detector.eval()
    accumulators = {name: ClassAccumulator(fpr_limit=config.fpr_limit) for name in class_names}
    images: list[ImageResult] = []
    for batch in batches:
        judgement = detector.judge(batch.features)
        maps, concept = judgement.maps, judgement.output.concept
        scores = image_scores(getattr(maps, config.image_score), config.top_k)
        for index, own in by_class(batch.class_index):
            accumulators[class_names[index]].update(
                labels=batch.label[own], scores=scores[own], masks=batch.mask[own],
                maps=getattr(maps, config.pixel_score)[own], pro_maps=getattr(maps, config.pro_score)[own],
            )  # fmt: skip
        verdict = None if detector.decision is None else detector.decide(judgement, scores)
        hits = hits_of(getattr(maps, config.shown_score), batch.mask)
        images += image_results(batch, class_names, scores, concept, verdict, hits)
    detector.train(was_training)
    classes = {name: accumulator.compute() for name, accumulator in accumulators.items()}
    curves = {name: curves_of(accumulator) for name, accumulator in accumulators.items()}
    decided = decided_by(detector, images, config.false_alarm_rate)
    return EvalResult(classes=classes, mean=mean_results(classes), images=tuple(images), curves=curves, decided=decided)


def image_results(
    batch: FeatureBatch, class_names: Sequence[str], scores: Tensor, concept: Tensor | None, verdict: Verdict | None,
    hits: Sequence[bool | None],
) -> Iterator[ImageResult]:  # fmt: skip
    """What is said of each image of a batch."""
    for row, (path, index, label) in enumerate(
        zip(batch.path, batch.class_index.tolist(), batch.label.tolist(), strict=True)
    ):
        yield ImageResult(
            path=path, class_name=class_names[index], label=label, score=float(scores[row]), hit=hits[row],
            concept=None if concept is None else int(concept[row]),
            p_value=None if verdict is None else float(verdict.p_value[row]),
            threshold=None if verdict is None else float(verdict.threshold[row]),
            defective=None if verdict is None else bool(verdict.defective[row]),
        )  # fmt: skip


def hits_of(maps: Tensor, masks: Tensor) -> list[bool | None]:
    """Whether the highest place of each map (B, H, W) lies in its mask (B, H, W); None for an empty mask."""
    inside = masks.flatten(1).gather(1, maps.flatten(1).argmax(1)[:, None])[:, 0]
    return [bool(hit) if known else None for hit, known in zip(inside, masks.flatten(1).any(1), strict=True)]


def decided_by(detector: Detector, images: Sequence[ImageResult], rate: float) -> Decided | None:
    """How a detector's thresholds did on test images, None without any."""
    if detector.decision is None:
        return None
    names = list(dict.fromkeys(image.class_name for image in images))
    alarms, found = (
        {n: Rate.of([bool(i.defective) for i in images if i.class_name == n and bool(i.label) == bad]) for n in names}
        for bad in (False, True)
    )
    decision = detector.decision
    return Decided(
        rate=rate, calibration=decision.images, basis=decision.basis, false_alarms=alarms, found=found,
        threshold=float(decision.thresholds[0]), interval=None if decision.guaranteed else decision.interval(),
    )  # fmt: skip


def by_class(class_index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each class in the batch and the rows that belong to it."""
    for index in class_index.unique().tolist():
        yield index, (class_index == index).nonzero().flatten()


def absolute_map(config: EvalConfig) -> str:
    """The map to show: the pixel metrics' own if images can be compared by it, else the likelihood."""
    return config.pixel_score if config.pixel_score in ABSOLUTE else "likelihood"


def look_at(stage: Stage, detector: Detector, dataset: ImageFolder, *, remembered: bool = False) -> Look:
    """Shows images of a data set by their numbers, with what the detector, put into eval mode, says of them.

    `remembered` images were trained on: what the memory holds of an image itself does not count.
    """
    config = stage.config.eval
    detector.eval()

    def look(numbers: Sequence[int]) -> Views:
        samples = [dataset[n] for n in numbers]
        features = stage.extract(torch.stack([sample.image for sample in samples]).to(stage.device))
        maps = detector.judge(features, own=not remembered).maps
        return Views(
            images=np.stack([to_picture(sample.image) for sample in samples]),
            masks=torch.stack([sample.mask for sample in samples]).numpy(),
            heat=getattr(maps, absolute_map(config)).cpu().numpy(),
            pixel=getattr(maps, config.pixel_score).cpu().numpy(),
            scores=image_scores(getattr(maps, config.image_score), config.top_k).cpu().numpy(),
        )

    return look


def report_pages(
    stage: Stage, detector: Detector, datasets: tuple[ImageFolder, ImageFolder], result: EvalResult, share: int
) -> dict[str, ClassPage]:
    """What the report says of the classes of `result`; nothing with --no-report.

    Args:
        datasets: normal images, which calibrate, and the test images that were evaluated.
        share: classes in the whole report.
    """
    if not stage.config.eval.report:
        return {}
    train = look_at(stage, detector, datasets[0], remembered=not stage.config.data.holdout)
    test = look_at(stage, detector, datasets[1])
    normal = [
        [n for n, item in enumerate(datasets[0].items) if item.class_index == i] for i in range(len(result.classes))
    ]
    return {
        name: class_page(
            result=outcome, curves=result.curves[name], normal=normal_range(train, numbers), look=test, share=share,
            images={n: image for n, image in enumerate(result.images) if image.class_name == name},
        )
        for (name, outcome), numbers in zip(result.classes.items(), normal, strict=True)
    }  # fmt: skip


def save_pictures(
    stage: Stage, detector: Detector, dataset: ImageFolder, class_names: Sequence[str], folder: Path
) -> int:
    """Image, score map and mask side by side, the first few of each class and kind; how many were written.

    One colour scale per class: from the median of its good images to the highest value shown.
    """
    config = stage.config.eval
    look = look_at(stage, detector, dataset)
    chosen: dict[int, dict[str, list[int]]] = {}
    for number, item in enumerate(dataset.items):
        kinds = chosen.setdefault(item.class_index, {}).setdefault(item.kind, [])
        if len(kinds) < config.pictures:
            kinds.append(number)
    count = 0
    for index, by_kind in chosen.items():
        numbers = [n for group in by_kind.values() for n in group]
        if not numbers:
            continue
        views = look(numbers)
        scores = views.pixel
        good = np.array([dataset.items[n].label == 0 for n in numbers])
        low, high = float(np.median(scores[good] if good.any() else scores)), float(scores.max())
        for number, image, mask, score in zip(numbers, views.images, views.masks, scores, strict=True):
            item = dataset.items[number]
            picture = triptych(image, score, mask, low=low, high=high)
            save_picture(folder / class_names[index] / f"{item.kind}_{item.name.replace('/', '_')}.jpg", picture)
            count += 1
    return count


def finish(
    folder: Path,
    config: Config,
    parts: Sequence[EvalResult],
    best: dict[str, dict[str, float]] | None,
    pages: dict[str, ClassPage],
) -> None:
    """Write the tables of all `parts` (one, or one per single-class model) and the report into the run folder."""
    classes = {name: result for part in parts for name, result in part.classes.items()}
    by_name: dict[str, list[ImageResult]] = {name: [] for name in classes}
    for image in (image for part in parts for image in part.images):
        by_name[image.class_name].append(image)
    drawn = {name: ([i.label for i in images], [i.score for i in images]) for name, images in by_name.items()}
    count = config.eval.bootstrap
    evaluated = any(by_name.values())
    intervals = bootstrap(drawn, count, config.run.seed) if count and evaluated else None
    chosen = [(image.concept, image.class_name) for part in parts for image in part.images if image.concept is not None]
    shared = config.data.multi_class  # models of their own have concepts of their own
    concepts = agreement(*zip(*chosen, strict=True)) if chosen and shared and len(classes) > 1 else None
    decided = Decided.joined([part.decided for part in parts if part.decided is not None])
    results = Results(
        classes=classes,
        best_on_test=best,
        intervals=intervals,
        concepts=concepts,
        config=config,
        evaluated=evaluated,
        decided=decided if evaluated else None,
    )
    lines = [write_results(folder, results), f"run folder: {folder}"]
    if pages:
        rows = comparison_rows(config.data.dataset) if config.compared else []
        lines.append(f"report: {report_run(folder, pages, to_dict(config), shared_model=shared, published=rows)}")
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
        if not test.items:
            continue
        stage = Stage(own, normalization_of(content))
        detector = load_detector(content, stage, str(path))
        source = stage.ordered_features(test)
        batches = progress(source.epoch(0), total=len(source), text="evaluation")
        parts.append(evaluate(detector, batches, class_names, own.eval))
        folder = folder or new_run(own)
        write_scores(folder, (image for part in parts for image in part.images))
        normal = split_holdout(train, own.data.holdout)[1]
        save_pictures(stage, detector, test, class_names, folder / "pictures")
        pages |= report_pages(stage, detector, (normal, test), parts[-1], len(class_names) * len(paths))
    if folder is None:
        raise UsageError(
            f"--data-path: no class of {config.eval.eval_ckpt} with test images is there; --mode predict judges images "
            "without labels"
        )
    own = replace(own, data=replace(own.data, class_names=tuple(n for part in parts for n in part.classes)))
    write_config(folder, own)
    finish(folder, own, parts, None, pages)
