"""Every default of VQ-Flow, written once.

`Config` is a value: four frozen parts, one per concern, made by `make_config` from a preset and from what the user
typed. The command line (main.py) is generated from the `option` metadata below. This module imports nothing but the
standard library.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

__version__ = "1.0.0"

MVTEC_CLASSES = (
    "carpet", "grid", "leather", "tile", "wood", "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill",
    "screw", "toothbrush", "transistor", "zipper",
)  # fmt: skip
VISA_CLASSES = (
    "candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3", "pcb4",
    "pipe_fryum",
)  # fmt: skip
DATASETS = (
    "mvtec", "visa", "folder", "sample", "visa-fewshot", "visa-highshot", "btad", "mpdd", "mvtec-ad-2", "mvtec-loco",
    "mvtec-3d", "real-iad", "ksdd2", "kolektorsdd", "cifar10", "autovi", "vad", "jsonl", "csv",
    "real-iad-sv", "real-iad-noise-0.0", "real-iad-noise-0.1", "real-iad-noise-0.2", "real-iad-noise-0.4",
)  # fmt: skip
FPR_LIMITS = {"mvtec-ad-2": 0.05}  # of AUPRO, where a data set's paper asks for another one than the default
PUBLISHED = ("mvtec", "visa", "btad", "mpdd", "real-iad", "cifar10")  # data sets that others have published figures of
GOOD_NAMES = (
    "good", "ok", "okay", "normal", "nominal", "pass", "passed", "healthy", "clean", "defect_free", "no_defect",
)  # fmt: skip
SCORES = ("mul", "add", "likelihood", "surprise", "contrast")
ABSOLUTE = ("likelihood", "surprise", "contrast")  # scores by which images can be compared
CALIBRATED = ("surprise", "contrast")  # scores in units of what normal images have
JUDGING = ("test", "predict", "export", "submit")  # modes that need a checkpoint
ENGINES = ("auto", "torch", "onnxruntime", "openvino")  # what computes a prediction
MANY_IMAGES, SOME_IMAGES = 300, 30  # from which on another engine saves more time than its graph and its trial take
MODES = ("train", "test", "predict", "table", "export", "cache", "inspect", "submit", "plan")
GPUS: dict[str, tuple[float, ...]] = {  # as their makers state: GB, GB/s, TFLOP/s in float32, TF32 and bfloat16, dense
    "v100": (32, 900, 15.7, 15.7, 15.7), "rtx3090": (24, 936, 35.6, 35.6, 71), "rtx4090": (24, 1008, 82.6, 82.6, 165),
    "l40s": (48, 864, 91.6, 183, 362), "a100": (80, 2039, 19.5, 156, 312), "h100": (80, 3350, 67, 494, 989),
    "h200": (141, 4800, 67, 494, 989),
}  # fmt: skip
PRECISIONS = ("float32", "float16", "int8")  # of ONNX files


class UsageError(ValueError):
    """A mistake of the user's: main.py prints its one line and leaves with status 2."""


Bind = Literal["model", "data", "run", "result", "free"]
"""What a setting is part of, and so who may have it otherwise:

model   what a checkpoint's weights mean: a checkpoint fixes it
data    the images that the model was trained and its scores were calibrated on: a checkpoint fixes it
run     how a run trains and evaluates: a resumed run keeps it, the evaluation of a checkpoint may choose
result  how far a run goes and where its files lie: a resumed run may choose, too, but it tells two results apart
free    changes no result
"""
FIXED: tuple[Bind, ...] = ("model", "data")  # by a checkpoint: for --mode test and export
KEPT: tuple[Bind, ...] = (*FIXED, "run")  # by a run folder: for --resume


def option(
    default: Any, text: str, *, binds: Bind, choices: tuple = (), low: float | None = None, high: float | None = None
) -> Any:
    """A dataclass field that is also a command-line flag; `low` and `high` are inclusive bounds.

    None as default of a switch: on or off as other settings say.
    """
    meta = {"help": text, "binds": binds, "choices": choices, "low": low, "high": high}
    return field(default=default, metadata=meta)


def flag_of(name: str) -> str:
    """The spelling of a field on the command line; the released code writes --eval_ckpt with an underscore."""
    return "--eval_ckpt" if name == "eval_ckpt" else "--" + name.replace("_", "-")


