"""What a training is fed with: features of the images that are trained on, and of those that calibrate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from datasets import evenly_spread
from datasets.features import FeatureBatch
from datasets.folder import ImageFolder
from default import UsageError
from models.decision import split_in_two
from models.first_look import Again
from stage import Source, Stage
from utils.run.progress import progress

Passes = Callable[[], Iterable[FeatureBatch]]


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What a training run is fed with.

    Attributes:
        training: shuffled batches of a sub epoch, `batches` of them, and how many of the first ones are left out.
        everything: all `images` training images, or tiles, in order, of several processes each one's share.
        again: those of some numbers, in every process; one alone has no need of it.
        sampled, decided_by: the image that each row of `sample` and of `deciding` belongs to; None: one of its own.
        sample: a fixed sample of the training images.
        units: held-out normal images that the units of the scores come from, None if none are held out.
        deciding: others of them, whose scores give the thresholds.
    """

    training: Callable[[int, int], Iterable[FeatureBatch]]
    batches: int
    everything: Passes
    again: Again | None = None
    images: int
    sample: Passes
    units: Passes | None
    deciding: Passes | None
    sampled: Sequence[int] | None = None
    decided_by: Sequence[int] | None = None


def kept(passes: Passes) -> Iterator[list[Tensor]]:
    """The features alone."""
    return (batch.features for batch in passes())


def supply_of(stage: Stage, source: Source, kept: ImageFolder, held_out: ImageFolder | None) -> Supply:
    """Features of the images `kept` for training, shuffled by `source`, and of those that are held out."""
    if stage.config.model.memory and held_out is None and min(stage.config.model.memory, len(kept.tiled)) < 2:
        raise UsageError("--memory: an image alone cannot be compared with others; use more images, or --holdout")
    total = stage.config.train.meta_epochs * stage.config.train.sub_epochs
    everything, sample = stage.ordered_features(kept), stage.ordered_features(kept, evenly_spread(kept))
    parts = roles(held_out)
    units, deciding = (held_features(stage, held_out, numbers) for numbers in parts)

    def training(sub: int, skipped: int) -> Iterable[FeatureBatch]:
        text, left = f"sub epoch {sub + 1}/{total}", len(source) - skipped
        return progress(source.epoch(sub, skipped), total=left, text=text, more=total - sub - 1)

    return Supply(
        training=training, batches=len(source), images=len(kept.tiled), sample=lambda: sample.epoch(0),
        everything=lambda: progress(everything.epoch(0), total=len(everything), text="first look"),
        again=lambda numbers: (batch.features for batch in stage.chosen_features(kept.tiled, numbers).epoch(0)),
        units=units, deciding=deciding, sampled=rows_of(kept, evenly_spread(kept)),
        decided_by=rows_of(held_out, parts[1]) if held_out else None,
    )  # fmt: skip


def rows_of(images: ImageFolder, numbers: Sequence[int]) -> list[int]:
    """The image that each row of features of these images belongs to: their tiles are rows of their own."""
    chosen = frozenset(numbers)
    return [owner for owner in images.owners if owner in chosen]


def roles(held_out: ImageFolder | None) -> tuple[list[int], list[int]]:
    """Numbers of the held-out images that units come from, and of those that decide."""
    return split_in_two([item.class_index for item in held_out.items]) if held_out is not None else ([], [])


def held_features(stage: Stage, held_out: ImageFolder | None, numbers: list[int]) -> Passes | None:
    """Passes over some of the held-out images, None without any."""
    if held_out is None or not numbers:
        return None
    source = stage.ordered_features(held_out, numbers)
    return lambda: source.epoch(0)
