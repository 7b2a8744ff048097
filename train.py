"""The training loop: meta epochs of sub epochs, each followed by an evaluation; the last one is the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets import are_unseen, build_datasets, protocols, resolve_classes, split_holdout
from datasets.features import FeatureBatch
from datasets.folder import ImageFolder
from datasets.reading import Reading
from default import KEPT, Config, TrainConfig, UsageError, flat, from_dict, settings_of, to_dict
from models.detector import Detector
from models.first_look import first_look
from models.loss import loss_terms
from models.official import load_strictly
from models.vqflow import VQFlow
from show import pictured, present
from stage import Source, Stage, load_decision, load_scorer
from supply import Supply, kept, supply_of
from test import evaluate, finish
from utils.report.images import EvalResult
from utils.report.page import ClassPage
from utils.report.verdicts import write_scores
from utils.run.checkpoint import read_checkpoint, write_checkpoint
from utils.run.device import autocast
from utils.run.folders import new_folder, resumed_run, run_name, write_config
from utils.run.lock import locked
from utils.run.log import RunLog, optional
from utils.run.profile import traced
from utils.run.progress import progress
from utils.run.schedule import learning_rate
from utils.run.seed import random_state, restore_random_state
from utils.run.text import printable

LAST, BEST = "last.pt", "best_on_test.pt"
LIKELIHOOD = {"likelihood": "bits_per_dim", "released": "objective_per_dim"}  # the latter in nats: no density


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """Means over a sub epoch: `loss` and `nll` in nats per image (with noise, and batch statistics in the norms),
    `commitment`, `grad_norm` before clipping; the last learning rate `lr`; `images` and `seconds`."""

    loss: float
    nll: float
    commitment: float
    grad_norm: float
    lr: float
    images: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """The last evaluation, and for each metric the best value on the test set with its meta epoch."""

    last: EvalResult
    best_on_test: dict[str, dict[str, float]]


def train_epoch(
    model: VQFlow,
    batches: Iterable[FeatureBatch],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    start: float,
    step: float,
) -> EpochStats:
    """One sub epoch. `start` is the share of the run already done, `step` the share that one batch adds.

    Raises:
        UsageError: the loss is no longer finite.
    """
    model.train()
    began, images, count = time.perf_counter(), 0, 0
    sums: Tensor | None = None
    for group in grouped(batches, config.accumulate):
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate(config, start + count * step)
        optimizer.zero_grad(set_to_none=True)
        rows = []
        for batch in group:
            with autocast(batch.label.device, config.amp_enable):
                output = model(batch.features, noise=config.noise)
                terms = loss_terms(output, config.quantize_weight)
            (terms.total / len(group)).backward()
            rows.append(torch.stack([terms.total, terms.nll, terms.commitment]).detach().double())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        row = torch.cat([torch.stack(rows).sum(0), norm.detach().double()[None] * len(group)])
        sums = row if sums is None else sums + row
        images, count = images + sum(len(batch.path) for batch in group), count + len(group)
    assert sums is not None
    loss, nll, commitment, norm = (sums / count).tolist()
    if not all(map(torch.isfinite, sums)):
        raise UsageError(f"--lr: training diverged (loss {loss}) with a learning rate of {config.lr}; lower it")
    return EpochStats(
        loss=loss, nll=nll, commitment=commitment, grad_norm=norm,
        lr=optimizer.param_groups[0]["lr"], images=images, seconds=time.perf_counter() - began,
    )  # fmt: skip


def grouped(batches: Iterable[FeatureBatch], size: int) -> Iterator[list[FeatureBatch]]:
    """`size` batches at a time; the last group may be smaller."""
    running = iter(batches)
    while group := list(islice(running, size)):
        yield group


def bits_per_dim(nll: float) -> float:
    """Negative log-density in bits per dimension, from nats per dimension without the Gaussian's constant."""
    return nll / math.log(2) + math.log2(2 * math.pi) / 2


def plain_decision(detector: Detector) -> dict[str, Any] | None:
    """What a checkpoint keeps of the thresholds."""
    return None if detector.decision is None else detector.decision.calibrated.plain()


