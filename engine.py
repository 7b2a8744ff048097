"""What computes: PyTorch on a checkpoint's model, or another engine on an ONNX file of it. Batches in, answers out."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from default import Config, UsageError, __version__
from export import BATCH, TOLERANCE, Exported, compare, describe, portable, serialized, trace, whole
from models.decision import Decision, scoring_of
from models.detector import Detector
from models.scorer import image_scores
from stage import Stage
from utils.metrics.decisions import rule_text
from utils.run.checkpoint import read_checkpoint
from utils.run.engines import EXTRAS, Run, has_8_bits, openvino_run, pictures, runtime_run, runtime_session
from utils.run.log import optional

ROUGH = 0.05  # of the highest value: what two engines' maps may differ by, on average, in integers
Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says of an image: the shown `map` (H, H) and the image `score`; None for what the model lacks."""

    map: NDArray[np.float32]
    score: float
    concept: int | None = None
    p_value: float | None = None
    threshold: float | None = None
    defective: bool | None = None
    pixel_threshold: float | None = None


def answers(
    maps: NDArray, scores: NDArray, concepts: NDArray | None, verdict: Mapping[str, NDArray] | None
) -> list[Answer]:
    """One answer an image, from arrays (B, ...) of a batch; `verdict` by the names of `Answer`."""
    made = [Answer(map=m, score=float(s)) for m, s in zip(maps, scores, strict=True)]
    if concepts is not None:
        made = [replace(one, concept=int(c)) for one, c in zip(made, concepts, strict=True)]
    for name, values in (verdict or {}).items():
        made = [replace(one, **{name: value}) for one, value in zip(made, values.tolist(), strict=True)]
    return made


class Engine(Protocol):
    """Judges images (B, 3, S, S) in [0, 1], on the CPU; `rule` says how it decides, None without thresholds, and `deep`
    whether images of more than 8 bits per channel are taken."""

    name: str
    rule: str | None
    deep: bool

    def __call__(self, image: Tensor) -> list[Answer]: ...


class Features:
    """Features of images, by an extractor that the models of several classes share: the last batch's are kept."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._last: tuple[Tensor, list[Tensor]] | None = None

    def __call__(self, image: Tensor) -> list[Tensor]:
        if self._last is None or self._last[0] is not image:
            self._last = image, self.stage.extract(image.to(self.stage.device))
        return self._last[1]


class Torch:
    """PyTorch on a model in eval mode."""

    name, deep = "torch", True

    def __init__(self, features: Features, model: Detector) -> None:
        self.features, self.model, self.config = features, model, features.stage.config.eval
        self.rule = None if model.decision is None else model.decision.describe()

    @torch.no_grad()
    def __call__(self, image: Tensor) -> list[Answer]:
        judgement = self.model.judge(self.features(image))
        scores = image_scores(getattr(judgement.maps, self.config.image_score), self.config.top_k)
        maps, concept = getattr(judgement.maps, self.config.shown_score), judgement.output.concept
        decided = decide(self.model.decision, scores, concept)
        concepts = None if concept is None else concept.cpu().numpy()
        return answers(maps.float().cpu().numpy(), scores.cpu().numpy(), concepts, decided)


def decide(decision: Decision | None, scores: Tensor, concept: Tensor | None) -> dict[str, NDArray] | None:
    """Verdicts on scores (B,), by the names of `Answer`."""
    if decision is None:
        return None
    verdict = decision(scores, concept)
    return {name: getattr(verdict, name).cpu().numpy() for name in VERDICT}


VERDICT = ("p_value", "threshold", "defective", "pixel_threshold")


class Onnx:
    """An ONNX file of `--mode export` in another engine; its pictures have 8 bits.

    Args:
        name: of the engine.
        run: gives the file's outputs.
        facts: what the file says of itself.
    """

    deep = False

    def __init__(self, name: str, run: Run, facts: Facts) -> None:
        self.name, self.run, self.facts = name, run, facts
        self.rule = rule_of(facts)

    def __call__(self, image: Tensor) -> list[Answer]:
        found = self.run(pictures(image))
        verdict = {n: found["verdict" if n == "defective" else n] for n in VERDICT} if "verdict" in found else None
        return answers(found["map"], found["score"], found.get("concept"), verdict)


class Quick:
    """An engine on the graph of a checkpoint's model, whose thresholds decide; PyTorch for images of more than 8 bits,
    which a graph's pictures do not hold."""

    deep = True

    def __init__(self, name: str, run: Run, original: Torch) -> None:
        self.name, self.run, self.original, self.rule = name, run, original, original.rule

    def __call__(self, image: Tensor) -> list[Answer]:
        if not has_8_bits(image):
            return self.original(image)
        found, decision = self.run(pictures(image)), self.original.model.decision
        given = {name: torch.from_numpy(found[name]) for name in ("score", "concept") if name in found}
        decided = decide(decision, given["score"], given.get("concept"))
        return answers(found["map"], found["score"], found.get("concept"), decided)


