"""The evaluation loop: a model over the test images, once, into the metrics of every class."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datasets import are_unseen, build_datasets, present_classes, resolve_classes, split_holdout
from datasets.features import FeatureBatch
from datasets.folder import ImageFolder
from datasets.geometry import Stitch
from default import Config, EvalConfig, UsageError
from models.decision import Verdict
from models.detector import Detector
from models.scorer import image_scores
from show import pictured, present, spared
from stage import Stage, find_checkpoints, image_readings, load_detector, normalization_of, settled_config
from utils.metrics import ClassAccumulator, mean_results
from utils.metrics.bootstrap import bootstrap
from utils.metrics.concepts import agreement
from utils.metrics.decisions import Decided, Rate
from utils.metrics.published import comparison_rows
from utils.report.images import Album, EvalResult, ImageResult
from utils.report.page import ClassPage, curves_of, report_run
from utils.report.results import Results, write_results
from utils.report.verdicts import write_scores
from utils.run.checkpoint import read_checkpoint
from utils.run.folders import new_run, write_config
from utils.run.progress import progress


def evaluate(
    detector: Detector,
    batches: Iterable[FeatureBatch],
    class_names: Sequence[str],
    config: EvalConfig,
    *,
    wanted: Collection[int] = (),
    test: ImageFolder | None = None,
) -> EvalResult:
    """Score every image of `batches`, whose masks have the detector's size, and compute each class's metrics.

    The detector is put into eval mode, and back as it was. Shown maps are kept of the `wanted` images in any case. The
    images of `batches` are those of `test`, or their tiles, in order, which --eval-size native, --resize pad and --tile
    need.
    """
    was_training = detector.training
    detector.eval()
    accumulators = {name: ClassAccumulator(fpr_limit=config.fpr_limit) for name in class_names}
    images: list[ImageResult] = []
    album = Album(wanted)
    tiled = test is not None and test.geometry.tile is not None
    for found in stitched(detector, batches, config, test) if test and tiled else judged(detector, batches, config):
        batch, scores, maps = found.batch, found.scores, found.maps
        pixel, pro, shown = (maps[name] for name in (config.pixel_score, config.pro_score, config.shown_score))
        plain = tiled or not (config.eval_size == "native" or (test is not None and test.geometry.pads))
        for own in alike(batch, plain=plain):
            seen = truth_of(batch, own, (pixel, pro), None if plain else test, len(images), config)
            accumulators[class_names[int(batch.class_index[own[0]])]].update(
                labels=batch.label[own], scores=scores[own], masks=seen[0], maps=seen[1], pro_maps=seen[2]
            )
        verdict = None if detector.decision is None else detector.decision(scores, found.concept)
        results = image_results(batch, class_names, scores, shown, found.concept, verdict)
        for image, heat in zip(results, shown, strict=True):
            kept = highest(heat, detector.size) if tiled else heat.cpu().numpy()
            album.add(len(images), (image.class_name, image.label, image.hit), image.score, kept)
            images.append(image)
    detector.train(was_training)
    classes = {name: accumulator.compute() for name, accumulator in accumulators.items()}
    return EvalResult(
        classes=classes, mean=mean_results(classes), images=tuple(images), maps=album.maps,
        curves={name: curves_of(accumulator) for name, accumulator in accumulators.items()},
        decided=decided_by(detector, images, config.false_alarm_rate),
    )  # fmt: skip


def image_results(
    batch: FeatureBatch,
    class_names: Sequence[str],
    scores: Tensor,
    shown: Tensor,
    concept: Tensor | None,
    verdict: Verdict | None,
) -> Iterator[ImageResult]:
    """What is said of each image of a batch: image `scores` (B,), `shown` maps (B, H, W), concepts, and the verdict."""
    height, width = shown.shape[1:]
    values, places = shown.flatten(1).max(1)
    masks = batch.mask.flatten(1)
    inside, marked = masks.gather(1, places[:, None])[:, 0].tolist(), masks.any(1).tolist()
    for row, (path, index, label, place) in enumerate(
        zip(batch.path, batch.class_index.tolist(), batch.label.tolist(), places.tolist(), strict=True)
    ):
        yield ImageResult(
            path=path, class_name=class_names[index], label=label, score=float(scores[row]),
            concept=None if concept is None else int(concept[row]),
            peak=((place % width + 0.5) / width, (place // width + 0.5) / height), peak_value=float(values[row]),
            hit=inside[row] if marked[row] else None,
            p_value=None if verdict is None else float(verdict.p_value[row]),
            threshold=None if verdict is None else float(verdict.threshold[row]),
            defective=None if verdict is None else bool(verdict.defective[row]),
            high=None if verdict is None else float(verdict.pixel_threshold[row]),
        )  # fmt: skip


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


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What is said of the images of a `batch`: image `scores` (B,), concepts (B,), and the maps (B, H, W) that are
    wanted, by their scores' names."""

    batch: FeatureBatch
    scores: Tensor
    concept: Tensor | None
    maps: Mapping[str, Tensor]


