"""What a training would take of GPUs, disk, network and time, told without data and without computing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from count import AT_ONCE, Counted, count
from default import GPUS, Config, PlanConfig, UsageError
from models.memory import ROOM
from models.work import KINDS, Work
from utils.report.tables import Table, terminal_page

WORKERS = 8  # that read images where there is a GPU and --workers is not given
UNITS = (("GFLOP", "flops", 1e-9), ("GB", "bytes", 1e-9), ("ms", "seconds", 1e3))  # of the work on an image
NOTES = (
    "Counted: products and bytes of each operation, which takes as long as the slower of the two (roofline); sums over "
    "GPUs as if nothing was computed meanwhile; memory without what allocator and libraries add, a GB or two.",
    "Evaluation counts the calibration of each meta epoch on held-out images, too. Left out: metrics, pictures, "
    "report, checkpoints, start-up, the fit of a context, the start of codebooks.",
)


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What is assumed of a GPU and of what it is connected to; bytes, FLOPs, images and seconds."""

    gpu: str
    memory: float
    products: dict[str, float]
    bandwidth: float
    efficiency: float
    interconnect: float
    latency: float
    storage: float
    reading: float

    @classmethod
    def of(cls, config: PlanConfig, workers: int) -> Rates:
        """Those of the table, unless others are given."""
        memory, bandwidth, *stated = GPUS[config.gpu]
        given = config.tflops or tuple(stated)
        rates = given if len(given) == len(KINDS) else given * len(KINDS)
        return cls(
            gpu=config.gpu, memory=1e9 * memory, products={k: 1e12 * r for k, r in zip(KINDS, rates, strict=True)},
            bandwidth=1e9 * (config.bandwidth or bandwidth), efficiency=config.efficiency,
            interconnect=1e9 * config.interconnect, latency=1e-6 * config.latency, storage=1e9 * config.storage,
            reading=workers * config.reading,
        )  # fmt: skip

    def seconds(self, work: Work) -> float:
        """That a GPU computes."""
        return work.seconds(self.products, self.bandwidth) / self.efficiency

    def summing(self, sizes: Sequence[int], gpus: int) -> float:
        """Seconds of a ring's sums over all GPUs, one after the other, of so many bytes each."""
        if gpus == 1:
            return 0.0
        return len(sizes) * self.latency + sent(sum(sizes), gpus) / self.interconnect

    def lines(self) -> list[str]:
        """All of them, as they may be set."""
        products = ", ".join(f"{kind} {rate / 1e12:g}" for kind, rate in self.products.items())
        return [
            f"Assumed: {self.gpu}: --tflops {products}; --bandwidth {self.bandwidth / 1e9:g} GB/s; --efficiency "
            f"{self.efficiency:g} of both; --interconnect {self.interconnect / 1e9:g} GB/s; --latency "
            f"{1e6 * self.latency:g} us; --storage {self.storage / 1e9:g} GB/s; --reading and --workers "
            f"{self.reading:g} images/s together"
        ]


