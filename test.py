"""The evaluation loop: a model over the test images, once, into the metrics of every class.

`Stage` holds what training and evaluation have in common: the device, the extractor and the images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from datasets import build_datasets, resolve_classes
from datasets.cache import FeatureSize, cache_key, check_space, make_store, to_half
from datasets.features import CachedFeatures, FeatureBatch, LiveFeatures
from datasets.folder import ImageFolder
from datasets.loaders import resolve_workers, test_loader, train_loader
from datasets.transforms import denormalize
from default import Config, EvalConfig, ModelConfig, UsageError, flag_of, from_dict, make_config, to_dict
from models.extractor import FrozenExtractor
from models.official import is_official, load_official, load_strictly
from models.vqflow import VQFlow, VQFlowOutput, pool_features
from utils.bootstrap import bootstrap
from utils.checkpoint import FORMAT, read_checkpoint
from utils.device import autocast, check_compiler, has_bfloat16, resolve_device
from utils.gallery import ImageResult, Look, Views, calibrate
from utils.metrics import ClassAccumulator, ClassResult, mean_results
from utils.plots import save_picture, triptych
from utils.published import comparison_rows
from utils.report import ClassPage, Curves, class_page, curves_of, report_run
from utils.results import Results, write_results
from utils.runs import check_writable, new_run, write_config
from utils.scoring import ScoreMaps, image_scores, score_maps
from utils.seed import seed_everything

Source = LiveFeatures | CachedFeatures


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Seven metrics per class and their mean, every image's score, and each class's curves."""

    classes: dict[str, ClassResult]
    mean: ClassResult
    images: tuple[ImageResult, ...]
    curves: dict[str, Curves]