def rule_of(facts: Facts) -> str | None:
    """How a file decides, None without thresholds."""
    if "thresholds" not in facts:
        return None
    low, high = facts["interval"] or (None, None)
    interval = None if low is None else (low, math.inf if high is None else high)
    return rule_text(facts["false_alarm_rate"], facts["thresholds"][0], interval, facts["basis"])


# --- engines on a file


def file_engine(path: Path, config: Config) -> Onnx:
    """The engine of an ONNX file that `--mode export` wrote: onnxruntime's, unless another is asked for.

    Raises:
        UsageError: no such file, not one of ours, or an engine that is not there or does not compute it rightly.
    """
    if not path.is_file():
        raise UsageError(f"--eval_ckpt: no such file: {path}")
    wanted = config.predict.engine
    if wanted == "torch":
        raise UsageError(f"--engine torch: {path} is an ONNX file; leave it out, or give the checkpoint")
    session = runtime_session(path, config.run.device if wanted != "openvino" else "cpu")
    facts = facts_of(session, path)
    if wanted != "openvino":
        return Onnx("onnxruntime", runtime_run(session), facts)
    run = openvino_run(path)
    check_alike(runtime_run(session), run, path, facts)
    return Onnx("openvino", run, facts)


def check_alike(expected: Run, run: Run, path: Path, facts: Facts) -> None:
    """Raise `UsageError` if OpenVINO says of noise what onnxruntime does not say: of integers it has done so."""
    side = facts["center_crop"] or facts["input_size"]
    noise = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
    theirs, ours = run(noise)["map"], expected(noise)["map"]
    off = float(np.abs(theirs - ours).mean() / np.abs(ours).max())
    if not off < (ROUGH if facts["precision"] == "int8" else TOLERANCE):
        raise UsageError(
            f"--engine openvino: computes {path} wrongly, off by {off:.0%} of the highest; use onnxruntime"
        )


def facts_of(session: Any, path: Path) -> dict[str, Any]:
    """What a file says of itself.

    Raises:
        UsageError: it is not one of ours, or of an older version.
    """
    found = session.get_modelmeta().custom_metadata_map
    try:
        facts = {name: json.loads(text) for name, text in found.items()}
    except ValueError:
        facts = {}
    if facts.get("program") != "VQ-Flow":
        raise UsageError(f"--eval_ckpt: {path} is not an ONNX file of --mode export")
    names = [output.name for output in session.get_outputs()]
    if not {"multi_class", "tile"} <= facts.keys() or ("verdict" in names and "pixel_threshold" not in names):
        raise UsageError(f"--eval_ckpt: {path} is of an older version; export it again")
    return facts


# --- engines on a checkpoint