def sent(size: int, gpus: int) -> float:
    """Bytes that each GPU sends while a ring of them sums so many bytes."""
    return 2 * (gpus - 1) / gpus * size


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is said; in bytes and seconds, `hours` of all GPUs working together."""

    gpus: int
    images: dict[str, int]
    steps: int
    rates: Rates
    memory: dict[str, int]
    host: dict[str, int]
    disk: dict[str, int]
    sums: dict[str, float]
    step: dict[str, float]
    work: dict[str, dict[str, float]]
    hours: dict[str, float]

    @property
    def total(self) -> int:
        """Bytes on each GPU."""
        return sum(self.memory.values())

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        sums = {"total_memory": self.total, "fits": self.total <= self.rates.memory, "total_hours": self.total_hours}
        return asdict(self) | sums

    @property
    def total_hours(self) -> float:
        return sum(self.hours.values())

    def text(self) -> str:
        """Tables and notes."""
        fits = "fits" if self.total <= self.rates.memory else "does NOT fit"
        memory = {**self.memory, f"together: {fits} into {self.rates.memory / 1e9:g}": self.total}
        hours = {**self.hours, f"together: {self.gpus * self.total_hours:.3g} GPU hours": self.total_hours}
        work = [
            (name, {unit: f"{own[of] * scale:.4g}" for unit, of, scale in UNITS}) for name, own in self.work.items()
        ]  # fmt: skip
        tables = [
            column("memory of each GPU", "GB", {n: f"{v / 1e9:.3f}" for n, v in memory.items()}),
            column("main memory of each process", "GB", {n: f"{v / 1e9:,.2f}" for n, v in self.host.items()}),
            column("on disk", "GB", {n: f"{v / 1e9:,.2f}" for n, v in self.disk.items()}),
            column("sums over all GPUs in a step", "MB", {n: f"{v / 1e6:,.4g}" for n, v in self.sums.items()}),
            column("a step", "", {n: f"{v:,.4g}" for n, v in self.step.items()}),
            Table(rows=work, columns=[unit for unit, _, _ in UNITS], first="an image on a GPU"),
            column("time", "hours", {n: f"{v:,.3g}" for n, v in hours.items()}),
        ]
        images = ", ".join(f"{v:,} {n.replace('_', ' ')}" for n, v in self.images.items())
        notes = [*self.rates.lines(), *NOTES]
        return f"{self.gpus} GPU{'s' * (self.gpus > 1)}; images: {images}; {self.steps:,} steps\n\n" + terminal_page(
            tables, notes
        )


def column(first: str, title: str, rows: dict[str, str]) -> Table:
    """One value a row."""
    return Table(
        rows=[(name.replace("_", " "), {title: value}) for name, value in rows.items()], columns=(title,), first=first
    )


def run_plan(config: Config) -> None:
    """Print what a training of this configuration would take."""
    plan = plan_of(config)
    print(json.dumps(plan.plain(), indent=2) if config.run.json else plan.text())


def plan_of(config: Config) -> Plan:
    """What a training of this configuration would take.

    Raises:
        UsageError: see `shares`.
    """
    images = shares(config)
    remembered = min(config.model.memory, images["trained_on"])
    return timed(config, count(config, images["of_a_step_in_each"], remembered), images)


def shares(config: Config) -> dict[str, int]:
    """How many images serve for what.

    Raises:
        UsageError: there are more processes than images in a batch, or each trains a model of its own.
    """
    assert config.plan.images is not None
    gpus, train = config.plan.gpus, config.train
    kept, held = split(config.plan.images, config.data.holdout)
    if gpus > 1 and not config.data.multi_class:
        raise UsageError(
            f"--gpus: without --multi-class each of {gpus} processes trains models of its own; add it, or plan one of "
            "them with --gpus 1"
        )
    batch = min(train.batch_size, kept) // gpus
    if not batch:
        raise UsageError(
            f"--batch-size: expected at least one image for each of {gpus} GPUs, but got {min(train.batch_size, kept)}"
        )
    tested = config.plan.images // 10 if config.plan.test_images is None else config.plan.test_images
    return {"trained_on": kept, "held_out": held, "tested": tested, "of_a_step_in_each": batch}


def split(images: int, holdout: float) -> tuple[int, int]:
    """How many are trained on, and held out."""
    held = min(max(round(holdout * images), 1), images - 1) if holdout else 0
    return images - held, held


def timed(config: Config, found: Counted, images: dict[str, int]) -> Plan:
    """What was counted, and how long it takes at the assumed rates."""
    train, gpus = config.train, config.plan.gpus
    rates = Rates.of(config.plan, WORKERS if config.data.workers is None else max(config.data.workers, 1))
    place = "disk" if config.data.cache == "auto" else config.data.cache
    kept, held, tested, batch = images.values()
    pace = Pace(rates=rates, found=found, place=place)
    passes, batches = train.meta_epochs * train.sub_epochs, kept // (gpus * batch)
    steps, groups = passes * batches, passes * -(-batches // train.accumulate)
    gradients, *others = found.sums
    sums = groups * rates.summing([gradients], gpus) + steps * rates.summing(others, gpus)
    stored = found.features(kept + held + tested)
    bank, where = found.memory["memory_bank"], config.model.memory_place
    outside = bank if where == "host" or (where == "auto" and bank > ROOM * rates.memory) else 0
    judged = train.meta_epochs * held + -(-train.meta_epochs // config.eval.eval_interval) * tested
    seconds = {
        "extraction": pace.filling * (kept + held + tested) / (gpus if place == "disk" else 1),
        "first_look": (1 + bool(config.model.context)) * kept / gpus * pace.image(0.0),
        "training": steps * batch * pace.image(pace.training) + sums,
        "evaluation": judged / gpus * pace.image(pace.judging),
    }
    step = batch * pace.image(pace.training) + (sums / steps if steps else 0.0)
    state = sum(found.memory[part] for part in ("weights", "optimiser", "memory_bank"))
    return Plan(
        gpus=gpus, images=images, steps=steps, rates=rates,
        memory=found.memory
        | {"memory_bank": bank - outside, "features_of_all": stored if place == "device" else 0},
        host={"memory_bank": outside, "features_of_all": stored if place == "ram" else 0},
        disk={"features_of_all": stored if place == "disk" else 0, "a_checkpoint": state},
        sums={"gradients": gradients, "codebooks_and_norms": sum(others), "sent_by_each": sent(sum(found.sums), gpus)},
        step={
            "seconds": step, "seconds_of_sums": sums / steps if steps else 0.0, "sums": len(found.sums),
            "images_per_second": gpus * batch / step,
        },
        work={
            "extraction": said(found.extraction, AT_ONCE, rates), "training": said(found.step, batch, rates),
            "evaluation": said(found.judging, AT_ONCE, rates),
        },
        hours={name: value / 3600 for name, value in seconds.items()},
    )  # fmt: skip


def said(work: Work, images: int, rates: Rates) -> dict[str, float]:
    """Of an image, where so many were counted at once."""
    return {
        "flops": work.flops / images, "bytes": work.bytes / images, "seconds": rates.seconds(work) / images
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds that an image takes in one of the processes; what is read comes while the GPU computes."""

    rates: Rates
    found: Counted
    place: str

    @property
    def extraction(self) -> float:
        return self.rates.seconds(self.found.extraction) / AT_ONCE

    @property
    def training(self) -> float:
        return self.rates.seconds(self.found.step) / self.found.batch

    @property
    def judging(self) -> float:
        return self.rates.seconds(self.found.judging) / AT_ONCE

    @property
    def filling(self) -> float:
        """To extract features that are kept."""
        writing = self.found.features(1) / self.rates.storage if self.place == "disk" else 0.0
        return max(self.extraction, 1 / self.rates.reading, writing) if self.place != "none" else 0.0

    def image(self, work: float) -> float:
        """Work on features of an image, which come from where they are kept, or from the image."""
        if self.place == "none":
            return max(work + self.extraction, 1 / self.rates.reading)
        return max(work, self.found.features(1) / self.rates.storage if self.place == "disk" else 0.0)
