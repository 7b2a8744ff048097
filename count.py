"""What a model takes of a device, counted on one without content: memory, work, and what processes tell each other."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datasets.cache import FeatureSize
from default import Config
from models.detector import Detector
from models.extractor import FrozenExtractor
from models.loss import loss_terms
from models.memory import Memory
from models.scorer import image_scores
from models.vqflow import VQFlow, pool_features
from models.work import Work, gradient_bytes, hollow, messages, state_bytes
from stage import new_scorer

AT_ONCE = 4  # images that extraction and evaluation are counted on
TOLD = (32, 8)  # bytes of the sums of a step's losses, and of whether to stop


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What a model takes.

    Attributes:
        size: side of the masks, for the cache.
        shapes: (H_l, W_l, c_l) of the kept features of an image.
        batch: images of a step in each process.
        extraction, judging: work on `AT_ONCE` images.
        step: work on a batch.
        memory: bytes on the device: `weights` with codebooks and a scorer's context, `activations` as all else that a
            step has at its peak, `batches` as features of this step and the next.
        sums: bytes of each sum over all processes in a step, gradients first.
    """

    size: int
    shapes: tuple[tuple[int, ...], ...]
    batch: int
    extraction: Work
    step: Work
    judging: Work
    memory: dict[str, int]
    sums: list[int]

    def features(self, images: int) -> int:
        """Bytes in a cache."""
        return FeatureSize(count=images, shapes=self.shapes, mask=-(-self.size * self.size // 8)).total


def count(config: Config, batch: int, remembered: int) -> Counted:
    """Of a model with so many images in its memory, if it has one, and so many in each process's batch."""
    model = config.model
    with torch.device("meta"):
        extractor = FrozenExtractor(model.extractor, input_size=config.data.view_size, pretrained=False)
        flow = VQFlow(model, extractor.channels, extractor.strides, recompute=config.train.checkpoint_activations)
        detector = Detector(flow, new_scorer(model, extractor.channels), size=config.score_size)
    for module in (extractor, detector):
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with hollow(extractor, detector):
        extraction, kept = extracted(extractor, config)
        shapes = tuple((h.shape[2], h.shape[3], h.shape[1]) for h in kept)
        step, moments = trained(flow, of_batch(kept, batch), config)
        bank = filled(detector.scorer.memory, kept, remembered)
        judging = judged(detector, kept, config)
        others = state_bytes(detector.scorer) - bank
        gradients = gradient_bytes(flow)
        memory = {
            "extractor": state_bytes(extractor), "weights": state_bytes(flow) + others, "optimiser": moments,
            "gradients": gradients, "activations": step.peak - gradients,
            "batches": 2 * sum(h.numel() * h.element_size() for h in of_batch(kept, batch)), "memory_bank": bank,
        }  # fmt: skip
        return Counted(
            size=config.score_size, shapes=shapes, batch=batch, extraction=extraction, step=step, judging=judging,
            memory=memory, sums=[gradients, *messages(flow), *TOLD],
        )  # fmt: skip


def mixed(config: Config) -> contextlib.AbstractContextManager:
    """bfloat16 where that is asked for, as on a GPU that has units for it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=config.train.amp_enable)


def of_batch(kept: Sequence[Tensor], batch: int) -> list[Tensor]:
    """Features of so many images, channels-last."""
    return [h.new_empty(batch, *h.shape[1:]).contiguous(memory_format=torch.channels_last) for h in kept]


def extracted(extractor: FrozenExtractor, config: Config) -> tuple[Work, list[Tensor]]:
    """The work of extraction, and kept features."""
    side = config.data.view_size
    image = torch.empty(AT_ONCE, 3, side, side).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), Work() as work:
        with mixed(config):
            levels = extractor(image)
        kept = pool_features([h.float() for h in levels], extractor.strides, config.model.kept_pool)
    return work, kept


def trained(flow: VQFlow, kept: list[Tensor], config: Config) -> tuple[Work, int]:
    """The work of a training step, and the bytes of the optimiser's state."""
    flow.train()
    parameters = [p for p in flow.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()  # its state is there before the step that counts
    optimizer.zero_grad(set_to_none=True)
    with Work() as work:
        before = [buffer.clone() for buffer in flow.buffers()]  # as `take_step` has them
        with mixed(config):
            output = flow(kept, noise=config.train.noise)
        loss_terms(output, config.train.quantize_weight).total.backward()
        del output, before
        torch.nn.utils.clip_grad_norm_(parameters, config.train.clip_norm)
        optimizer.step()
    moments = sum(v.numel() * v.element_size() for state in optimizer.state.values() for v in state.values())
    optimizer.zero_grad(set_to_none=True)
    return work, moments


def filled(memory: Memory | None, kept: Sequence[Tensor], images: int) -> int:
    """Give a memory so many images without content; its bytes."""
    if memory is None:
        return 0
    state = {"descriptors": torch.empty(images, 0)}
    for number, view in enumerate(memory.views):
        places = min(view.places, kept[view.levels[0]].shape[2] * kept[view.levels[0]].shape[3])
        state[f"vectors_{number}"] = torch.empty(images, places, 0)
    memory.make_room(state)
    return state_bytes(memory)


def judged(detector: Detector, kept: Sequence[Tensor], config: Config) -> Work:
    """The work of an evaluation from kept features, up to its metrics."""
    detector.eval()
    with Work() as work, mixed(config):
        maps = detector.judge(kept).maps
        chosen = {config.eval.image_score, config.eval.pixel_score, config.eval.pro_score, config.eval.shown_score}
        for name in sorted(chosen):
            getattr(maps, name)
        image_scores(getattr(maps, config.eval.image_score), config.eval.top_k)
    return work