def judged(detector: Detector, batches: Iterable[FeatureBatch], config: EvalConfig) -> Iterator[Judged]:
    """Batch by batch."""
    for batch in batches:
        judgement = detector.judge(batch.features)
        maps = {n: getattr(judgement.maps, n) for n in {config.pixel_score, config.pro_score, config.shown_score}}
        scores = image_scores(getattr(judgement.maps, config.image_score), config.top_k)
        yield Judged(batch=batch, scores=scores, concept=judgement.output.concept, maps=maps)


def stitched(
    detector: Detector, batches: Iterable[FeatureBatch], config: EvalConfig, test: ImageFolder
) -> Iterator[Judged]:
    """Image by image from batches of tiles, with maps and masks of the image's own size, or of --eval-size; the score
    is that of the tile with the highest one."""
    rows = ((found, row) for found in judged(detector, batches, config) for row in range(len(found.scores)))
    overlap, size = test.geometry.overlap, config.eval_size
    target = (size, size) if isinstance(size, int) else None
    for number, group in groupby(zip(rows, test.owners, test.tiled.items, strict=True), key=lambda entry: entry[1]):
        parts: dict[str, Stitch] = {}
        best: tuple[Judged, int] | None = None
        for (found, row), _, tile in group:
            assert tile.box is not None
            for name, maps in found.maps.items():
                part = parts.setdefault(name, Stitch(test.place(number).size, overlap, target))
                part.add(maps[row].float().cpu().numpy(), tile.box)
            if best is None or found.scores[row] > best[0].scores[best[1]]:
                best = found, row
        assert best is not None
        yield whole(*best, parts, test.marks(number, target))


def whole(found: Judged, row: int, parts: Mapping[str, Stitch], marks: NDArray[np.bool_]) -> Judged:
    """An image whose highest tile is a row of `found`."""
    one, concept = slice(row, row + 1), found.concept
    batch = replace(
        found.batch, features=[], mask=torch.from_numpy(marks)[None], label=found.batch.label[one],
        class_index=found.batch.class_index[one], path=found.batch.path[one],
    )  # fmt: skip
    maps = {name: torch.from_numpy(part.map)[None] for name, part in parts.items()}
    return Judged(batch=batch, scores=found.scores[one], concept=None if concept is None else concept[one], maps=maps)


def highest(heat: Tensor, side: int) -> NDArray:
    """A map (H, W) in a picture's size, (side, side): a small defect must not get lost."""
    return torch.nn.functional.adaptive_max_pool2d(heat[None], side)[0].cpu().numpy()


def alike(batch: FeatureBatch, *, plain: bool) -> Iterable[Tensor]:
    """Rows of a batch that can be added up together: of one class, or, where sizes differ, of one image."""
    if not plain:
        return torch.arange(len(batch.label)).split(1)
    return [own for _, own in by_class(batch.class_index)]


