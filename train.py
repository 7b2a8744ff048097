"""Training: a model for all classes or one for each, trained, evaluated and shown in one run folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets import are_unseen, build_datasets, resolve_classes, split_holdout
from datasets.folder import ImageFolder
from default import Config, TrainConfig
from models.detector import Detector
from resume import identity, saved_state
from show import pictured
from stage import Source, Stage
from supply import supply_of
from test import Ended, evaluate
from trainer import FitResult, Trainer
from utils.report.images import EvalResult
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
        kept, normal = split_holdout(train, config.data.holdout)
        made.append(Part(classes=group, train=train, kept=kept, normal=normal, test=test))
    return made


def run_training(config: Config) -> Path:
    """Train one model for all classes, or one per class; write and show the table at the end; the run folder."""
    class_names = resolve_classes(config.data)
    parts = parts_of(config, class_names)
    check_loggers(config.train)
    stage = Stage(config)
    sources = [stage.training_features(part.kept) for part in parts]  # features that do not fit end here
    folder = run_folder(config)
    with locked(folder, "--resume"):
        for part in parts:  # before anything is written
            saved_state(stage, part.classes, own_folder(folder, config, part.classes), part.train)
        write_config(folder, config)
        images = sum(len(part.kept) for part in parts)
        print(f"{len(class_names)} classes, {images} training images; run folder: {folder}")
        ended = Ended(folder, config, unseen=all(part.unseen for part in parts))
        for part, source in zip(parts, sources, strict=True):
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
    test_source = stage.ordered_features(part.test) if part.test.items else None
    wanted = pictured(part.test, config.eval)

    def evaluation(detector: Detector) -> EvalResult:
        if test_source is None:
            return evaluate(detector, (), part.classes, config.eval)
        batches = progress(test_source.epoch(0), total=len(test_source), text="evaluation")
        return evaluate(detector, batches, part.classes, config.eval, wanted=wanted, test=part.test)

    supply = supply_of(stage, source, part.kept, part.normal if part.unseen else None)
    own = identity(stage, part.classes, part.train)
    trainer = Trainer(config, detector, supply=supply, evaluate=evaluation, folder=folder, identity=own)
    return trainer.fit(saved_state(stage, part.classes, folder, part.train))


def own_folder(folder: Path, config: Config, group: tuple[str, ...]) -> Path:
    """Where the model of `group` lies: in the run folder, or in one of its own where each class has a model."""
    return folder if config.data.multi_class else folder / group[0]


def check_loggers(config: TrainConfig) -> None:
    """Raise `UsageError` early if a logger that was asked for is not installed."""
    if config.tensorboard:
        optional("torch.utils.tensorboard", "--tensorboard", "tensorboard")
    if config.wandb_enable:
        optional("wandb", "--wandb-enable", "wandb")
