"""The training loop: meta epochs of sub epochs, each followed by an evaluation; the last one is the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from datasets import build_datasets, resolve_classes, split_holdout
from datasets.features import FeatureBatch
from datasets.folder import ImageFolder
from datasets.reading import Reading
from default import Config, TrainConfig, UsageError, to_dict
from models.loss import loss_terms
from models.official import load_strictly
from models.vqflow import VQFlow
from stage import Source, Stage
from test import EvalResult, evaluate, finish, report_pages, save_pictures
from utils.report.page import ClassPage
from utils.run.checkpoint import read_checkpoint, write_checkpoint
from utils.run.device import autocast
from utils.run.folders import new_run, resumed_run, write_config
from utils.run.log import RunLog, optional
from utils.run.profile import traced
from utils.run.schedule import learning_rate
from utils.run.seed import random_state, restore_random_state
from utils.run.text import printable

LAST, BEST = "last.pt", "best_on_test.pt"
SEED_IMAGES = 512  # images in which the codes are placed at the start
FIRST_LOOK = -1  # number of the passes before the first sub epoch

Features = Callable[[int], Iterable[FeatureBatch]]  # sub epoch, or FIRST_LOOK -> batches


@dataclass(frozen=True, kw_only=True)
class EpochStats:
    """Means over a sub epoch: `loss` and `nll` in nats per image, `bits_per_dim`, `commitment`, `grad_norm` before
    clipping; the last learning rate `lr`; `images` and `seconds`."""

    loss: float
    nll: float
    bits_per_dim: float
    commitment: float
    grad_norm: float
    lr: float
    images: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What a training run is fed with: `training` batches of a sub epoch, `steps` of them, and batches of the `normal`
    images that calibrate the scores."""

    training: Features
    steps: int
    normal: Callable[[], Iterable[FeatureBatch]]


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
                output = model.forward_pooled(batch.features, noise=config.noise)
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
        loss=loss, nll=nll, bits_per_dim=bits_per_dim(nll, output.dims), commitment=commitment, grad_norm=norm,
        lr=optimizer.param_groups[0]["lr"], images=images, seconds=time.perf_counter() - began,
    )  # fmt: skip


def grouped(batches: Iterable[FeatureBatch], size: int) -> Iterator[list[FeatureBatch]]:
    """`size` batches at a time; the last group may be smaller."""
    running = iter(batches)
    while group := list(islice(running, size)):
        yield group


def bits_per_dim(nll: float, dims: int) -> float:
    """Negative log-density in bits per dimension of the features, the Gaussian's constant included."""
    return nll / dims / 0.6931471805599453 + 1.3257480647361593  # 1/2 log2(2 pi)


@torch.no_grad()
def initialize(model: VQFlow, features: Features, images: int) -> None:
    """Look at the `images` training images: channel statistics, the start of our codebooks, the memory."""
    if model.config.standardize:
        model.fit_statistics(batch.features for batch in features(FIRST_LOOK))
    if model.config.codebooks == "seeded" and model.config.quantize_enable:
        batches, seen = [], 0
        for batch in features(FIRST_LOOK):
            batches.append(model.standardize(model.for_flows(batch.features)))
            seen += len(batch.path)
            if seen >= SEED_IMAGES:
                break
        model.train()
        model.hierarchy.seed(batches)
    if model.memory is not None:
        everything = (model.standardize(batch.features) for batch in features(FIRST_LOOK))
        model.memory.fit(everything, images=images, size=model.config.memory)


