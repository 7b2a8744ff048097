"""What --resume goes on from: the checkpoint of a run that reaches farthest, if it is of this run and these images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.folder import ImageFolder
from default import KEPT, UsageError, flat, from_dict, settings_of, to_dict
from stage import Stage
from utils.run.checkpoint import read_checkpoint
from utils.run.keeper import LAST, MIDDLE, PREVIOUS

KEYS = {"config", "epoch", "model", "scorer", "optimizer", "random", "best_on_test"}


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint that training can go on from: its file and content, and newer files that cannot be read."""

    path: Path
    content: dict[str, Any]
    damaged: tuple[Path, ...] = ()

    @property
    def done(self) -> int:
        """Meta epochs that are finished."""
        return self.content["epoch"]

    def line(self, total: int) -> str:
        """Says from where --resume goes on, of `total` meta epochs."""
        lost = "".join(f"; {p.name} cannot be read and is now {p.name}.damaged" for p in self.damaged)
        if self.done >= total:
            return f"--resume: {self.path.parent} has its {total} meta epochs; it is evaluated{lost}"
        place = self.content.get("place")
        within = f", after batch {place['tally']['batches']} of its sub epoch {place['sub'] + 1}" if place else ""
        within = ", before its evaluation" if place and place["closing"] else within
        return f"--resume: {self.path.parent} goes on with meta epoch {self.done + 1} of {total}{within}{lost}"


def identity(stage: Stage, group: Sequence[str], train: ImageFolder) -> dict[str, Any]:
    """What a checkpoint belongs to, beside its config: `train` are all normal images of the classes of `group`."""
    mean, std = stage.extractor.normalization
    return {
        "classes": list(group), "channels": list(stage.extractor.channels), "normalization": [list(mean), list(std)],
        "extractor": stage.fingerprint,
        "readings": {n: r.plain() for n, r in zip(group, train.readings, strict=True)},
        "images": {name: images_of(train, index) for index, name in enumerate(group)},
    }  # fmt: skip


def images_of(train: ImageFolder, index: int) -> dict[str, Any]:
    """A class's images: how many, and a digest of their names within the class and their sizes in bytes."""
    items = [item for item in train.items if item.class_index == index]
    lines = sorted(f"{i.kind}/{i.name}{i.path.suffix}|{i.path.stat().st_size}|{i.held_out}" for i in items)
    return {"count": len(items), "digest": hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()}


def saved_state(stage: Stage, group: Sequence[str], folder: Path, train: ImageFolder) -> Saved | None:
    """The checkpoint that a resumed run goes on from, None if there is none (yet).

    Raises:
        UsageError: all are damaged, or of another model, other classes, images or weights of the extractor, or it has
            more meta epochs than are asked for.
    """
    saved = farthest(folder) if stage.config.train.resume else None
    if saved is None:
        return None
    path, content = saved.path, saved.content
    if not content.keys() >= KEYS:
        raise UsageError(f"--resume: {path} is not a checkpoint that training can go on from")
    was, now = flat(to_dict(from_dict(content["config"]))), flat(to_dict(stage.config))
    here = identity(stage, group, train)
    refuse_other_images(path, content.get("images", here["images"]), here.pop("images"))
    others = [name for name, value in here.items() if content.get(name) != value]
    for name in [*others, *(name for name in settings_of(*KEPT) if was[name] != now[name])]:
        raise UsageError(f"--resume: {path} is of another run: its {name} differs")
    begun = saved.done + ("place" in content)
    if begun > stage.config.train.meta_epochs:
        raise UsageError(
            f"--meta-epochs: {path} is of meta epoch {begun}, so expected at least {begun} with --resume, but got "
            f"{stage.config.train.meta_epochs}"
        )
    return saved


def farthest(folder: Path) -> Saved | None:
    """Of a folder's checkpoints the one that reaches farthest; the one before the last if that cannot be read.

    Raises:
        UsageError: none can be read.
    """
    found: list[Saved] = []
    damaged: list[Path] = []
    errors: list[UsageError] = []
    for name in (MIDDLE, LAST, PREVIOUS):
        path = folder / name
        if not path.is_file() or (name == PREVIOUS and LAST in (saved.path.name for saved in found)):
            continue
        try:
            found.append(Saved(path=path, content=read_checkpoint(path, "--resume")))
        except UsageError as error:
            damaged.append(path)
            errors.append(error)
    if not found and errors:
        raise errors[0]
    if not found:
        return None
    best = max(found, key=lambda saved: saved.content.get("epoch", 0))  # the first one of equals
    return Saved(path=best.path, content=best.content, damaged=tuple(damaged))


def refuse_other_images(path: Path, was: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise `UsageError` if a class's training images are not those that a checkpoint was trained on."""
    for name, now in here.items():
        before = was.get(name, now)
        if before == now:
            continue
        counts = f"{before['count']} images of {name}, and here are {now['count']}"
        same = f"other images of {name} than are here (as many, but other names or sizes)"
        raise UsageError(
            f"--data-path: {path} was trained on {same if before['count'] == now['count'] else counts}; give --resume "
            "the same images, or leave it out to start a new run"
        )