def expect(flag: str, value: Any, choices: tuple | list) -> None:
    """Raise `UsageError` unless `value` is one of `choices`."""
    if value not in choices:
        raise UsageError(f"{flag}: expected one of {', '.join(map(str, choices))}, but got {value!r}")


KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {  # of fields: their values' types, and in words
    "str": (str, "text"), "int": (int, "a whole number"), "float": ((int, float), "a number"),
    "bool": (bool, "on or off"),
}  # fmt: skip


def fits(value: Any, kind: str) -> bool:
    """Whether a value is of a field's annotated type, such as `tuple[int, ...] | None`."""
    if value is None:
        return kind.endswith(" | None")
    if value in words_of(kind):
        return True
    kind = kind.removesuffix(" | None").partition(" | Literal")[0]
    if kind.startswith("tuple["):
        return isinstance(value, tuple) and all(fits(v, kind[len("tuple[") : -len(", ...]")]) for v in value)
    return isinstance(value, KINDS[kind][0]) and isinstance(value, bool) == (kind == "bool")


def words_of(kind: str) -> list[str]:
    """The words that a field of another type takes as well: ["native"] of `int | Literal["native"] | None`."""
    return re.findall(r"Literal\[.(\w+).\]", kind)


def in_words(kind: str) -> str:
    """A field's annotated type as an error names it."""
    found = re.search(r"\b(str|int|float|bool)\b", kind)
    assert found
    several = " or several of them" if "tuple" in kind else ""
    return " or ".join([KINDS[found[1]][1], *words_of(kind)]) + several