class Trainer:
    """One training run in its folder.

    Args:
        config: the resolved configuration.
        detector: on its device.
        supply: features of the training images.
        evaluate: evaluates the detector on the test images.
        folder: receives checkpoints and metrics.jsonl.
        identity: stored in checkpoints beside the config (classes, channels, the extractor's fingerprint).
    """

    def __init__(
        self,
        config: Config,
        detector: Detector,
        *,
        supply: Supply,
        evaluate: Callable[[Detector], EvalResult],
        folder: Path,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.detector, self.flow, self.supply = config, detector, detector.flow, supply
        self.evaluate, self.folder, self.identity = evaluate, folder, identity
        train = config.train
        self.optimizer = torch.optim.AdamW(
            [p for p in self.flow.parameters() if p.requires_grad],
            lr=train.lr,
            weight_decay=train.weight_decay,
            fused=next(self.flow.parameters()).device.type in ("cuda", "cpu"),
        )
        self.best: dict[str, dict[str, float]] = {}

    def fit(self, saved: dict[str, Any] | None = None) -> FitResult:
        """Train to the end, from the start or from a checkpoint's content."""
        train = self.config.train
        done = self._restore(saved) if saved else 0
        if train.resume:
            print(printable(resume_line(self.folder, done, train.meta_epochs)))
        if not saved:
            supply = self.supply
            first_look(self.detector, kept(supply.everything), images=supply.images, batch_size=train.batch_size)
        log = RunLog(
            self.folder, kept=done, config=to_dict(self.config), tensorboard=train.tensorboard, wandb=train.wandb_enable
        )
        result: EvalResult | None = None
        for epoch in range(done, train.meta_epochs):
            result = self._meta_epoch(epoch, log)
        log.close()
        return FitResult(last=result or self.evaluate(self.detector), best_on_test=self.best)

    def _meta_epoch(self, epoch: int, log: RunLog) -> EvalResult | None:
        """Sub epochs, evaluation, checkpoints and a line in the log."""
        train, last = self.config.train, epoch + 1 == self.config.train.meta_epochs
        books = self.flow.hierarchy.codebooks()
        for book in books.values():
            book.reset_usage()
        share = 1 / (train.meta_epochs * train.sub_epochs)
        for sub in range(epoch * train.sub_epochs, (epoch + 1) * train.sub_epochs):
            batches = self.supply.training(sub)
            if train.profile and sub == 0:
                batches = traced(batches, train.profile * train.accumulate, self.folder / "trace.json")
            step = share / self.supply.steps
            stats = train_epoch(self.flow, batches, self.optimizer, train, start=sub * share, step=step)
        usage = {name: book.statistics() for name, book in books.items()}
        if train.reassign_quantize:
            for book in books.values():
                book.reassign()
        wanted = last or (epoch + 1) % self.config.eval.eval_interval == 0
        likelihood = self._calibrate()  # every checkpoint that is written is calibrated
        result = self.evaluate(self.detector) if wanted else None
        improved = self._note_best(result, epoch + 1) if result else False
        mean = asdict(result.mean) if result else None
        name = LIKELIHOOD[self.config.model.objective]
        log.write({"epoch": epoch + 1, "train": asdict(stats), name: likelihood, "codebooks": usage, "test": mean})
        self._save(epoch + 1, improved)  # after the log: a resumed run drops entries that no checkpoint covers
        print(progress_line(self.config, epoch + 1, stats, likelihood, result))
        return result

    def _calibrate(self) -> dict[str, float]:
        """Units and thresholds from held-out images, or from training images that do not meet themselves in the memory.

        The noise-free negative log-likelihood of both kinds, in eval mode: by `LIKELIHOOD`.
        """
        supply, detector, config = self.supply, self.detector, self.config.eval
        if supply.units is None:
            found = {"train": detector.calibrate(kept(supply.sample), own=False)}
            detector.learn_decision(kept(supply.sample), config, own=False, unseen=False)
        else:
            seen = detector.nll_per_dim(kept(supply.sample))
            found = {"train": seen, "held_out": detector.calibrate(kept(supply.units))}
            detector.learn_decision(kept(supply.deciding) if supply.deciding else (), config)
        exact = self.config.model.objective == "likelihood"
        return {kind: bits_per_dim(nll) if exact else nll for kind, nll in found.items()}

    def _note_best(self, result: EvalResult, epoch: int) -> bool:
        """Keep each metric's best value; whether the mean image AUROC is the best so far."""
        improved = False
        for name, value in asdict(result.mean).items():
            if value == value and value > self.best.get(name, {"value": -1.0})["value"]:
                self.best[name] = {"value": value, "epoch": epoch}
                improved |= name == "image_auroc"
        return improved

    def _save(self, epoch: int, improved: bool) -> None:
        content = self.identity | {
            "config": to_dict(self.config), "epoch": epoch, "model": self.flow.state_dict(),
            "scorer": {"rule": self.detector.scorer.rule.plain(), "state": self.detector.scorer.state_dict()},
            "best_on_test": self.best, "decision": plain_decision(self.detector),
        }  # fmt: skip
        if improved:
            write_checkpoint(self.folder / BEST, content)
        write_checkpoint(
            self.folder / LAST, content | {"optimizer": self.optimizer.state_dict(), "random": random_state()}
        )

    def _restore(self, saved: dict[str, Any]) -> int:
        """Everything that the next step depends on; the number of finished meta epochs."""
        load_strictly(self.flow, saved["model"], "--resume")
        scorer = load_scorer(saved, self.config.model, self.flow.channels, "--resume")
        self.detector.scorer = scorer.to(next(self.flow.parameters()).device)
        self.detector.decision = load_decision(saved, self.config, "--resume")
        self.optimizer.load_state_dict(saved["optimizer"])
        restore_random_state(saved["random"])
        self.best = saved["best_on_test"]
        return saved["epoch"]


def run_training(config: Config) -> Path:
    """Train one model for all classes, or one per class; write and show the table at the end; the run folder."""
    class_names = resolve_classes(config.data)
    groups = [class_names] if config.data.multi_class else [(name,) for name in class_names]
    prepared = [build_datasets(config.data, group, config.score_size) for group in groups]
    check_loggers(config.train)
    stage = Stage(config)
    splits = [split_holdout(train, config.data.holdout) for train, _ in prepared]
    sources = [stage.training_features(kept) for kept, _ in splits]  # features that do not fit end here
    folder = (resumed_run(config) if config.train.resume else None) or new_folder(config.run.work_dir, run_name(config))
    with locked(folder, "--resume"):
        for group, (kept, _) in zip(groups, prepared, strict=True):  # before anything is written
            saved_state(stage, group, own_folder(folder, config, group), kept.readings)
        write_config(folder, config)
        images = sum(len(kept) for kept, _ in splits)
        print(f"{len(class_names)} classes, {images} training images; run folder: {folder}")
        parts: list[EvalResult] = []
        pages: dict[str, ClassPage] = {}
        best: dict[str, dict[str, float]] | None = None
        for group, (_, test_set), (kept, normal), source in zip(groups, prepared, splits, sources, strict=True):
            own = own_folder(folder, config, group)
            own.mkdir(exist_ok=True)
            if not config.data.multi_class:
                print(f"class {printable(group[0])}")
            detector = stage.build_detector()
            with stage.reading():
                fitted = fit_group(stage, detector, group, source, (kept, normal, test_set), own)
            parts.append(fitted.last)
            best = fitted.best_on_test if config.data.multi_class else None
            if not test_set.items:
                continue
            write_scores(folder, (image for part in parts for image in part.images))
            sets = (kept, normal, test_set)
            pages |= present(stage, detector, sets, fitted.last, folder / "pictures", len(class_names))
        finish(folder, config, parts, best, pages, unseen=all(are_unseen(*split) for split in splits))
    return folder


def fit_group(
    stage: Stage,
    detector: Detector,
    group: tuple[str, ...],
    source: Source,
    others: tuple[ImageFolder, ImageFolder, ImageFolder],
    folder: Path,
) -> FitResult:
    """Train one detector on the classes of `group`, from its checkpoint on if the run is resumed.

    `others` are the training images, the normal images that calibrate, and the test images.
    """
    config, (training, normal, test_set) = stage.config, others
    test_source = stage.ordered_features(test_set) if test_set.items else None
    wanted = pictured(test_set, config.eval)

    def evaluation(detector: Detector) -> EvalResult:
        if test_source is None:
            return evaluate(detector, (), group, config.eval)
        batches = progress(test_source.epoch(0), total=len(test_source), text="evaluation")
        extra = protocols(config.data, group, test_set.items)
        return evaluate(detector, batches, group, config.eval, wanted=wanted, extra=extra)

    supply = supply_of(stage, source, training, normal if are_unseen(training, normal) else None)
    own = identity(stage, group, training.readings)
    trainer = Trainer(config, detector, supply=supply, evaluate=evaluation, folder=folder, identity=own)
    return trainer.fit(saved_state(stage, group, folder, training.readings))


def own_folder(folder: Path, config: Config, group: tuple[str, ...]) -> Path:
    """Where the model of `group` lies: in the run folder, or in one of its own where each class has a model."""
    return folder if config.data.multi_class else folder / group[0]


def identity(stage: Stage, group: tuple[str, ...], readings: Sequence[Reading]) -> dict[str, Any]:
    """What a checkpoint belongs to, beside its config."""
    mean, std = stage.extractor.normalization
    return {
        "classes": list(group), "channels": list(stage.extractor.channels), "normalization": [list(mean), list(std)],
        "extractor": stage.fingerprint, "readings": {n: r.plain() for n, r in zip(group, readings, strict=True)},
    }  # fmt: skip


def saved_state(
    stage: Stage, group: tuple[str, ...], folder: Path, readings: Sequence[Reading]
) -> dict[str, Any] | None:
    """The checkpoint that a resumed run goes on from, None if there is none (yet).

    Raises:
        UsageError: it is damaged, or of another model, other classes or other weights of the extractor.
    """
    path, config = folder / LAST, stage.config
    if not (config.train.resume and path.is_file()):
        return None
    saved = read_checkpoint(path, "--resume")
    if not {"config", "epoch", "model", "optimizer", "random", "best_on_test"} <= saved.keys():
        raise UsageError(f"--resume: {path} is not a checkpoint that training can go on from")
    was, now = flat(to_dict(from_dict(saved["config"]))), flat(to_dict(config))
    others = [name for name, value in identity(stage, group, readings).items() if saved.get(name) != value]
    for name in [*others, *(name for name in settings_of(*KEPT) if was[name] != now[name])]:
        raise UsageError(f"--resume: {path} is of another run: its {name} differs")
    return saved


def resume_line(folder: Path, done: int, total: int) -> str:
    """Says from where --resume goes on."""
    if done >= total:
        return f"--resume: {folder} has its {total} meta epochs; it is evaluated"
    return f"--resume: {folder} goes on with meta epoch {done + 1} of {total}" + ("" if done else ", the first")


def progress_line(
    config: Config, epoch: int, stats: EpochStats, likelihood: Mapping[str, float], result: EvalResult | None
) -> str:
    """One line for a finished meta epoch; `loc_eval` and `pro_eval` choose which metrics it shows."""
    last = config.train.meta_epochs
    words = LIKELIHOOD[config.model.objective].replace("_per_", "/")
    line = f"meta epoch {epoch}/{last}  loss {stats.loss:.4g}  {words} {likelihood['train']:.3f}"
    if "held_out" in likelihood:
        line += f" (held out: {likelihood['held_out']:.3f})"
    if result is None or not result.images:
        return line
    line += f"  image AUROC {100 * result.mean.image_auroc:.1f}"
    if config.eval.loc_eval or epoch == last:
        line += f"  pixel AUROC {100 * result.mean.pixel_auroc:.1f}"
    if (config.eval.pro_eval and epoch % config.eval.pro_eval_interval == 0) or epoch == last:
        line += f"  AUPRO {100 * result.mean.aupro:.1f}"
    return line


def check_loggers(config: TrainConfig) -> None:
    """Raise `UsageError` early if a logger that was asked for is not installed."""
    if config.tensorboard:
        optional("torch.utils.tensorboard", "--tensorboard", "tensorboard")
    if config.wandb_enable:
        optional("wandb", "--wandb-enable", "wandb")