class Graph:
    """The ONNX graph of a checkpoint's model, made when it is first wanted and kept beside the checkpoint.

    Args:
        path: the checkpoint.
        own: its settings (`settled_config`).
        original: PyTorch on it.
    """

    def __init__(self, path: Path, own: Config, original: Torch) -> None:
        self.path, self.own, self.original = path, own, original

    @cached_property
    def place(self) -> Path:
        """Named after all that it depends on: another checkpoint or another scoring has another graph."""
        digest = hashlib.sha256(self.path.read_bytes())
        scoring = scoring_of(self.own.eval, self.own.score_size)
        digest.update(json.dumps([scoring, __version__, torch.__version__], sort_keys=True).encode())
        return self.path.with_name(f"{self.path.stem}.graph-{digest.hexdigest()[:16]}.onnx")

    @property
    def ready(self) -> bool:
        return self.place.is_file()

    def content(self) -> bytes:
        """The file's content; older ones of the same checkpoint go, and a folder that cannot be written is left alone.

        Raises:
            UsageError: a package is missing, the model cannot be written so, or the graph's scores are off.
        """
        place = self.place
        if place.is_file():
            return place.read_bytes()
        made, part = self._made(), place.with_suffix(".part")
        try:
            part.write_bytes(made)
            part.replace(place)
            for old in place.parent.glob(f"{self.path.stem}.graph-*.onnx"):
                if old != place:
                    old.unlink(missing_ok=True)
        except OSError:
            pass
        return made

    def _made(self) -> bytes:
        optional("onnxscript", "--engine", EXTRAS["onnxruntime"])
        print(f"engine: making the ONNX graph of {self.path}, once: it takes half a minute or so", flush=True)
        content, own = read_checkpoint(self.path), portable(self.own)
        exported = whole(content, own, str(self.path))
        exported.detector.decision = None  # it may be asked for another rate: the checkpoint's thresholds decide
        try:
            traced = trace(exported, own.data.view_size)
            made = serialized(traced, describe(own, content, exported, traced))
        except Exception as error:  # of PyTorch's exporter, which has one for each kind of trouble; or beyond 2 GB
            raise UsageError(
                f"--engine: {self.path} cannot be written as an ONNX graph: {type(error).__name__}"
            ) from error
        check_same(exported, made, own.data.view_size)
        return made

    def engine(self, name: str) -> Quick:
        """Another engine on it.

        Raises:
            UsageError: see `content`; or the engine is not installed.
        """
        optional(name, f"--engine {name}", EXTRAS[name])
        content = self.content()
        run = runtime_run(runtime_session(content, "cpu")) if name == "onnxruntime" else openvino_run(content)
        return Quick(name, run, self.original)


def check_same(exported: Exported, made: bytes, size: int) -> None:
    """Raise `UsageError` unless a graph says what its original says, of pictures of noise."""
    found = compare(exported, made, np.random.default_rng(0).integers(0, 256, (BATCH, size, size, 3), dtype=np.uint8))
    if not found.worst < TOLERANCE:
        raise UsageError(f"--engine: the graph's scores are off by {found.worst:.2g} of the highest")


def installed(graph: Graph) -> list[Engine]:
    """PyTorch, and the other engines that are there, on the same model."""
    found: list[Engine] = [graph.original]
    for name in EXTRAS:
        try:
            found.append(graph.engine(name))
        except UsageError:  # not installed, or its graph is off
            continue
    return found


def quickest(engines: Sequence[Engine], image: Tensor) -> tuple[Engine, str]:
    """The fastest on a batch of images, of those that agree with the first, and what was measured."""
    expected, speeds = engines[0](image), {}
    for engine in engines:
        found = engine(image)  # the first time is slower
        if distance(found, expected) < TOLERANCE:
            began = time.perf_counter()
            engine(image)
            speeds[engine.name] = len(image) / (time.perf_counter() - began)
    best = max(engines, key=lambda engine: speeds.get(engine.name, 0.0))
    told = ", ".join(f"{name} {speed:.3g}" for name, speed in speeds.items())
    return best, f"engine: {best.name} (images/s of those that are installed: {told})"


def distance(found: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """The largest difference of maps, as a share of the highest value."""
    gap = max(float(np.abs(a.map - b.map).max()) for a, b in zip(found, expected, strict=True))
    return gap / max(max(float(np.abs(b.map).max()) for b in expected), 1e-12)
