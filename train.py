"""Training: a model for all classes or one for each, trained, evaluated and shown in one run folder."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path

from datasets import are_unseen, build_datasets, protocols, resolve_classes, split_holdout
from datasets.folder import ImageFolder
from default import Config, TrainConfig
from models.detector import Detector
from resume import identity, saved_state
from show import pictured, present
from stage import Source, Stage
from supply import supply_of
from test import Ended, evaluate
from trainer import FitResult, Trainer
from utils.report.images import EvalResult
from utils.run.distributed import alone, from_first, gathered, is_first, processes, queue, wait
from utils.run.folders import new_folder, resumed_run, run_name, write_config
from utils.run.lock import locked
from utils.run.log import optional
from utils.run.progress import progress
from utils.run.text import printable


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one model is made of: its classes and their images, all normal ones (`train`), those of them that are
    trained on (`kept`), those that calibrate (`normal`), and the test images."""

    classes: tuple[str, ...]
    train: ImageFolder
    kept: ImageFolder
    normal: ImageFolder
    test: ImageFolder

    @property
    def unseen(self) -> bool:
        return are_unseen(self.kept, self.normal)


def parts_of(config: Config, class_names: tuple[str, ...]) -> list[Part]:
    """One for all classes, or one for each."""
    made = []
    for group in [class_names] if config.data.multi_class else [(name,) for name in class_names]:
        train, test = build_datasets(config.data, group, config.score_size)
        kept, normal = split_holdout(train, config.data.holdout, config.data.holdout_seed)
        made.append(Part(classes=group, train=train, kept=kept, normal=normal, test=test))
    return made


def fitting(config: Config, parts: list[Part]) -> Config:
    """Without a memory where a model has a single training image, which there is nothing to compare with."""
    if not config.model.memory or min(len(part.kept.tiled) for part in parts) > 1:
        return config
    if is_first():
        print("--memory: left out, as there is a single training image, which there is nothing to compare with")
    return replace(config, model=replace(config.model, memory=0))


def run_training(config: Config) -> Path:
    """Train one model for all classes, or one per class; write and show the table at the end; the run folder."""
    class_names = resolve_classes(config.data)
    parts = parts_of(config, class_names)
    config = fitting(config, parts)
    check_loggers(config.train)
    stage = Stage(config)
    queued = processes() > 1 and not config.data.multi_class
    sources = [] if queued else [stage.training_features(p.kept) for p in parts]  # features that do not fit end here
    folder = from_first(lambda: run_folder(config))
    with locked(folder, "--resume") if is_first() else contextlib.nullcontext():
        for part in parts:  # before anything is written
            saved_state(stage, part.classes, own_folder(folder, config, part.classes), part.train)
        wait()
        if is_first():
            write_config(folder, config)
        images = sum(len(part.kept) for part in parts)
        print(f"{len(class_names)} classes, {images} training images; run folder: {folder}")
        ended = Ended(folder, config, unseen=all(part.unseen for part in parts))
        if queued:
            train_queued(stage, parts, folder, ended)
        for part, source in zip(() if queued else parts, sources, strict=True):
            own = own_folder(folder, config, part.classes)
            own.mkdir(exist_ok=True)
            if not config.data.multi_class:
                print(f"class {printable(part.classes[0])}")
            detector = stage.build_detector()
            with stage.reading():
                fitted = fit_part(stage, detector, part, source, own)
            ended.best = fitted.best_on_test if config.data.multi_class else None
            ended.add(fitted.last)
            if part is parts[-1]:
                ended.write_tables()
            if part.test.items:
                ended.show(stage, detector, (part.kept, part.normal, part.test), len(class_names))
        ended.report()
    return folder


def train_queued(stage: Stage, parts: list[Part], folder: Path, ended: Ended) -> None:
    """A model for each class in several processes: each trains the next class that none has taken, by itself."""
    made = []
    for number in queue(f"classes of {folder}", range(len(parts))):
        part = parts[number]
        own = own_folder(folder, stage.config, part.classes)
        own.mkdir(exist_ok=True)
        print(f"class {printable(part.classes[0])}")
        with alone():
            detector = stage.build_detector()
            with stage.reading():
                found = fit_part(stage, detector, part, stage.training_features(part.kept), own).last
            sets, pages = (part.kept, part.normal, part.test), {}
            if part.test.items:
                pages = present(stage, detector, sets, found, folder / "pictures", len(parts))
        made.append((number, replace(found, maps={}), pages))
    for _, found, pages in sorted((row for rows in gathered(made) for row in rows), key=lambda row: row[0]):
        ended.add(found)
        ended.pages |= pages
    ended.write_tables()


def run_folder(config: Config) -> Path:
    """A new run folder, or the one that --resume goes on in."""
    found = resumed_run(config) if config.train.resume else None
    folder = found or new_folder(config.run.work_dir, run_name(config))
    if config.train.resume and not found:
        print(f"--resume: there is no run {run_name(config)} in {config.run.work_dir} yet; a new one starts")
    return folder


def fit_part(stage: Stage, detector: Detector, part: Part, source: Source, folder: Path) -> FitResult:
    """Train one detector on its part's classes, from its checkpoint on if the run is resumed."""
    config = stage.config
    test_source = stage.test_features(part.test) if part.test.items else None
    wanted = pictured(part.test, config.eval)

    def evaluation(detector: Detector) -> EvalResult:
        if test_source is None:
            return evaluate(detector, (), part.classes, config.eval)
        batches = progress(test_source.epoch(0), total=len(test_source), text="evaluation")
        extra = protocols(config.data, part.classes, part.test.items)
        size = stage.ordered_size
        return evaluate(
            detector, batches, part.classes, config.eval, wanted=wanted, size=size, extra=extra, test=part.test
        )

    supply = supply_of(stage, source, part.kept, part.normal if part.unseen else None)
    own, saved = identity(stage, part.classes, part.train), saved_state(stage, part.classes, folder, part.train)
    wait()  # until all have read what the first one will replace
    trainer = Trainer(config, detector, supply=supply, evaluate=evaluation, folder=folder, identity=own)
    return trainer.fit(saved)


def own_folder(folder: Path, config: Config, group: tuple[str, ...]) -> Path:
    """Where the model of `group` lies: in the run folder, or in one of its own where each class has a model."""
    return folder if config.data.multi_class else folder / group[0]


def check_loggers(config: TrainConfig) -> None:
    """Raise `UsageError` early if a logger that was asked for is not installed."""
    if config.tensorboard:
        optional("torch.utils.tensorboard", "--tensorboard", "tensorboard")
    if config.wandb_enable:
        optional("wandb", "--wandb-enable", "wandb")