class Trainer:
    """One training run in its folder.

    Args:
        config: the resolved configuration.
        model: on its device.
        supply: features of the training images.
        evaluate: evaluates the model on the test images.
        folder: receives checkpoints and metrics.jsonl.
        identity: stored in checkpoints beside the config (classes, channels, the extractor's fingerprint).
    """

    def __init__(
        self,
        config: Config,
        model: VQFlow,
        *,
        supply: Supply,
        evaluate: Callable[[VQFlow], EvalResult],
        folder: Path,
        identity: dict[str, Any],
    ) -> None:
        self.config, self.model, self.supply = config, model, supply
        self.evaluate, self.folder, self.identity = evaluate, folder, identity
        train = config.train
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=train.lr,
            weight_decay=train.weight_decay,
            fused=next(model.parameters()).device.type in ("cuda", "cpu"),
        )
        self.best: dict[str, dict[str, float]] = {}

    def fit(self, saved: dict[str, Any] | None = None) -> FitResult:
        """Train to the end, from the start or from a checkpoint's content."""
        train = self.config.train
        done = self._restore(saved) if saved else 0
        if not saved:
            initialize(self.model, self.supply.training, self.supply.steps * train.batch_size)
        log = RunLog(
            self.folder, kept=done, config=to_dict(self.config), tensorboard=train.tensorboard, wandb=train.wandb_enable
        )
        result: EvalResult | None = None
        for epoch in range(done, train.meta_epochs):
            result = self._meta_epoch(epoch, log)
        log.close()
        return FitResult(last=result or self.evaluate(self.model), best_on_test=self.best)

    def _meta_epoch(self, epoch: int, log: RunLog) -> EvalResult | None:
        """Sub epochs, evaluation, checkpoints and a line in the log."""
        train, last = self.config.train, epoch + 1 == self.config.train.meta_epochs
        books = self.model.hierarchy.codebooks()
        for book in books.values():
            book.reset_usage()
        share = 1 / (train.meta_epochs * train.sub_epochs)
        for sub in range(epoch * train.sub_epochs, (epoch + 1) * train.sub_epochs):
            batches = self.supply.training(sub)
            if train.profile and sub == 0:
                batches = traced(batches, train.profile * train.accumulate, self.folder / "trace.json")
            step = share / self.supply.steps
            stats = train_epoch(self.model, batches, self.optimizer, train, start=sub * share, step=step)
        usage = {name: book.statistics() for name, book in books.items()}
        if train.reassign_quantize:
            for book in books.values():
                book.reassign()
        wanted = last or (epoch + 1) % self.config.eval.eval_interval == 0
        unseen: float | None = None
        if wanted:
            nll = self.model.calibrate(batch.features for batch in self.supply.normal())
            unseen = bits_per_dim(nll, 1) if self.config.data.holdout else None
        result = self.evaluate(self.model) if wanted else None
        improved = self._note_best(result, epoch + 1) if result else False
        mean = asdict(result.mean) if result else None
        held_out = {} if unseen is None else {"held_out": {"bits_per_dim": unseen}}
        log.write({"epoch": epoch + 1, "train": asdict(stats), "codebooks": usage, **held_out, "test": mean})
        self._save(epoch + 1, improved)  # after the log: a resumed run drops entries that no checkpoint covers
        print(progress_line(self.config, epoch + 1, stats, unseen, result))
        return result

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
            "config": to_dict(self.config), "epoch": epoch, "model": self.model.state_dict(), "best_on_test": self.best,
        }  # fmt: skip
        if improved:
            write_checkpoint(self.folder / BEST, content)
        write_checkpoint(
            self.folder / LAST, content | {"optimizer": self.optimizer.state_dict(), "random": random_state()}
        )

    def _restore(self, saved: dict[str, Any]) -> int:
        """Everything that the next step depends on; the number of finished meta epochs."""
        load_strictly(self.model, saved["model"], "--resume")
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
    sources = [stage.training_features(kept) for kept, _ in splits]  # a batch larger than the data ends here
    folder = resumed_run(config) if config.train.resume else None
    if folder is not None:
        for group, (kept, _) in zip(groups, prepared, strict=True):  # before anything is written
            saved_state(stage, group, own_folder(folder, config, group), kept.readings)
    folder = folder or new_run(config)
    write_config(folder, config)
    print(f"{len(class_names)} classes, {sum(len(kept) for kept, _ in splits)} training images; run folder: {folder}")
    parts: list[EvalResult] = []
    pages: dict[str, ClassPage] = {}
    best: dict[str, dict[str, float]] | None = None
    for group, (_, test_set), (_, normal), source in zip(groups, prepared, splits, sources, strict=True):
        own = own_folder(folder, config, group)
        own.mkdir(exist_ok=True)
        if not config.data.multi_class:
            print(f"class {printable(group[0])}")
        model = stage.build_model()
        fitted = fit_group(stage, model, group, source, (normal, test_set), own)
        parts.append(fitted.last)
        best = fitted.best_on_test if config.data.multi_class else None
        save_pictures(stage, model, test_set, group, folder / "pictures")
        pages |= report_pages(stage, model, (normal, test_set), fitted.last, len(class_names))
    finish(folder, config, parts, best, pages)
    return folder


def fit_group(
    stage: Stage,
    model: VQFlow,
    group: tuple[str, ...],
    source: Source,
    others: tuple[ImageFolder, ImageFolder],
    folder: Path,
) -> FitResult:
    """Train one model on the classes of `group`, from its checkpoint on if the run is resumed.

    `others` are the normal images that calibrate, and the test images.
    """
    config = stage.config
    normal_source, test_source = (stage.test_features(dataset) for dataset in others)
    total = config.train.meta_epochs * config.train.sub_epochs

    def training(sub: int) -> Iterable[FeatureBatch]:
        title = "first look" if sub == FIRST_LOOK else f"sub epoch {sub + 1}/{total}"
        return tqdm(source.epoch(max(sub, 0)), total=len(source), desc=title, leave=False)

    def evaluation(model: VQFlow) -> EvalResult:
        batches = tqdm(test_source.epoch(0), total=len(test_source), desc="evaluation", leave=False)
        return evaluate(model, batches, group, config.eval, size=config.score_size, amp=config.train.amp_enable)

    supply = Supply(training=training, steps=len(source), normal=lambda: normal_source.epoch(0))
    readings = others[0].readings
    own = identity(stage, group, readings)
    trainer = Trainer(config, model, supply=supply, evaluate=evaluation, folder=folder, identity=own)
    return trainer.fit(saved_state(stage, group, folder, readings))


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
    expected = identity(stage, group, readings) | {"settings": to_dict(config)["model"]}
    found = saved | {"settings": saved["config"]["model"]}
    for name, value in expected.items():
        if found.get(name) != value:
            raise UsageError(f"--resume: {path} is of another run: its {name} differs")
    return saved


def progress_line(
    config: Config, epoch: int, stats: EpochStats, unseen: float | None, result: EvalResult | None
) -> str:
    """One line for a finished meta epoch; `loc_eval` and `pro_eval` choose which metrics it shows.

    `unseen` are the bits per dimension of held-out images, None if there are none.
    """
    last = config.train.meta_epochs
    line = f"meta epoch {epoch}/{last}  loss {stats.loss:.4g}  {stats.bits_per_dim:.3f} bits/dim"
    if unseen is not None:
        line += f" (held out: {unseen:.3f})"
    if result is None:
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