class Part:
    """Checks that every part of the configuration shares: types, choices and bounds, element by element for tuples."""

    def __post_init__(self) -> None:
        for entry in fields(self):  # type: ignore[arg-type]
            value, meta = getattr(self, entry.name), entry.metadata
            if not fits(value, str(entry.type)):
                got = " ".join(repr(value).split())[:60]
                raise UsageError(f"{flag_of(entry.name)}: expected {in_words(str(entry.type))}, but got {got}")
            for item in value if isinstance(value, tuple) else (value,):
                if item is None or item in words_of(str(entry.type)):
                    continue
                if meta["choices"]:
                    expect(flag_of(entry.name), item, meta["choices"])
                self._check_bounds(flag_of(entry.name), item, meta["low"], meta["high"])

    @staticmethod
    def _check_bounds(flag: str, item: Any, low: float | None, high: float | None) -> None:
        if isinstance(item, float) and not math.isfinite(item):
            raise UsageError(f"{flag}: expected a finite number, but got {item}")
        if isinstance(item, int) and abs(item) >= 1 << 63:
            raise UsageError(f"{flag}: expected a number below 2^63, but got one of {item.bit_length()} bits")
        if low is not None and item < low:
            raise UsageError(f"{flag}: expected at least {low}, but got {item}")
        if high is not None and item > high:
            raise UsageError(f"{flag}: expected at most {high}, but got {item}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Part):
    """Which images, how large, and how they are read."""

    dataset: str = option("mvtec", "the data set", binds="data", choices=DATASETS)
    data_path: str | None = option(
        None, "folder that holds one folder per class (default: the data set's own place under data/)", binds="result"
    )
    class_names: tuple[str, ...] = option(("all",), "one class, several, or all", binds="data")
    multi_class: bool = option(False, "one model for all classes instead of one model per class", binds="data")
    input_size: int = option(384, "side in pixels to which images are resized", binds="data", low=32, high=4096)
    resize: str = option(
        "squash",
        "how an image that is no square becomes one: squash both sides to --input-size, pad the shorter one with its "
        "edge, or crop the longer one; what is padded counts in no pixel metric, what is cropped is not looked at",
        binds="data",
        choices=("squash", "pad", "crop"),
    )
    center_crop: int | None = option(
        None,
        "side of the middle of the resized images and masks, to which they are cropped (Dinomaly's protocol: 392 of "
        "448)",
        binds="data",
        low=32,
        high=4096,
    )
    tile: int | None = option(
        None,
        "cut images into squares of this many pixels, each of which the model sees at --input-size, and put their "
        "score maps together at the image's own size: for large images with small defects",
        binds="data",
        low=16,
        high=1 << 16,
    )
    overlap: int | None = option(
        None,
        "pixels that neighbouring tiles share at least, over which their score maps blend (default: an eighth of "
        "--tile)",
        binds="data",
        low=0,
        high=1 << 15,
    )
    limit: int | None = option(
        None, "use at most this many images per class and kind, for a quick look", binds="data", low=1
    )
    bit_depth: int | None = option(
        None,
        "bits of integer images that have more than 8 per channel (default: the least of 8, 10, 12, 14, 16, 20, 24 and "
        "32 that hold a class's training images)",
        binds="result",  # what was decided with it is in the checkpoint (`datasets.reading`)
        low=8,
        high=32,
    )
    float_range: tuple[float, ...] | None = option(
        None,
        "black and white of floating-point images: two values (default: what suits a class's training images)",
        binds="result",
    )
    background: str = option(
        "auto",
        "what transparent images are laid on; auto: per class, the one that is farther from its visible pixels",
        binds="result",
        choices=("auto", "white", "black"),
    )
    max_pixels: int = option(
        178_956_970,
        "most pixels that an image may have, those of more than 8 bits counted four times; more are taken for a "
        "mistake",
        binds="free",
        low=1,
    )
    good_names: tuple[str, ...] = option(GOOD_NAMES, "folders of good images, whatever the case", binds="result")
    trust_masks: bool = option(
        False, "take masks as they are: inverted or empty ones, and those of another shape, too", binds="result"
    )
    holdout: float = option(
        0.0,
        "share of the training images of each class that is not trained on, but says what scores unseen normal images "
        "have (--*-score surprise and contrast, the report's threshold)",
        binds="data",
        low=0.0,
        high=0.5,
    )
    holdout_seed: int | None = option(
        None,
        "draw the images of --holdout at random, by this seed (default: at equal distances, the same in every run)",
        binds="data",
        low=0,
        high=2**32 - 1,
    )
    workers: int | None = option(
        None, "processes that read images (default: 0 on a CPU, up to 8 with a GPU)", binds="free", low=0, high=256
    )
    cache: str = option(
        "auto",
        "where features are kept that are extracted once: on disk, in memory, on the device, or nowhere; auto: on disk "
        "if they fit, else nowhere",
        binds="free",
        choices=("auto", "disk", "ram", "device", "none"),
    )
    pre_extract: bool = option(
        False,
        "insist on a cache: refuse to run if the features do not fit, where --cache auto would do without",
        binds="free",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.center_crop is not None and self.center_crop > self.input_size:
            raise UsageError(
                f"--center-crop: expected at most --input-size, which is {self.input_size}, but got {self.center_crop}"
            )
        if self.tile is not None:
            self._check_tile(self.tile)
        span = self.float_range
        if span is not None and (len(span) != 2 or not span[0] < span[1]):
            raise UsageError(f"--float-range: expected black and a higher white, but got {' '.join(map(str, span))}")

    def _check_tile(self, tile: int) -> None:
        """Raise `UsageError` for what tiles cannot be combined with."""
        if self.shared >= tile:
            raise UsageError(f"--overlap: expected less than --tile, which is {tile}, but got {self.shared}")
        if self.resize != "squash" or self.center_crop is not None:
            flag = "--center-crop" if self.center_crop is not None else f"--resize {self.resize}"
            raise UsageError(
                f"{flag}: --tile cuts squares out of an image and looks at all of it; leave one of them out"
            )

    @property
    def shared(self) -> int:
        """Pixels that neighbouring tiles share at least."""
        return (self.tile or 0) // 8 if self.overlap is None else self.overlap

    @property
    def view_size(self) -> int:
        """Side of what the model sees."""
        return self.center_crop or self.input_size


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Part):
    """The extractor, the two levels of codebooks, the flows and the prior."""

    extractor: str = option("convnextv2_base", "any timm model that gives feature maps", binds="model")
    weights: str | None = option(
        None, "file with the extractor's weights (.safetensors, .pth, .bin) instead of a download", binds="result"
    )
    pretrained: bool = option(
        True, "pretrained weights for the extractor; without them its weights are random", binds="model"
    )
    pool_type: str = option(
        "avg", "3x3 stride-2 pooling of the levels below the top", binds="model", choices=("avg", "max", "none")
    )
    standardize: bool = option(
        True, "standardize each feature channel with statistics of the training images", binds="model"
    )
    quantize_enable: bool = option(
        False, "use the codebooks: concept (CPC) and concept-specific patterns (CSPC)", binds="model"
    )
    quantize_type: str = option(
        "residual", "what the pattern codebooks quantize", binds="model", choices=("residual", "naive")
    )
    pattern_quantize: bool = option(True, "use the pattern codebooks (CSPC) beside the concept codebook", binds="model")
    concat_pos: bool = option(False, "put a sine/cosine encoding of the position into the condition", binds="model")
    mixed_gaussian: bool = option(False, "a Gaussian of its own for each concept as the latent prior", binds="model")
    dim_cpc: int = option(512, "size of a concept's vector", binds="model", low=1, high=65536)
    k_cpc: int = option(32, "number of concepts", binds="model", low=1, high=1 << 20)
    k_cspc: int = option(512, "number of patterns per level", binds="model", low=1, high=1 << 20)
    c_pos_conds: tuple[int, ...] = option(
        (64,),
        "channels of the position encoding: one value, or the same one per level",
        binds="model",
        low=4,
        high=4096,
    )
    c_conds: tuple[int, ...] | None = option(
        None,
        "project each level's condition to this many channels: one value, or one per level (default: no projection)",
        binds="model",
        low=1,
        high=65536,
    )
    parallel_blocks: tuple[int, ...] = option(
        (2, 5, 8), "flow blocks per level: one value, or one per level", binds="model", low=1, high=64
    )
    semantics: str = option(
        "learned",
        "what concepts are told apart by: a network trained with the flow, or the principal components of the top "
        "level's mean as they are, so that a concept stays what it was at the start",
        binds="model",
        choices=("learned", "pooled"),
    )
    context: int = option(
        0,
        "judge each place by its surroundings, too, at this distance in places (Gaussians in closed form), for "
        "--*-score surprise and contrast; 0: do not",
        binds="model",
        low=0,
        high=16,
    )
    memory: int = option(
        0,
        "training images whose features are kept as a second opinion for --*-score surprise and contrast; 0: none",
        binds="model",
        low=0,
        high=1 << 20,
    )
    memory_place: str = option(
        "auto",
        "where those features lie while they are searched: on the device, or in main memory, from which those of the "
        "most similar images are fetched; auto: in main memory if they take more than half of a GPU",
        binds="free",
        choices=("auto", "device", "host"),
    )
    clamp: float = option(1.9, "bound on the log-scale of the couplings", binds="model", low=0.01, high=20.0)
    codebooks: str = option(
        "seeded",
        "codebook updates: seeded from data and revived, or as released",
        binds="model",
        choices=("seeded", "released"),
    )
    conditioning: str = option(
        "structured",
        "convolve conditions by their parts, or as dense maps (the reference, slow on a CPU); auto: measured before "
        "training, the quicker one, with --deterministic the first",
        binds="run",
        choices=("structured", "direct", "auto"),
    )
    objective: str = option(
        "likelihood",
        "exact likelihood, or the released loss without the mixture's log-determinant",
        binds="model",
        choices=("likelihood", "released"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("parallel_blocks", "c_conds", "c_pos_conds"):
            value = getattr(self, name)
            if value is not None and len(value) not in (1, 3):
                raise UsageError(f"{flag_of(name)}: expected one value or three (one per level), but got {len(value)}")
        if len(set(self.c_pos_conds)) > 1:
            raise UsageError(
                "--c-pos-conds: the levels share one semantic embedding, so the values must be equal, "
                f"but got {' '.join(map(str, self.c_pos_conds))}"
            )
        if self.semantics == "pooled" and self.codebooks == "released":
            raise UsageError("--semantics: pooled takes codes from the data, so it needs --codebooks seeded")
        if self.context and self.quantize_enable and self.semantics == "learned":
            raise UsageError(
                "--context: needs concepts that stay what they are, so --semantics pooled, but got learned"
            )
        if self.c_pos_conds[0] % 4:
            raise UsageError(
                "--c-pos-conds: expected a multiple of 4 (sine and cosine, row and column), "
                f"but got {self.c_pos_conds[0]}"
            )

    @property
    def blocks(self) -> tuple[int, ...]:
        return self.parallel_blocks * 3 if len(self.parallel_blocks) == 1 else self.parallel_blocks

    @property
    def condition_sizes(self) -> tuple[int, ...] | None:
        return self.c_conds * 3 if self.c_conds is not None and len(self.c_conds) == 1 else self.c_conds

    @property
    def kept_pool(self) -> str:
        """Pooling of the features that are cached and given to the model: none where somebody wants all places."""
        return "none" if self.all_places else self.pool_type

    @property
    def all_places(self) -> bool:
        """Whether memory or context look at features that are not pooled."""
        return bool(self.memory or self.context)

    @property
    def positions(self) -> int:
        """P, the channels of the position encoding; 0 without `concat_pos`."""
        return self.c_pos_conds[0] if self.concat_pos else 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Part):
    """The optimisation."""

    lr: float = option(1e-4, "learning rate", binds="run", low=1e-9, high=10.0)
    batch_size: int = option(16, "images per step", binds="run", low=1, high=65536)
    meta_epochs: int = option(30, "meta epochs; the model is evaluated after each", binds="result", low=1, high=100000)
    sub_epochs: int = option(2, "passes over the training images in a meta epoch", binds="run", low=1, high=100000)
    schedule: str = option(
        "step",
        "learning rate over the run: step (x0.33 at 70 %% and 90 %% of it), cosine, constant, or as released",
        binds="run",
        choices=("step", "cosine", "constant", "released"),
    )
    warmup: float = option(1 / 6, "share of the run with a rising learning rate", binds="run", low=0.0, high=1.0)
    weight_decay: float = option(0.0, "decoupled weight decay", binds="run", low=0.0, high=1.0)
    noise: float = option(
        0.0,
        "standard deviation of Gaussian noise on the standardized features while training",
        binds="run",
        low=0.0,
        high=10.0,
    )
    clip_norm: float = option(2.0, "largest norm of the gradient", binds="run", low=1e-6)
    quantize_weight: float = option(1.0, "weight of the codebooks' commitment in the loss", binds="run", low=0.0)
    reassign_quantize: bool = option(
        False, "after a meta epoch, re-seed unused codes from the most used ones", binds="run"
    )
    amp_enable: bool = option(
        False, "mixed precision (bfloat16) on devices that have units for it; elsewhere nothing changes", binds="run"
    )
    accumulate: int = option(
        1,
        "add up the gradients of this many batches before a step: a larger batch in less memory",
        binds="run",
        low=1,
        high=65536,
    )
    checkpoint_activations: bool = option(
        False,
        "compute the flows' hidden layers again in the backward pass instead of keeping them: less memory",
        binds="free",
    )
    compile: bool = option(False, "compile the flows (torch.compile); on a CPU this needs a C++ compiler", binds="free")
    profile: int = option(
        0, "write a trace of this many training steps into the run folder", binds="free", low=0, high=1000
    )
    save_every: int = option(
        0,
        "training steps between checkpoints in the middle of a meta epoch, from which --resume goes on, too; 0: none",
        binds="free",
        low=0,
    )
    max_dropped: int = option(
        10,
        "steps in a row without a finite loss after which a run stops; fewer are left out and counted",
        binds="free",
        low=1,
    )
    resume: bool = option(False, "go on with the newest unfinished run of the same settings", binds="free")
    tensorboard: bool = option(False, "log to TensorBoard files in the run folder", binds="free")
    wandb_enable: bool = option(False, "log to Weights & Biases", binds="free")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Part):
    """Scores, metrics and what is shown of them."""

    eval_ckpt: str | None = option(None, "checkpoint to evaluate, ours or an official one", binds="free")
    eval_interval: int = option(
        1, "meta epochs between evaluations; the last one is always evaluated", binds="run", low=1
    )
    loc_eval: bool = option(False, "show pixel AUROC during training", binds="free")
    pro_eval: bool = option(False, "show AUPRO during training", binds="free")
    pro_eval_interval: int = option(
        4, "meta epochs between the AUPRO values shown during training", binds="free", low=1
    )
    image_score: str = option("mul", "map that image metrics are made of", binds="run", choices=SCORES)
    pixel_score: str = option("add", "map that pixel metrics are made of", binds="run", choices=SCORES)
    pro_score: str = option("mul", "map that AUPRO is made of", binds="run", choices=SCORES)
    false_alarm_rate: float = option(
        0.01,
        "share of normal images that may be called defective, and of those on which any pixel is marked",
        binds="run",
        low=1e-6,
        high=0.5,
    )
    top_k: float = option(
        0.03, "share of the highest pixels whose mean is the image score", binds="run", low=1e-6, high=1.0
    )
    fpr_limit: float = option(
        0.3,
        "false-positive rate up to which AUPRO is integrated; for mvtec-ad-2 0.05 unless given",
        binds="run",
        low=1e-4,
        high=1.0,
    )
    eval_size: int | Literal["native"] | None = option(
        None,
        "side of score maps and masks in evaluation, a mask being resized from its file by nearest neighbour, and a "
        "pixel defective where the result is > 0.5; native: each image's own size (default: the side of what the model "
        "sees)",
        binds="run",
        low=8,
        high=4096,
    )
    bootstrap: int = option(
        0,
        "resamples of the test images for 95 %% intervals of the image metrics; 0: none",
        binds="free",
        low=0,
        high=1_000_000,
    )
    compare: bool | None = option(
        None,
        "show published figures beside the results (default: on for data sets that have some)",
        binds="free",
    )
    pictures: int = option(4, "pictures per class and kind of defect (image, score map, mask)", binds="free", low=0)
    report: bool = option(True, "write report.html into the run folder", binds="free")

    @property
    def shown_score(self) -> str:
        """The map that is shown and thresholded: the image score's own, which explains a verdict, or the pixel score's,
        whichever images can be compared by, else the likelihood."""
        return next((name for name in (self.image_score, self.pixel_score) if name in ABSOLUTE), "likelihood")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(Part):
    """What --mode predict writes."""

    output: str | None = option(
        None,
        "folder for what is predicted; what an earlier prediction left there is kept, and its images are not judged "
        "again (default: predict, predict-2, ... beside the checkpoint); of --mode submit, an empty one",
        binds="free",
    )
    engine: str = option(
        "auto",
        "what computes on a CPU; auto: PyTorch for few images, from "
        f"{MANY_IMAGES} on the one that is fastest on the first of them; the others need an ONNX graph, made once and "
        f"kept beside the checkpoint, with which {SOME_IMAGES} are enough",
        binds="free",
        choices=ENGINES,
    )
    overlays: bool = option(
        True, "write each image at its own size, grey where it is normal and coloured where it is not", binds="free"
    )
    save_maps: str | None = option(
        None,
        "write score maps at the images' own size: as float32 (npy, tiff), or as 100 score + 32768 in 16 bits (png16)",
        binds="free",
        choices=("npy", "tiff", "png16"),
    )
    save_masks: bool = option(
        False, "write masks at the images' own size: 255 where the map is above its threshold", binds="free"
    )
    watch: str | None = option(
        None, "folder whose new images are judged as they come, until the program is interrupted", binds="free"
    )
    fail_on: str | None = option(
        None, "leave with status 3 if an image is defective", binds="free", choices=("defect",)
    )


@dataclass(frozen=True, kw_only=True)
class PlanConfig(Part):
    """What --mode plan reckons with."""

    images: int | None = option(None, "training images", binds="free", low=1, high=10**12)
    test_images: int | None = option(
        None, "test images of an evaluation (default: a tenth of --images)", binds="free", low=0, high=10**12
    )
    gpus: int = option(1, "processes, each with a GPU", binds="free", low=1, high=100_000)
    gpu: str = option(
        "a100", "whose memory and rates are assumed, as its maker states them", binds="free", choices=tuple(GPUS)
    )
    tflops: tuple[float, ...] | None = option(
        None,
        "10^12 operations/s of products instead of the GPU's: one value, or three (float32, TF32, bfloat16)",
        binds="free",
        low=1e-6,
    )
    bandwidth: float | None = option(None, "GB/s of the memory of a GPU instead of its own", binds="free", low=1e-3)
    efficiency: float = option(0.4, "share of these rates that is reached", binds="free", low=1e-3, high=1.0)
    interconnect: float = option(
        25.0, "GB/s that a GPU sends to the others, all of them at once", binds="free", low=1e-6
    )
    latency: float = option(50.0, "microseconds that a sum over all GPUs takes at least", binds="free", low=0.0)
    storage: float = option(1.0, "GB/s that a process reads features from disk with", binds="free", low=1e-6)
    reading: float = option(50.0, "images/s that one of the --workers decodes and resizes", binds="free", low=1e-6)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tflops is not None and len(self.tflops) not in (1, 3):
            raise UsageError(f"--tflops: expected one value or three, but got {len(self.tflops)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Part):
    """Where and on what the program runs."""

    mode: str = option("train", "what to do", binds="free", choices=MODES)
    paths: tuple[str, ...] = option(
        (),
        "run folders that --mode table gathers into one table; images and folders of them that --mode predict judges, "
        "- for a list of them on standard input",
        binds="free",
    )
    json: bool = option(False, "print what --mode inspect finds, or --mode plan counts, as JSON", binds="free")
    precision: tuple[str, ...] = option(
        ("float32",),
        "what --mode export writes, a file each: as trained, products in half precision, or the extractor's in 8-bit "
        "integers, calibrated on normal images",
        binds="free",
        choices=PRECISIONS,
    )
    clear: int | None = option(
        None,
        "what --mode cache removes: features that no program has used for this many days; 0: all (default: it lists)",
        binds="free",
        low=0,
    )
    work_dir: str = option("work_dirs", "folder for run folders, and for features that are kept", binds="free")
    offline: bool = option(
        False,
        "open no connection: weights come from a file, a package, or the hub's cache on this machine",
        binds="free",
    )
    device: str = option("auto", "where to compute: auto, cuda, cuda:1 (the second GPU), cpu or mps", binds="free")
    deterministic: bool = option(
        False,
        "on CUDA kernels that add in the same order in each run, where PyTorch has them: slower; a CPU always does so",
        binds="free",
    )
    name: str | None = option(
        None, "start of the run folder's name (default: data set, extractor and multi or single)", binds="free"
    )
    seed: int = option(9826, "seed of every random choice", binds="run", low=0, high=2**32 - 1)
    seeds: tuple[int, ...] = option(
        (),
        "train once with each of these seeds and summarize: mean and standard deviation",
        binds="free",
        low=0,
        high=2**32 - 1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paths and self.mode not in ("table", "predict"):
            raise UsageError(f"PATH: paths are for --mode table and predict alone, but got {self.paths[0]!r}")
        if self.mode == "table" and not self.paths:
            raise UsageError("PATH: expected run folders after --mode table, but got none")
        if self.seeds and self.mode != "train":
            raise UsageError(f"--seeds: trains one model per seed, so it needs --mode train, but got {self.mode}")
        if len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"--seeds: expected different seeds, but got {' '.join(map(str, self.seeds))}")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            raise UsageError(f"--device: expected one of auto, cuda, cuda:N, cpu, mps, but got {self.device!r}")
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise UsageError(f"--name: expected letters, digits, '_', '.' and '-', but got {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All that a run depends on."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    predict: PredictConfig = PredictConfig()
    plan: PlanConfig = PlanConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        if self.run.mode in JUDGING and not self.eval.eval_ckpt:
            raise UsageError(f"--eval_ckpt: expected a checkpoint file in --mode {self.run.mode}, but got none")
        if self.run.mode == "plan" and self.plan.images is None:
            raise UsageError("--images: expected how many images are trained on in --mode plan, but got none")
        if self.data.pre_extract and self.data.cache == "none":
            raise UsageError("--pre-extract: contradicts --cache none; leave one of them out")
        if self.train.noise and not self.model.standardize:
            raise UsageError("--noise: works on standardized features, but --no-standardize was given")
        if self.eval.compare and self.data.dataset not in PUBLISHED:
            raise UsageError(
                f"--compare: there are published figures for {', '.join(PUBLISHED)}, not for {self.data.dataset}"
            )

    @property
    def score_size(self) -> int:
        """Side of score maps; of masks, too, unless metrics are made at the images' own sizes."""
        size = self.eval.eval_size
        return size if isinstance(size, int) and not self.data.tile else self.data.view_size

    @property
    def native(self) -> bool:
        """Whether pixel metrics are made at the images' own sizes."""
        return self.eval.eval_size == "native" or bool(self.data.tile and self.eval.eval_size is None)

    @property
    def compared(self) -> bool:
        """Whether published figures stand beside the results."""
        return self.data.dataset in PUBLISHED if self.eval.compare is None else self.eval.compare


PARTS: dict[str, type[Part]] = {
    "data": DataConfig, "model": ModelConfig, "train": TrainConfig, "eval": EvalConfig, "predict": PredictConfig,
    "plan": PlanConfig, "run": RunConfig,
}  # fmt: skip


def settings_of(*binds: Bind) -> tuple[str, ...]:
    """Names of all settings that are part of one of `binds`."""
    return tuple(e.name for kind in PARTS.values() for e in fields(kind) if e.metadata["binds"] in binds)  # type: ignore[arg-type]


_METHOD = {
    "class_names": ("all",), "multi_class": True, "quantize_enable": True, "quantize_type": "residual",
    "concat_pos": True, "mixed_gaussian": True,
}  # fmt: skip
_PAPER = _METHOD | {"extractor": "convnextv2_base", "standardize": False}
_SMALL = _METHOD | {
    "extractor": "tf_efficientnet_lite0", "input_size": 256, "dim_cpc": 64, "k_cpc": 16, "k_cspc": 128,
    "c_pos_conds": (16,), "lr": 3e-4, "schedule": "cosine", "warmup": 0.1, "noise": 0.3, "weight_decay": 0.01,
    "meta_epochs": 2, "eval_interval": 2, "semantics": "pooled", "context": 2, "memory": 1000, "holdout": 0.1,
    "top_k": 0.001, "image_score": "surprise", "pixel_score": "contrast", "pro_score": "contrast",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "paper-mvtec": _PAPER | {"dataset": "mvtec"},
    "paper-visa": _PAPER | {"dataset": "visa"},
    "released": _PAPER | {"objective": "released", "codebooks": "released", "schedule": "released"},
    "cpu": _SMALL,
    "accurate": _SMALL | {"input_size": 320},
    "sample": _SMALL | {"dataset": "sample"},
    "dinov2": _SMALL | {"extractor": "vit_small_patch14_reg4_dinov2", "input_size": 392, "pool_type": "none"},
}


def make_config(preset: str | None = None, **typed: Any) -> Config:
    """The defaults, overridden by a preset's row, overridden by what the user typed.

    Raises:
        UsageError: unknown preset or option, or a value out of its range.
    """
    if preset is not None:
        expect("--preset", preset, tuple(PRESETS))
    values = (PRESETS[preset] if preset else {}) | typed
    limit = FPR_LIMITS.get(str(values.get("dataset")))  # text, as a damaged checkpoint may hold anything there
    values = ({"fpr_limit": limit} if limit else {}) | values
    owner = {entry.name: part for part, kind in PARTS.items() for entry in fields(kind)}  # type: ignore[arg-type]
    for name in values:
        expect("option", name, tuple(owner))
    made = {part: kind(**{n: v for n, v in values.items() if owner[n] == part}) for part, kind in PARTS.items()}
    return Config(**made)  # type: ignore[arg-type]


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain values, ready for JSON or a checkpoint."""
    return dataclasses.asdict(config)


def flat(values: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All settings of `to_dict`'s parts by their names, which are unique."""
    return {name: value for part in values.values() for name, value in part.items()}


def shown(value: Any) -> str:
    """A setting's value as one types or reads it."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def from_dict(values: dict[str, dict[str, Any]]) -> Config:
    """The inverse of `to_dict`; lists (JSON has no tuples) become tuples.

    Raises:
        UsageError: a value out of its range or of another type, or a part or name that this version does not know.
    """
    if not isinstance(values, Mapping) or not all(isinstance(part, Mapping) for part in values.values()):
        raise UsageError(f"settings: expected one group for each of {', '.join(PARTS)}")
    known: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in flat(values).items()}
    known.pop("runs", None)  # of version 1.0: paths on the command line, which belong to no run
    return make_config(**known)