class Stage:
    """The device and the frozen extractor of a configuration, and features of images by them.

    Raises:
        UsageError: the device or the extractor's weights are not there, or the work folder cannot be written.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.device = config, resolve_device(config.run.device)
        if config.train.amp_enable and not has_bfloat16(self.device):
            print(f"--amp-enable: this {self.device.type} has no units for bfloat16; computing in float32")
        if config.train.compile:
            check_compiler(self.device)
        self.cache = check_writable(config.run.work_dir) / "cache"
        seed_everything(config.run.seed)  # for an extractor with random weights
        model = config.model
        self.extractor = FrozenExtractor(
            model.extractor, input_size=config.data.input_size, weights=model.weights, pretrained=model.pretrained
        ).to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.fingerprint = self.extractor.fingerprint()
        self.workers = resolve_workers(config.data.workers, self.device.type)

    def build_model(self) -> VQFlow:
        """A new model, its random choices drawn from the seed."""
        seed_everything(self.config.run.seed)
        model = VQFlow(
            self.config.model, self.extractor.channels, self.extractor.strides,
            recompute=self.config.train.checkpoint_activations,
        )  # fmt: skip
        return self.placed(model)

    def placed(self, model: VQFlow) -> VQFlow:
        """On the device, channels-last, compiled if wanted."""
        if self.config.train.compile:
            model.compile_flows()
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def extract(self, image: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) -> pooled feature levels in float32.

        Rounded to half precision unless --cache none: a cache holds no more, and what is computed must equal what is
        kept, to the bit, wherever a model is trained or evaluated.
        """
        with torch.no_grad(), autocast(self.device, self.config.train.amp_enable):
            levels = self.extractor(image.contiguous(memory_format=torch.channels_last))
        pooled = pool_features(levels, self.extractor.strides, self.config.model.pool_type)
        return [h.float() if self.config.data.cache == "none" else to_half(h).float() for h in pooled]

    def training_features(self, dataset: ImageFolder) -> Source:
        """Shuffled batches, the last partial one dropped."""
        loader = train_loader(
            dataset, batch_size=self.config.train.batch_size, workers=self.workers, seed=self.config.run.seed,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip
        return self._source(loader, dataset)

    def test_features(self, dataset: ImageFolder) -> Source:
        """All images in order."""
        return self._source(self._ordered(dataset), dataset)

    def _ordered(self, dataset: ImageFolder) -> DataLoader:
        return test_loader(
            dataset,
            batch_size=self.config.train.batch_size,
            workers=self.workers,
            pin_memory=self.device.type == "cuda",
        )

    def _source(self, loader: DataLoader, dataset: ImageFolder) -> Source:
        """From a cache as --cache says, else computed batch by batch."""
        data, ordered = self.config.data, self._ordered(dataset)
        key = cache_key(
            dataset, extractor=self.fingerprint, pool=self.config.model.pool_type, size=dataset.input_size,
            masks=dataset.mask_size, amp=self.config.train.amp_enable and has_bfloat16(self.device),
        )  # fmt: skip
        folder = self.cache / key
        place = "disk" if data.cache == "auto" else data.cache
        if data.cache == "auto" and not data.pre_extract and not folder.is_dir():
            once = self.config.run.mode == "test"  # a cache would not be read a second time
            size = None if once else FeatureSize.of(dataset, self.extract, self.device)
            problem = size and check_space(size, place, self.cache, self.device)
            if problem:
                print(f"--cache auto: {problem}: they are computed anew in each epoch")
            place = "none" if once or problem else place
        if place == "none":
            return LiveFeatures(loader, self.extract, self.device)
        store = make_store(
            place, folder, ordered, self.extract, device=self.device,
            progress=lambda batches, text: tqdm(batches, desc=text, leave=False),
        )  # fmt: skip
        return CachedFeatures(loader, store, self.device)


@torch.no_grad()
def forward(model: VQFlow, features: Sequence[Tensor], *, amp: bool = False) -> VQFlowOutput:
    """What the model says of pooled feature levels."""
    with autocast(features[0].device, amp):
        return model.forward_pooled(features)


def predict(model: VQFlow, features: Sequence[Tensor], size: int, *, amp: bool = False) -> ScoreMaps:
    """Maps (B, size, size) of pooled feature levels."""
    output = forward(model, features, amp=amp)
    return score_maps(output.latents, size, output.local_log_det)


def evaluate(
    model: VQFlow,
    batches: Iterable[FeatureBatch],
    class_names: Sequence[str],
    config: EvalConfig,
    *,
    size: int,
    amp: bool = False,
) -> EvalResult:
    """Score every image of `batches` and compute each class's metrics.

    Args:
        model: is put into eval mode, and back as it was.
        size: side of maps and masks.
    """
    was_training = model.training
    model.eval()
    accumulators = {name: ClassAccumulator(fpr_limit=config.fpr_limit) for name in class_names}
    images: list[ImageResult] = []
    for batch in batches:
        output = forward(model, batch.features, amp=amp)
        maps = score_maps(output.latents, size, output.local_log_det)
        scores = image_scores(getattr(maps, config.image_score), config.top_k)
        for index, own in by_class(batch.class_index):
            accumulators[class_names[index]].update(
                labels=batch.label[own], scores=scores[own], masks=batch.mask[own],
                maps=getattr(maps, config.pixel_score)[own], pro_maps=getattr(maps, config.pro_score)[own],
            )  # fmt: skip
        concepts = [None] * len(scores) if output.concept is None else output.concept.tolist()
        rows = zip(batch.path, batch.class_index.tolist(), batch.label.tolist(), scores.tolist(), concepts, strict=True)
        images += [
            ImageResult(path=path, class_name=class_names[c], label=label, score=score, concept=concept)
            for path, c, label, score, concept in rows
        ]
    model.train(was_training)
    classes = {name: accumulator.compute() for name, accumulator in accumulators.items()}
    curves = {name: curves_of(accumulator) for name, accumulator in accumulators.items()}
    return EvalResult(classes=classes, mean=mean_results(classes), images=tuple(images), curves=curves)


def by_class(class_index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each class in the batch and the rows that belong to it."""
    for index in class_index.unique().tolist():
        yield index, (class_index == index).nonzero().flatten()


def look_at(stage: Stage, model: VQFlow, dataset: ImageFolder) -> Look:
    """Shows images of a data set by their numbers, with what the model, put into eval mode, says of them."""
    config = stage.config.eval
    model.eval()

    def look(numbers: Sequence[int]) -> Views:
        samples = [dataset[n] for n in numbers]
        features = stage.extract(torch.stack([sample.image for sample in samples]).to(stage.device))
        maps = predict(model, features, dataset.input_size, amp=stage.config.train.amp_enable)
        return Views(
            images=np.stack([denormalize(sample.image) for sample in samples]),
            masks=torch.stack([sample.mask for sample in samples]).numpy(),
            maps=maps,
            scores=image_scores(getattr(maps, config.image_score), config.top_k).cpu().numpy(),
        )

    return look


def report_pages(
    stage: Stage, model: VQFlow, datasets: tuple[ImageFolder, ImageFolder], result: EvalResult, share: int
) -> dict[str, ClassPage]:
    """What the report says of the classes of `result`; nothing with --no-report.

    Args:
        datasets: training images, which calibrate, and the test images that were evaluated.
        share: classes in the whole report.
    """
    if not stage.config.eval.report:
        return {}
    train, test = (look_at(stage, model, dataset) for dataset in datasets)
    normal = [
        [n for n, item in enumerate(datasets[0].items) if item.class_index == i] for i in range(len(result.classes))
    ]
    return {
        name: class_page(
            result=outcome, curves=result.curves[name], calibration=calibrate(train, numbers), look=test, share=share,
            images={n: image for n, image in enumerate(result.images) if image.class_name == name},
        )
        for (name, outcome), numbers in zip(result.classes.items(), normal, strict=True)
    }  # fmt: skip


def save_pictures(stage: Stage, model: VQFlow, dataset: ImageFolder, class_names: Sequence[str], folder: Path) -> int:
    """Image, score map and mask side by side, the first few of each class and kind; how many were written.

    One colour scale per class: from the median of its good images to the highest value shown.
    """
    config = stage.config.eval
    dataset = ImageFolder(dataset.items, dataset.input_size)  # masks at the pictures' size
    look = look_at(stage, model, dataset)
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
        scores = getattr(views.maps, config.pixel_score).cpu().numpy()
        good = np.array([dataset.items[n].label == 0 for n in numbers])
        low, high = float(np.median(scores[good] if good.any() else scores)), float(scores.max())
        for number, image, mask, score in zip(numbers, views.images, views.masks, scores, strict=True):
            item = dataset.items[number]
            picture = triptych(image, score, mask, low=low, high=high)
            save_picture(folder / class_names[index] / f"{item.kind}_{item.path.stem}.jpg", picture)
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
    intervals = bootstrap(drawn, count, config.run.seed) if count else None
    print(write_results(folder, Results(classes=classes, best_on_test=best, intervals=intervals, config=config)))
    print(f"run folder: {folder}")
    if pages:
        rows = comparison_rows(config.data.dataset) if config.compared else []
        shared = config.data.multi_class
        print(f"report: {report_run(folder, pages, to_dict(config), shared_model=shared, published=rows)}")


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
        own = settled_config(content, config, chosen, str(path))
        class_names = resolve_classes(own.data)
        datasets = build_datasets(own.data, class_names, own.score_size)
        stage = Stage(own)
        model = load_model(content, stage, str(path))
        source = stage.test_features(datasets[1])
        batches = tqdm(source.epoch(0), total=len(source), desc="evaluation", leave=False)
        parts.append(evaluate(model, batches, class_names, own.eval, size=own.score_size, amp=own.train.amp_enable))
        folder = folder or new_run(own)
        save_pictures(stage, model, datasets[1], class_names, folder / "pictures")
        pages |= report_pages(stage, model, datasets, parts[-1], len(class_names) * len(paths))
    assert folder is not None
    own = replace(own, data=replace(own.data, class_names=tuple(n for part in parts for n in part.classes)))
    write_config(folder, own)
    finish(folder, own, parts, None, pages)


def find_checkpoints(path: Path, class_names: Sequence[str]) -> list[Path]:
    """A file itself; in a run folder its last.pt, or those of the single classes that are asked for.

    Raises:
        UsageError: a folder without checkpoints, or without one of a class.
    """
    if not path.is_dir():
        return [path]
    if (path / "last.pt").is_file():
        return [path / "last.pt"]
    found = {p.parent.name: p for p in sorted(path.glob("*/last.pt"))}
    if not found:
        raise UsageError(f"--eval_ckpt: expected a checkpoint or a run folder with a last.pt, but got {path}")
    for name in class_names:
        if name not in ("all", *found):
            raise UsageError(f"--class-names: {path} has no model of {name!r}; choose from all, {', '.join(found)}")
    return [p for name, p in found.items() if "all" in class_names or name in class_names]


def settled_config(content: dict[str, Any], config: Config, chosen: dict[str, Any], name: str) -> Config:
    """The settings under which a checkpoint is evaluated.

    Raises:
        UsageError: not a checkpoint, or the user asked for another model than the one that it holds.
    """
    if is_official(content):
        return replace(
            config, model=replace(config.model, objective="released", codebooks="released", standardize=False)
        )
    if content.get("format") != FORMAT or not {"config", "model", "classes", "extractor"} <= content.keys():
        raise UsageError(f"--eval_ckpt: {name} is not a checkpoint of this program or of the released code")
    try:
        saved = from_dict(content["config"])
    except (UsageError, AttributeError, TypeError) as error:
        raise UsageError(f"--eval_ckpt: {name} holds settings that this version does not know") from error
    for entry in fields(ModelConfig):
        if entry.name in ("weights", "pretrained") or entry.name not in chosen:
            continue
        asked, has = getattr(config.model, entry.name), getattr(saved.model, entry.name)
        if asked != has:
            raise UsageError(
                f"--eval_ckpt: {name} was made with {flag_of(entry.name)} = {has!r}, not with {asked!r} as asked for"
            )
    values = {k: v for part in to_dict(saved).values() for k, v in part.items()}
    own = tuple(content["classes"])
    here: dict[str, Any] = {
        "device": config.run.device,
        "work_dir": config.run.work_dir,
        "workers": config.data.workers,
    }
    here |= {"class_names": own, "resume": False, "pre_extract": False}
    here |= {"cache": "none" if saved.data.cache == "none" else "auto"}
    values |= here | chosen
    if not saved.data.multi_class:
        if not {"all", *own} & set(values["class_names"]):
            raise UsageError(f"--class-names: {name} is a model of {own[0]!r} alone")
        values |= {"class_names": own}
    return make_config(**values)


def load_model(content: dict[str, Any], stage: Stage, name: str) -> VQFlow:
    """The model of a checkpoint, in eval mode.

    Raises:
        UsageError: other sizes than asked for, or other weights of the extractor than in training.
    """
    if is_official(content):
        model = load_official(content, stage.config.model, stage.extractor.channels, name=name)
        return stage.placed(model)
    if content["extractor"] != stage.fingerprint:
        raise UsageError(
            f"--weights: {name} was trained on other weights of {stage.config.model.extractor} than the ones here"
        )
    model = stage.build_model()
    load_strictly(model, content["model"], name)
    return model.eval()
