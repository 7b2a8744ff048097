"""The evaluation loop: a model over the test images, once, into the metrics of every class."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from datasets import are_unseen, build_datasets, present_classes, protocols, resolve_classes, split_holdout
from datasets.features import FeatureBatch
from datasets.folder import ImageFolder, Protocol
from default import Config, EvalConfig, UsageError
from judging import Judged, judged, measured, of_image, stitched
from models.decision import Verdict
from models.detector import Detector
from show import pictured, present, spared
from stage import Stage, find_checkpoints, image_readings, load_detector, normalization_of, settled_config
from utils.metrics import ClassAccumulator, mean_results
from utils.metrics.bootstrap import bootstrap
from utils.metrics.concepts import agreement
from utils.metrics.decisions import Decided, Rate
from utils.metrics.published import comparison_rows
from utils.report.images import Album, EvalResult, ImageResult, joined_albums
from utils.report.page import ClassPage, curves_of, report_run
from utils.report.results import Results, write_results
from utils.report.verdicts import write_scores
from utils.run.behind import behind
from utils.run.checkpoint import read_checkpoint
from utils.run.distributed import from_first, gathered, interleaved, is_first, processes, rank
from utils.run.folders import new_run, write_config
from utils.run.progress import progress

Gathering = TypeVar("Gathering", ClassAccumulator, Protocol)


def evaluate(
    detector: Detector,
    batches: Iterable[FeatureBatch],
    class_names: Sequence[str],
    config: EvalConfig,
    *,
    wanted: Collection[int] = (),
    size: int = 1,
    extra: Mapping[str, Protocol] = MappingProxyType({}),
    test: ImageFolder | None = None,
) -> EvalResult:
    """Score every image of `batches`, whose masks have the detector's size, and compute each class's metrics.

    The detector is put into eval mode, and back as it was. Shown maps are kept of the `wanted` images in any case.
    Of several processes each scores its share of the images, in batches of `size`; curves, maps and `extra` are the
    first one's alone. `extra`: by class, metrics of the data set's own. `test`: the images, in order, without which
    all are taken for squares.
    """
    was_training = detector.training
    detector.eval()
    found = Found({name: ClassAccumulator(fpr_limit=config.fpr_limit) for name in class_names}, [], Album(wanted))
    tiled = test is not None and test.geometry.tile is not None
    size = 1 if tiled else size

    def add(number: int, said: Judged) -> None:
        first = sum(map(len, found.images)) if processes() == 1 else (number * processes() + rank()) * size
        for part in measured(said, test, first, config):
            found.measure(part, class_names, config)
        for row, index in enumerate(said.batch.class_index.tolist() if extra else ()):
            if protocol := extra.get(class_names[index]):
                heat = of_image(said.maps[config.pro_score][row], test, first + row)
                protocol.add(said.batch.path[row], int(said.batch.label[row]), float(said.scores[row]), heat)
        verdict = None if detector.decision is None else detector.decision(said.scores, said.concept)
        shown = said.maps[config.shown_score]
        found.images.append(list(image_results(said, class_names, shown, verdict)))
        for place, (image, heat) in enumerate(zip(found.images[-1], shown, strict=True), start=first):
            kept = highest(heat, detector.size) if tiled else heat
            found.album.add(place, image.group, image.score, kept.cpu().numpy())

    rows = stitched(detector, batches, config, test) if test and tiled else judged(detector, batches, config)
    with behind(detector.scorer.mean.device) as later:
        for number, said in enumerate(rows):
            later(partial(add, number, said))
    detector.train(was_training)
    whole = of_all(extra)
    return replace(found.result(detector, config), extra={name: own.results() for name, own in whole.items()})


@dataclass
class Found:
    """What an evaluation, or a process's share of it, has found so far; the images batch by batch."""

    accumulators: dict[str, ClassAccumulator]
    images: list[list[ImageResult]]
    album: Album

    def measure(self, said: Judged, class_names: Sequence[str], config: EvalConfig) -> None:
        """Add to the classes' metrics."""
        for index, own in by_class(said.batch.class_index):
            self.accumulators[class_names[index]].update(
                labels=said.batch.label[own], scores=said.scores[own], masks=said.batch.mask[own],
                maps=said.maps[config.pixel_score][own], pro_maps=said.maps[config.pro_score][own],
            )  # fmt: skip

    def result(self, detector: Detector, config: EvalConfig) -> EvalResult:
        """Of all processes' images together."""
        images = interleaved(self.images)
        merged = of_all(self.accumulators)
        classes = from_first(lambda: {name: accumulator.compute() for name, accumulator in merged.items()})
        return EvalResult(
            classes=classes, mean=mean_results(classes), images=tuple(images),
            maps=joined_albums(images, gathered(self.album.maps), self.album.wanted),
            curves={name: curves_of(accumulator) for name, accumulator in merged.items()},
            decided=decided_by(detector, images, config.false_alarm_rate),
        )  # fmt: skip