def by_class(class_index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each class in the batch and the rows that belong to it."""
    for index in class_index.unique().tolist():
        yield index, (class_index == index).nonzero().flatten()


def truth_of(
    batch: FeatureBatch, rows: Tensor, maps: Sequence[Tensor], test: ImageFolder | None, first: int, config: EvalConfig
) -> list[Tensor]:
    """Masks of some rows of a batch, and each of its `maps` (B, H, W): all (N, h, w).

    Of images of `test` without what is padded; `first` is the number of the batch's first image there.
    """
    if test is None:
        return [values[rows.to(values.device)] for values in (batch.mask, *maps)]
    number, row = first + int(rows), int(rows)
    place = test.place(number)
    found = [values[row].float().cpu().numpy() for values in maps]
    if config.eval_size == "native":
        part = place.seen(place.size)
        made = [test.marks(number), *(place.drawn(values)[part] for values in found)]
    else:
        made = [place.part(values) for values in (batch.mask[row].cpu().numpy(), *found)]
    return [torch.from_numpy(np.ascontiguousarray(values))[None] for values in made]


class Ended:
    """What is written when models have been evaluated: the scores of all images so far, the tables, and only then
    pictures and report, without which nothing is lost.

    Args:
        folder: the run folder.
        config: of the run.
        unseen: no image that calibrates was trained on.
    """

    def __init__(self, folder: Path, config: Config, *, unseen: bool = True) -> None:
        self.folder, self.config, self.unseen = folder, config, unseen
        self.best: dict[str, dict[str, float]] | None = None  # see `Results`
        self.parts: list[EvalResult] = []
        self._pages: dict[str, ClassPage] = {}
        self._table = ""

    def add(self, part: EvalResult) -> None:
        """A model's evaluation."""
        self.parts.append(part)
        if part.images:
            write_scores(self.folder, (image for part in self.parts for image in part.images))

    def write_tables(self) -> None:
        """The tables of all that was added."""
        self._table = write_results(self.folder, results_of(self.parts, self.config, self.best, self.unseen))

    def show(
        self, stage: Stage, detector: Detector, sets: tuple[ImageFolder, ImageFolder, ImageFolder], share: int
    ) -> None:
        """Pictures of what was added last: see `present`."""
        self._pages |= present(stage, detector, sets, self.parts[-1], self.folder / "pictures", share)

    def report(self) -> None:
        """Write the report, and say what was found and where it is."""
        lines = [self._table, f"run folder: {self.folder}"]
        if self._pages:
            rows = comparison_rows(self.config.data.dataset) if self.config.compared else []
            decided = Decided.joined([part.decided for part in self.parts if part.decided is not None])
            with spared(self.folder / "report.html"):
                path = report_run(
                    self.folder, self._pages, self.config, unseen=self.unseen, decided=decided, published=rows
                )
                lines.append(f"report: {path}")
        print("\n".join(lines))  # when all is written


def results_of(
    parts: Sequence[EvalResult], config: Config, best: dict[str, dict[str, float]] | None, unseen: bool
) -> Results:
    """All `parts` (one, or one per single-class model) together."""
    classes = {name: result for part in parts for name, result in part.classes.items()}
    by_name: dict[str, list[ImageResult]] = {name: [] for name in classes}
    for image in (image for part in parts for image in part.images):
        by_name[image.class_name].append(image)
    drawn = {name: ([i.label for i in images], [i.score for i in images]) for name, images in by_name.items()}
    count, evaluated = config.eval.bootstrap, any(by_name.values())
    chosen = [(image.concept, image.class_name) for part in parts for image in part.images if image.concept is not None]
    shared = config.data.multi_class  # models of their own have concepts of their own
    return Results(
        classes=classes, best_on_test=best, config=config, evaluated=evaluated, unseen=unseen,
        intervals=bootstrap(drawn, count, config.run.seed) if count and evaluated else None,
        concepts=agreement(*zip(*chosen, strict=True)) if chosen and shared and len(classes) > 1 else None,
        decided=Decided.joined([p.decided for p in parts if p.decided is not None]) if evaluated else None,
    )  # fmt: skip


def on_classes_there(content: dict[str, Any], config: Config, chosen: dict[str, Any]) -> Config | None:
    """Unless classes were asked for by name: those of a checkpoint's classes that the data set holds, None if none."""
    own, asked = content.get("classes"), chosen.get("class_names", ("all",))
    if own is None:  # an official checkpoint names none
        return config
    names = present_classes(config.data, own) if "all" in asked else config.data.class_names
    return replace(config, data=replace(config.data, class_names=names)) if names else None


def run_test(config: Config, chosen: dict[str, Any]) -> None:
    """Evaluate a checkpoint, or all single-class checkpoints of a run folder.

    Args:
        config: the resolved configuration.
        chosen: what the preset and the user chose by name; a checkpoint's own settings stand for the rest.
    """
    assert config.eval.eval_ckpt is not None
    ended: Ended | None = None
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
        with stage.reading():
            found = evaluate(detector, batches, class_names, own.eval, wanted=pictured(test, own.eval), test=test)
        sets = (*split_holdout(train, own.data.holdout), test)
        ended = ended or Ended(new_run(own), own)
        ended.unseen &= are_unseen(*sets[:2])
        ended.add(found)
        names = tuple(name for part in ended.parts for name in part.classes)
        ended.config = replace(own, data=replace(own.data, class_names=names))
        write_config(ended.folder, ended.config)
        ended.write_tables()  # anew with each model: whether another one has test images is not known yet
        ended.show(stage, detector, sets, len(class_names) * len(paths))
    if ended is None:
        raise UsageError(
            f"--data-path: no class of {config.eval.eval_ckpt} with test images is there; --mode predict judges images "
            "without labels"
        )
    ended.report()
