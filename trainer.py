"""One training run in its folder: steps, evaluations, checkpoints, and how it ends before its end."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from default import Config, UsageError, to_dict
from models.detector import Detector
from models.first_look import first_look
from models.form import quicker_form
from models.official import load_strictly
from resume import Saved
from stage import load_decision, load_scorer
from steps import EpochStats, Ledger, Model, Place, Tally, shared_by_all, training_steps
from supply import Supply, kept
from utils.report.images import EvalResult
from utils.run.checkpoint import first_broken
from utils.run.distributed import from_first, highest, is_first
from utils.run.keeper import LAST, MIDDLE, Keeper
from utils.run.log import RunLog
from utils.run.profile import traced
from utils.run.seed import random_state, restore_random_state
from utils.run.stop import Stopped, asked, held, released
from utils.run.text import printable

LIKELIHOOD = {"likelihood": "bits_per_dim", "released": "objective_per_dim"}  # the latter in nats: no density


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """The last evaluation, and for each metric the best value on the test set with its meta epoch."""

    last: EvalResult
    best_on_test: dict[str, dict[str, float]]


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
        self.model: Model = self.flow  # `fit` makes it a replica where there are several processes
        train = config.train
        self.optimizer = torch.optim.AdamW(
            [p for p in self.flow.parameters() if p.requires_grad],
            lr=train.lr,
            weight_decay=train.weight_decay,
            fused=next(self.flow.parameters()).device.type in ("cuda", "cpu"),
        )
        self.best: dict[str, dict[str, float]] = {}
        self.keeper, self.place, self.steps = Keeper(folder), Place(), 0

    def fit(self, saved: Saved | None = None) -> FitResult:
        """Train to the end, from the start or from a checkpoint on.

        Raises:
            Stopped: the program was asked to end; what is to be gone on from is written.
            UsageError: the losses are no longer finite.
        """
        train = self.config.train
        self._begin_epoch()
        done = self._restore(saved.content) if saved else 0
        for path in saved.damaged if saved and is_first() else ():
            path.replace(path.with_name(path.name + ".damaged"))  # or it would take the place of the one before
        if train.resume:
            start = f"--resume: {self.folder} goes on with meta epoch 1 of {train.meta_epochs}, the first"
            print(printable(saved.line(train.meta_epochs) if saved else start))
        if not saved:
            supply = self.supply
            first_look(
                self.detector, partial(kept, supply.everything), images=supply.images, batch_size=train.batch_size,
                again=supply.again,
            )  # fmt: skip
        if self.config.model.conditioning == "auto" and not self.config.run.deterministic:
            self._choose_form()
        self.model = shared_by_all(self.flow)
        log = RunLog(
            self.folder, kept=done, config=to_dict(self.config), tensorboard=train.tensorboard, wandb=train.wandb_enable
        ) if is_first() else None  # fmt: skip
        result: EvalResult | None = None
        try:
            with held():
                for epoch in range(done, train.meta_epochs):
                    result = self._meta_epoch(epoch, log)
        finally:
            self.keeper.close()
            if log is not None:
                log.close()
        return FitResult(last=result or self.evaluate(self.detector), best_on_test=self.best)

    def _choose_form(self) -> None:
        """The quicker one of conditions, as the first process finds; of the fixed sample's images, as many as a batch
        has or there are."""
        features = next(kept(self.supply.sample))
        amp = self.config.train.amp_enable
        self.flow.hierarchy.direct, line = from_first(lambda: quicker_form(self.flow, features, amp=amp))
        print(line)

    def _meta_epoch(self, epoch: int, log: RunLog | None) -> EvalResult | None:
        """Sub epochs, evaluation, a line in the log and checkpoints."""
        config, place = self.config, self.place
        books = self.flow.hierarchy.codebooks()
        while place.sub < config.train.sub_epochs:
            self._sub_epoch(epoch)
        if config.train.reassign_quantize and not place.closing:
            for book in books.values():
                book.reassign()
        place.closing = True
        wanted = epoch + 1 == config.train.meta_epochs or (epoch + 1) % config.eval.eval_interval == 0
        self._refuse_broken()
        try:
            with released():  # what follows only looks, and can be done again
                likelihood = self._calibrate()  # every checkpoint that is written is calibrated
                result = self.evaluate(self.detector) if wanted else None
        except Stopped as stopped:
            self._stop(epoch, stopped.number)
        improved = self._note_best(result, epoch + 1) if result else False
        stats = place.tally.stats(self.optimizer.param_groups[0]["lr"])
        entry = {
            "epoch": epoch + 1, "train": asdict(stats), LIKELIHOOD[config.model.objective]: likelihood,
            "codebooks": {name: book.statistics() for name, book in books.items()},
            "test": asdict(result.mean) if result else None,
        } | ({"dropped": place.dropped} if place.dropped else {})  # fmt: skip
        if log is not None:
            log.write(entry)
        self._begin_epoch()
        self._save(epoch + 1, improved)  # after the log: a resumed run drops entries that no checkpoint covers
        print(progress_line(config, epoch + 1, stats, likelihood, result))
        return result

    def _begin_epoch(self) -> None:
        """The next meta epoch starts at its first sub epoch."""
        self.place = Place(streak=self.place.streak)
        for book in self.flow.hierarchy.codebooks().values():
            book.reset_usage()

    def _sub_epoch(self, epoch: int) -> None:
        """One pass over the training images, or what is left of it."""
        train, place, supply = self.config.train, self.place, self.supply
        share, number = 1 / (train.meta_epochs * train.sub_epochs), epoch * train.sub_epochs + place.sub
        batches = supply.training(number, place.tally.batches)
        if train.profile and number == 0 and is_first():
            batches = traced(batches, train.profile * train.accumulate, self.folder / "trace.json")
        step = share / supply.batches
        ledger = Ledger.of(place.tally, self.optimizer)
        for _ in training_steps(
            self.model, batches, self.optimizer, train, start=number * share, step=step, ledger=ledger
        ):
            self._after_step(epoch, ledger)
        self._note(ledger.known(everything=True))
        place.sub += 1
        if place.sub < train.sub_epochs:
            place.tally = Tally()

    def _after_step(self, epoch: int, ledger: Ledger) -> None:
        """Stop or save where that is wanted."""
        self.steps += 1
        number, every = highest(asked()), self.config.train.save_every  # all processes stop after the same step
        wanted = bool(every) and self.steps % every == 0
        self._note(ledger.known(everything=bool(number) or wanted))
        if number:
            self._stop(epoch, number)
        if wanted and not self.place.streak:
            self._save_middle(epoch)

    def _note(self, outcomes: Sequence[Sequence[str]]) -> None:
        """Steps that were taken, or dropped: these come with their files."""
        train, place = self.config.train, self.place
        for dropped in outcomes:
            place.note(dropped)
            if dropped:
                names = ", ".join(dropped[:4]) + (f" and {len(dropped) - 4} more" if len(dropped) > 4 else "")
                print(printable(f"warning: a step without a finite loss was left out: {names}"), file=sys.stderr)
            if place.streak >= train.max_dropped:
                raise UsageError(self._diverged(f"{place.streak} steps in a row had no finite loss"))

    def _stop(self, epoch: int, number: int) -> NoReturn:
        """Save, and raise `Stopped` with a text that says how to go on."""
        self._save_middle(epoch)
        self.keeper.wait()
        raise Stopped(
            number,
            f"{self.folder / MIDDLE} holds the run up to here, meta epoch {epoch + 1} of "
            f"{self.config.train.meta_epochs}; the same command with --resume goes on from there",
        )

    def _diverged(self, how: str) -> str:
        """Says what to do, and which checkpoint is still good."""
        self.keeper.wait()
        there = from_first(
            lambda: next((self.folder / name for name in (MIDDLE, LAST) if (self.folder / name).is_file()), None)
        )
        good = f"the last good checkpoint is {there}" if there else "there is no checkpoint yet"
        return f"--lr: training diverged ({how}) with a learning rate of {self.config.train.lr}; lower it; {good}"

    def _refuse_broken(self) -> None:
        """Raise `UsageError` rather than keep a model that is none any more."""
        broken = first_broken(self.flow.state_dict())
        if broken is not None:
            raise UsageError(self._diverged(f"{broken} is not finite"))

    def _calibrate(self) -> dict[str, float]:
        """Units and thresholds from held-out images, or from training images that do not meet themselves in the memory.

        The noise-free negative log-likelihood of both kinds, in eval mode: by `LIKELIHOOD`.
        """
        supply, detector, config = self.supply, self.detector, self.config.eval
        if supply.units is None:
            found = {"train": detector.calibrate(kept(supply.sample), own=False)}
            detector.learn_decision(kept(supply.sample), config, own=False, unseen=False, images=supply.sampled)
        else:
            seen = detector.nll_per_dim(kept(supply.sample))
            found = {"train": seen, "held_out": detector.calibrate(kept(supply.units))}
            deciding = kept(supply.deciding) if supply.deciding else ()
            detector.learn_decision(deciding, config, images=supply.decided_by)
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

    def _content(self, epoch: int) -> dict[str, Any]:
        """All that a checkpoint after `epoch` meta epochs holds for those who judge by it."""
        return self.identity | {
            "config": to_dict(self.config), "epoch": epoch, "model": self.flow.state_dict(),
            "scorer": {"rule": self.detector.scorer.rule.plain(), "state": self.detector.scorer.state_dict()},
            "best_on_test": self.best, "decision": plain_decision(self.detector),
        }  # fmt: skip

    def _progress(self) -> dict[str, Any]:
        """What a checkpoint holds for those who train on."""
        return {"optimizer": self.optimizer.state_dict(), "random": random_state()}

    def _save(self, epoch: int, improved: bool) -> None:
        if is_first():
            self.keeper.finished(self._content(epoch), self._progress(), best=improved)

    def _save_middle(self, epoch: int) -> None:
        """Save the meta epoch after `epoch` finished ones as far as it is; thresholds would be those of before."""
        self._refuse_broken()
        if not is_first():
            return
        usage = {name: book.usage for name, book in self.flow.hierarchy.codebooks().items()}
        more = {"place": asdict(self.place), "usage": usage, "decision": None}
        self.keeper.middle(self._content(epoch) | self._progress() | more)

    def _restore(self, saved: dict[str, Any]) -> int:
        """Everything that the next step depends on; the number of finished meta epochs."""
        load_strictly(self.flow, saved["model"], "--resume")
        scorer = load_scorer(saved, self.config.model, self.flow.channels, "--resume")
        self.detector.scorer = scorer.to(next(self.flow.parameters()).device)
        self.detector.decision = load_decision(saved, self.config, "--resume")
        self.optimizer.load_state_dict(saved["optimizer"])
        restore_random_state(saved["random"])  # the first process's, which all share
        self.best = saved["best_on_test"]
        if "place" in saved:
            self.place = Place.of(saved["place"])
            for name, book in self.flow.hierarchy.codebooks().items():
                book.usage.copy_(saved["usage"][name])
        return saved["epoch"]


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