def of_all(gathering: Mapping[str, Gathering]) -> dict[str, Gathering]:
    """By class, in the first process, what all processes have gathered; nothing in the others."""
    return {name: added_up(parts) for name, own in gathering.items() if (parts := gathered(own))}


def added_up(parts: Sequence[Gathering]) -> Gathering:
    """The first of what a class's images have been gathered in, with what the others hold."""
    whole, *others = parts
    for other in others:
        whole.merge(other)  # type: ignore[arg-type]  # of the same kind
    return whole


def image_results(
    said: Judged, class_names: Sequence[str], shown: Tensor, verdict: Verdict | None
) -> Iterator[ImageResult]:
    """What is said of each image of a batch, with its `shown` maps (B, H, W)."""
    batch, concept = said.batch, said.concept
    height, width = shown.shape[1:]
    values, places = shown.flatten(1).max(1)
    masks = batch.mask.flatten(1)
    inside, marked = masks.gather(1, places[:, None])[:, 0].tolist(), masks.any(1).tolist()
    for row, (path, index, label, place) in enumerate(
        zip(batch.path, batch.class_index.tolist(), batch.label.tolist(), places.tolist(), strict=True)
    ):
        yield ImageResult(
            path=path, class_name=class_names[index], label=label, score=float(said.scores[row]),
            concept=None if concept is None else int(concept[row]),
            peak=((place % width + 0.5) / width, (place // width + 0.5) / height), peak_value=float(values[row]),
            hit=inside[row] if marked[row] else None,
            p_value=None if verdict is None else float(verdict.p_value[row]),
            threshold=None if verdict is None else float(verdict.threshold[row]),
            defective=None if verdict is None else bool(verdict.defective[row]),
            high=None if verdict is None else float(verdict.pixel_threshold[row]),
        )  # fmt: skip


def highest(heat: Tensor, side: int) -> Tensor:
    """A map (H, W) in a picture's size, (side, side): a small defect must not get lost."""
    return adaptive_max_pool2d(heat[None], side)[0]


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


class Ended:
    """What is written when models have been evaluated: the scores of all images so far, the tables, and only then
    pictures and report, without which nothing is lost. Of several processes the first one writes.

    Args:
        folder: the run folder.
        config: of the run.
        unseen: no image that calibrates was trained on.
    """

    def __init__(self, folder: Path, config: Config, *, unseen: bool = True) -> None:
        self.folder, self.config, self.unseen = folder, config, unseen
        self.best: dict[str, dict[str, float]] | None = None  # see `Results`
        self.parts: list[EvalResult] = []
        self.pages: dict[str, ClassPage] = {}
        self._table = ""

    def add(self, part: EvalResult) -> None:
        """A model's evaluation."""
        self.parts.append(part)
        if part.images and is_first():
            write_scores(self.folder, (image for part in self.parts for image in part.images))

    def write_tables(self) -> None:
        """The tables of all that was added."""
        if is_first():
            self._table = write_results(self.folder, results_of(self.parts, self.config, self.best, self.unseen))

    def show(
        self, stage: Stage, detector: Detector, sets: tuple[ImageFolder, ImageFolder, ImageFolder], share: int
    ) -> None:
        """Pictures of what was added last: see `present`."""
        if is_first():
            self.pages |= present(stage, detector, sets, self.parts[-1], self.folder / "pictures", share)

    def report(self) -> None:
        """Write the report, and say what was found and where it is."""
        lines = [self._table, f"run folder: {self.folder}"]
        if self.pages:
            rows = comparison_rows(self.config.data.dataset) if self.config.compared else []
            decided = Decided.joined([part.decided for part in self.parts if part.decided is not None])
            with spared(self.folder / "report.html"):
                path = report_run(
                    self.folder, self.pages, self.config, unseen=self.unseen, decided=decided, published=rows
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
        extra={name: metrics for part in parts for name, metrics in part.extra.items()},
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
        source = stage.test_features(test)
        batches = progress(source.epoch(0), total=len(source), text="evaluation")
        extra = protocols(own.data, class_names, test.items)
        with stage.reading():
            found = evaluate(
                detector, batches, class_names, own.eval, wanted=pictured(test, own.eval), size=stage.ordered_size,
                extra=extra, test=test,
            )  # fmt: skip
        sets = (*split_holdout(train, own.data.holdout, own.data.holdout_seed), test)
        ended = ended or Ended(from_first(partial(new_run, own)), own)
        ended.unseen &= are_unseen(*sets[:2])
        ended.add(found)
        names = tuple(name for part in ended.parts for name in part.classes)
        ended.config = replace(own, data=replace(own.data, class_names=names))
        if is_first():
            write_config(ended.folder, ended.config)
        ended.write_tables()  # anew with each model: whether another one has test images is not known yet
        ended.show(stage, detector, sets, len(class_names) * len(paths))
    if ended is None:
        raise UsageError(
            f"--data-path: no class of {config.eval.eval_ckpt} with test images is there; --mode predict judges images "
            "without labels"
        )
    ended.report()
