"""What training and evaluation have in common: device, extractor, features of images, and models from checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datasets.cache import NoRoom, cache_key, make_store, to_half
from datasets.features import CachedFeatures, LiveFeatures
from datasets.folder import ImageFolder
from datasets.loaders import ImageLoader, grouped_loader, ordered_loader, resolve_workers, train_loader
from datasets.reading import RELEASED, Reading
from datasets.together import fill_together
from default import (
    CALIBRATED,
    FIXED,
    SCORES,
    Config,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    UsageError,
    flag_of,
    flat,
    from_dict,
    make_config,
    settings_of,
    shown,
    to_dict,
)
from models.decision import Calibrated, Decision, scoring_of
from models.detector import Detector
from models.extractor import IMAGENET, FrozenExtractor, Normalization
from models.footprint import training_bytes
from models.official import is_official, load_official, load_strictly, refuse_misfit
from models.scorer import Scorer, ScoreRule
from models.vqflow import VQFlow, pool_features
from utils.run.device import autocast, check_compiler, has_bfloat16, resolve_device
from utils.run.distributed import block, from_first, processes, rank, share
from utils.run.folders import check_writable
from utils.run.keeper import LAST
from utils.run.offline import go_offline
from utils.run.progress import progress
from utils.run.seed import random_state, restore_random_state, seed_everything
from utils.run.text import printable
from utils.run.upgrade import FORMAT, OLD

Source = LiveFeatures | CachedFeatures
ANY = f"*/{LAST}"  # in a run folder with a model for each class
MOST_AT_ONCE = 64  # images in one process, where --batch-size counts those of all
KEYS = {"config", "model", "scorer", "classes", "extractor"}  # of a checkpoint of ours


class Stage:
    """The device and the frozen extractor of a configuration, and features of images by them.

    Args:
        normalization: mean and deviation that a checkpoint's model saw; default: the extractor's own.

    Raises:
        UsageError: the device or the extractor's weights are not there, or the work folder cannot be written.
    """

    def __init__(self, config: Config, normalization: Normalization | None = None) -> None:
        self.config, self.device = config, resolve_device(config.run.device, deterministic=config.run.deterministic)
        if config.run.offline:
            go_offline()
        amp = config.train.amp_enable and has_bfloat16(self.device)
        if config.train.amp_enable and not amp:
            print(f"--amp-enable: this {self.device.type} has no units for bfloat16; computing in float32")
        if config.train.compile:
            check_compiler(self.device)
        seed_everything(config.run.seed)  # for an extractor with random weights
        model = config.model
        self.extractor = FrozenExtractor(
            model.extractor,
            input_size=config.data.view_size,
            weights=model.weights,
            pretrained=model.pretrained,
            normalization=normalization,
        ).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.extractor.quicken(config.data.input_size, low=torch.bfloat16 if amp else None)
        self.fingerprint = self.extractor.fingerprint()
        self.workers = resolve_workers(config.data.workers, self.device.type)
        self._loaders: list[ImageLoader] = []

    @property
    def cache(self) -> Path:
        """Where features are kept on disk; who judges single images needs no such folder."""
        return check_writable(self.config.run.work_dir) / "cache"

    def build_flow(self) -> VQFlow:
        """A new flow, its random choices drawn from the seed."""
        seed_everything(self.config.run.seed)
        return VQFlow(
            self.config.model, self.extractor.channels, self.extractor.strides,
            recompute=self.config.train.checkpoint_activations,
        )  # fmt: skip

    def room(self, place: str = "disk") -> int:
        """Bytes at a place that features are kept at which a training takes for other things.

        On the disk its checkpoints, without its memory: the last, the one before, the best, and one that is being
        written, each with the weights and the optimizer's two moments of them. On the device its steps.
        """
        if self.config.run.mode != "train" or place == "ram":
            return 0
        state = random_state()
        with torch.device("meta"):
            flow = self.build_flow().to("meta")
        restore_random_state(state)
        if place == "disk":
            return 4 * 3 * sum(tensor.numel() * tensor.element_size() for tensor in flow.state_dict().values())
        side = self.config.data.view_size
        shapes = [level.shape[1:] for level in self.extract(torch.zeros(1, 3, side, side, device=self.device))]
        return training_bytes(flow, shapes, self.config.train.batch_size)

    def build_detector(self, flow: VQFlow | None = None, scorer: Scorer | None = None) -> Detector:
        """A flow and a scorer, new ones unless given: on the device, channels-last, compiled if wanted."""
        flow = flow or self.build_flow()
        scorer = scorer or new_scorer(self.config.model, self.extractor.channels)
        if self.config.train.compile:
            flow.compile_flows()
        detector = Detector(flow, scorer, size=self.config.score_size, amp=self.config.train.amp_enable)
        return detector.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extract(self, image: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> kept feature levels (see `VQFlow`) in float32.

        Rounded to half precision unless --cache none: a cache holds no more, and what is computed must equal what is
        kept, to the bit, wherever a model is trained or evaluated.
        """
        with torch.no_grad(), autocast(self.device, self.config.train.amp_enable):
            levels = self.extractor(image.contiguous(memory_format=torch.channels_last))
        levels = [level.float() for level in levels]  # a mean in bfloat16 has fewer digits than half precision keeps
        kept = pool_features(levels, self.extractor.strides, self.config.model.kept_pool)
        return [h.float() if self.config.data.cache == "none" else to_half(h).float() for h in kept]

    def training_features(self, dataset: ImageFolder) -> Source:
        """Shuffled batches, of tiles with --tile, the last partial one dropped; each process gets its part of them.

        Raises:
            UsageError: there are more processes than images in a batch.
        """
        dataset = dataset.tiled
        size = self.config.train.batch_size
        if size > len(dataset):
            print(f"--batch-size {size}: there are {len(dataset)} training images, so a batch has {len(dataset)}")
        if processes() > 1:
            print(shared_out(min(size, len(dataset)), self.config.train))
        loader = train_loader(
            dataset, batch_size=size, workers=self.workers, seed=self.config.run.seed,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        return self._source(loader, dataset)

    def ordered_features(self, dataset: ImageFolder, numbers: Sequence[int] | None = None) -> Source:
        """All images in order, or those of these numbers, with --tile the tiles of each; of several processes each
        gets its share."""
        if dataset.geometry.tile is not None:
            chosen = None if numbers is None else frozenset(numbers)
            numbers = [n for n, owner in enumerate(dataset.owners) if chosen is None or owner in chosen]
            dataset = dataset.tiled
        if processes() > 1:
            numbers = share(range(len(dataset)) if numbers is None else numbers, self.ordered_size)
        return self._source(self._ordered(dataset, numbers), dataset)

    def test_features(self, dataset: ImageFolder) -> Source:
        """What `evaluate` takes: all images in order; with --tile batches of one image's tiles each, and of several
        processes each gets every n-th image."""
        if dataset.geometry.tile is None:
            return self.ordered_features(dataset)
        rows: dict[int, list[int]] = {}
        for row, owner in enumerate(dataset.owners):
            rows.setdefault(owner, []).append(row)
        groups = [
            own[start : start + self.ordered_size]
            for own in (rows[number] for number in range(rank(), len(dataset), processes()))
            for start in range(0, len(own), self.ordered_size)
        ]
        return self._source(grouped_loader(dataset.tiled, groups, workers=self.workers), dataset.tiled)

    def chosen_features(self, dataset: ImageFolder, numbers: Sequence[int]) -> Source:
        """The images of these ascending numbers in every process, in the batches in which all images would come."""
        groups = [list(g) for _, g in groupby(numbers, lambda n: n // self.config.train.batch_size)]
        return self._source(grouped_loader(dataset, groups, workers=self.workers), dataset)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """The processes that read images meanwhile end with it."""
        try:
            yield
        finally:
            for loader in self._loaders:
                loader.end_workers()

    @property
    def ordered_size(self) -> int:
        """Images in a batch of those that are looked at in order; a process of several takes no more than it can."""
        size = self.config.train.batch_size
        return size if processes() == 1 else min(size, MOST_AT_ONCE)

    def _ordered(self, dataset: ImageFolder, numbers: Sequence[int] | None = None) -> ImageLoader:
        return ordered_loader(
            dataset, batch_size=self.ordered_size, workers=self.workers, numbers=numbers,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def cache_folder(self, dataset: ImageFolder) -> Path:
        """Where features of these images, as this configuration extracts them, are kept on disk."""
        key = cache_key(
            dataset, extractor=self.fingerprint, pool=self.config.model.kept_pool, size=dataset.geometry,
            masks=dataset.mask_size, amp=self.config.train.amp_enable and has_bfloat16(self.device),
        )  # fmt: skip
        return self.cache / key

    def _source(self, loader: ImageLoader, dataset: ImageFolder) -> Source:
        """From a cache as --cache says, else computed batch by batch."""
        self._loaders.append(loader)
        ordered, folder = self._ordered(dataset), self.cache_folder(dataset)
        place = from_first(lambda: self._place(folder))
        if place == "none":
            return LiveFeatures(loader, self.extract, self.device)
        try:
            if place == "disk" and processes() > 1:
                self._fill_together(dataset, folder)
            store = make_store(
                place, folder, ordered, self.extract, device=self.device, keep=self.room(place),
                progress=lambda batches, text: progress(batches, total=len(ordered), text=text),
            )  # fmt: skip
        except NoRoom as error:
            if self.config.data.cache != "auto" or self.config.data.pre_extract:
                raise
            print(printable(f"{error}\nThe features are computed anew in each epoch."))
            return LiveFeatures(loader, self.extract, self.device)
        finally:
            ordered.end_workers()
        return CachedFeatures(loader, store, self.device)

    def _place(self, folder: Path) -> str:
        """Where features are kept: what --cache says, or what auto comes to."""
        data = self.config.data
        if data.cache != "auto":
            return data.cache
        once = self.config.run.mode == "test" and not data.pre_extract  # a cache would not be read a second time
        return "none" if once and not folder.is_dir() else "disk"

    def _fill_together(self, dataset: ImageFolder, folder: Path) -> None:
        """Each process extracts its part of the images into a cache on disk that is not there yet."""
        part = block(len(dataset), self.ordered_size)
        loader = self._ordered(dataset, part)
        fill_together(
            folder, loader, self.extract, start=part.start, device=self.device, keep=self.room(),
            progress=lambda batches, text: progress(batches, total=len(loader), text=text),
        )  # fmt: skip
        loader.end_workers()


def shared_out(batch: int, config: TrainConfig) -> str:
    """Says how several processes share a batch of so many images.

    Raises:
        UsageError: there are more of them than images.
    """
    count, own = processes(), batch // processes()
    if not own:
        raise UsageError(f"--batch-size: expected at least one image for each of {count} processes, but got {batch}")
    added = f", added up over {config.accumulate} batches" if config.accumulate > 1 else ""
    step = own * count * config.accumulate
    return f"{count} processes: {own} images in each{added}, {step} a step; learning rate {config.lr:g}"


def find_checkpoints(path: Path, class_names: Sequence[str]) -> list[Path]:
    """A file itself; in a run folder its last.pt, or those of the single classes that are asked for; in a folder with
    one run in it that run's.

    Raises:
        UsageError: a folder without checkpoints, without one of a class, or with several runs in it.
    """
    if not path.is_dir():
        return [path]
    if (path / LAST).is_file():
        return [path / LAST]
    runs = [p.parent for p in sorted(path.glob("*/config.json")) if holds_model(p.parent)]
    if len(runs) > 1:
        names = ", ".join(run.name for run in runs)
        raise UsageError(f"--eval_ckpt: {path} holds {len(runs)} runs; name one of them: {names}")
    if runs:
        return find_checkpoints(runs[0], class_names)
    found = {p.parent.name: p for p in sorted(path.glob(ANY))}
    if not found:
        raise UsageError(f"--eval_ckpt: expected a checkpoint or a run folder with a last.pt, but got {path}")
    for name in class_names:
        if name not in ("all", *found):
            raise UsageError(f"--class-names: {path} has no model of {name!r}; choose from all, {', '.join(found)}")
    return [p for name, p in found.items() if "all" in class_names or name in class_names]


def holds_model(folder: Path) -> bool:
    """Whether a run folder has a checkpoint, or one for a class."""
    return (folder / LAST).is_file() or any(folder.glob(ANY))


def settled_config(content: dict[str, Any], config: Config, chosen: dict[str, Any], name: str) -> Config:
    """The settings under which a checkpoint is evaluated.

    Raises:
        UsageError: not a checkpoint, or the user asked for another model or other data than it was made with.
    """
    if is_official(content):
        return replace(
            config,
            model=replace(config.model, objective="released", codebooks="released", standardize=False, memory=0),
        )
    if content.get("format") not in (OLD, FORMAT) or not content.keys() >= KEYS:
        raise UsageError(f"--eval_ckpt: {name} is not a checkpoint of this program or of the released code")
    try:
        saved = from_dict(content["config"])
    except UsageError as error:
        raise UsageError(f"--eval_ckpt: {name} holds settings that this version does not know ({error})") from error
    refuse_scheme(saved, chosen, name)
    refuse_others(saved, chosen, name)
    own = tuple(content["classes"])
    here: dict[str, Any] = {
        "device": config.run.device, "work_dir": config.run.work_dir, "workers": config.data.workers,
        "offline": config.run.offline, "compile": config.train.compile, "resume": False, "pre_extract": False,
        "cache": "none" if saved.data.cache == "none" else "auto", "memory_place": config.model.memory_place,
    }  # fmt: skip
    here |= asdict(config.predict)  # what is written where is never a checkpoint's to say
    values = flat(to_dict(saved)) | here | chosen | {"class_names": asked_classes(config, saved, own, name)}
    return make_config(**values)


def refuse_scheme(saved: Config, chosen: dict[str, Any], name: str) -> None:
    """Raise `UsageError` if a checkpoint names an extractor from elsewhere, such as hf-hub:USER/MODEL, by itself.

    What lies there may be anything, so the user has to name it, too.
    """
    extractor = saved.model.extractor
    if (":" in extractor or "/" in extractor) and chosen.get("extractor") != extractor:
        raise UsageError(
            f"--extractor: {name} wants {extractor!r} from outside of timm, which a checkpoint alone cannot ask for; "
            "add it to the command if you trust it"
        )


def refuse_others(saved: Config, chosen: dict[str, Any], name: str) -> None:
    """Raise `UsageError` if the user chose something else than the `saved` settings that a checkpoint fixes.

    The data set `folder` is a layout, not data: any tree that holds the checkpoint's classes may be evaluated with it.
    """
    has = flat(to_dict(saved))
    for setting in settings_of(*FIXED):
        asked = chosen.get(setting, has[setting])
        if asked == has[setting] or setting == "class_names" or (setting, asked) == ("dataset", "folder"):
            continue
        raise UsageError(
            f"{flag_of(setting)}: {name} was made with {shown(has[setting])}, not with {shown(asked)} as asked for; "
            "leave it out, a checkpoint brings its own"
        )


def asked_classes(config: Config, saved: Config, own: tuple[str, ...], name: str) -> tuple[str, ...]:
    """Those of a checkpoint's `own` classes that --class-names asks for, in their order.

    Raises:
        UsageError: it asks for a class that the model was not trained on.
    """
    asked = config.data.class_names
    if not saved.data.multi_class and not {"all", *own} & set(asked):
        raise UsageError(f"--class-names: {name} is a model of {own[0]!r} alone")
    others = [c for c in asked if c not in ("all", *own)]
    if others and saved.data.multi_class:
        raise UsageError(f"--class-names: {name} is no model of {others[0]!r}; choose from all, {', '.join(own)}")
    return own if "all" in asked else tuple(c for c in own if c in asked)


def normalization_of(content: dict[str, Any]) -> Normalization:
    """Mean and deviation that the images of a checkpoint's model were normalised with."""
    mean, std = content.get("normalization", IMAGENET)  # official ones hold none
    return tuple(mean), tuple(std)


def image_readings(content: dict[str, Any], class_names: Sequence[str]) -> dict[str, Reading]:
    """How a checkpoint's model reads the images of each class; version 1.0 did not say.

    Raises:
        UsageError: a newer version wrote it.
    """
    saved = content.get("readings", {})
    try:
        return {n: Reading.from_plain(saved[n]) if n in saved else RELEASED for n in class_names}
    except (TypeError, AttributeError) as error:
        raise UsageError("--eval_ckpt: the model reads images in a way that this version does not know") from error


def load_detector(content: dict[str, Any], stage: Stage, name: str) -> Detector:
    """Flow and scorer of a checkpoint, in eval mode.

    Raises:
        UsageError: other sizes than asked for, other weights of the extractor than in training, or scores that the
            checkpoint has no units for.
    """
    config = stage.config
    if is_official(content):
        flow = load_official(content, config.model, stage.extractor.channels, name=name)
        detector = stage.build_detector(flow)
    else:
        if content["extractor"] != stage.extractor.fingerprint(normalized=content["format"] != OLD):
            raise UsageError(
                f"--weights: {name} was trained on other weights of {config.model.extractor} than the ones here"
            )
        with torch.device("meta"):  # sizes first: the settings of a damaged checkpoint may claim any
            refuse_misfit(stage.build_flow().state_dict(), content["model"], name)
        flow = stage.build_flow()
        load_strictly(flow, content["model"], name)
        detector = stage.build_detector(flow, load_scorer(content, config.model, stage.extractor.channels, name))
    refuse_unknown_units(detector, config.eval, name)
    detector.decision = load_decision(content, config, name)
    return detector.to(stage.device).eval()


def load_decision(content: dict[str, Any], config: Config, name: str) -> Decision | None:
    """The thresholds of a checkpoint; None if it has none for the scores that are asked for, with a line that says so.

    Raises:
        UsageError: they cannot be read.
    """
    stored = content.get("decision")
    if stored is None:
        return None
    try:
        calibrated = Calibrated.of(stored)
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--eval_ckpt: {name} holds thresholds that this version does not know") from error
    asked = scoring_of(config.eval, config.score_size)
    others = [setting for setting, value in asked.items() if calibrated.scoring.get(setting) != value]
    if others:
        print(f"{name}: its thresholds are for another {', '.join(others)} than asked for; no verdicts")
        return None
    return Decision(calibrated, config.eval.false_alarm_rate)


def new_scorer(config: ModelConfig, channels: Sequence[int], rule: ScoreRule | None = None) -> Scorer:
    """A scorer that has learnt nothing yet."""
    concepts = config.k_cpc if config.quantize_enable else 1
    scorer = Scorer(
        channels=channels, memory=bool(config.memory), context=config.context, concepts=concepts, rule=rule
    )  # fmt: skip
    if scorer.memory is not None:
        scorer.memory.place = config.memory_place
    return scorer


def load_scorer(content: dict[str, Any], config: ModelConfig, channels: Sequence[int], name: str) -> Scorer:
    """The scorer of a checkpoint of ours, with the constants that it was made with.

    Raises:
        UsageError: it does not fit the settings, or its constants cannot be read.
    """
    stored = content["scorer"]
    try:
        rule, state = ScoreRule.of(stored["rule"]), dict(stored["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--eval_ckpt: {name} holds a scorer that this version does not know") from error
    scorer = new_scorer(config, channels, rule)
    if scorer.memory is not None:
        scorer.memory.make_room({k.removeprefix("memory."): v for k, v in state.items()})
    load_strictly(scorer, state, name)
    return scorer


def refuse_unknown_units(detector: Detector, config: EvalConfig, name: str) -> None:
    """Raise `UsageError` if a score is wanted whose units were never learnt."""
    if int(detector.scorer.calibrated):
        return
    for flag in ("image_score", "pixel_score", "pro_score"):
        if getattr(config, flag) in CALIBRATED:
            raise UsageError(
                f"{flag_of(flag)}: {getattr(config, flag)!r} is in units of normal images, which {name} does not hold; "
                f"choose from {', '.join(s for s in SCORES if s not in CALIBRATED)}"
            )
