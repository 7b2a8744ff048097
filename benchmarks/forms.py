"""The forms that benchmarks/throughput.py compares, and a bench on which each of them computes, cut into parts."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.released import ReleasedForward, thresholded_aupro
from default import make_config
from models.extractor import FrozenExtractor
from models.flow import activate, couple
from models.loss import loss_terms
from models.scorer import ScoreMaps, image_scores
from models.vqflow import VQFlow, pool_features
from utils.metrics import ClassAccumulator
from utils.run.device import autocast, has_bfloat16

PRESETS = {"small": "cpu", "paper": "paper-mvtec"}
PARTS = ("extractor", "condition", "flows", "fusion", "optimizer", "metrics")


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to compute; every field is a step of the ladder."""

    name: str
    released: bool = False
    frozen: bool = True
    structured: bool = True
    cached: bool = False
    quick: bool = False
    channels_last: bool = False
    fused: bool = False
    bf16: bool = False
    compiled: bool = False
    recompute: bool = False


def ladder(device: torch.device) -> list[Form]:
    """The released way, then each step added in turn."""
    forms = [
        Form(name="released way", released=True, frozen=False, structured=False),
        Form(name="extractor without gradients", released=True, structured=False),
        Form(name="our direct form", structured=False),
        Form(name="structured condition"),
        Form(name="cached features", cached=True),
        Form(name="channels-last", cached=True, channels_last=True),
        Form(name="quick extractor", cached=True, channels_last=True, quick=True),
        Form(name="fused optimiser", cached=True, channels_last=True, quick=True, fused=True),
    ]
    if has_bfloat16(device):
        forms.append(replace(forms[-1], name="bf16 autocast", bf16=True))
    best = forms[-1]
    return [
        *forms,
        replace(best, name="compiled flows", compiled=True),
        replace(best, name="activations computed again", recompute=True),
    ]


def ends(forms: list[Form]) -> list[Form]:
    """The released way, our best forms in single precision and in bfloat16, and the last of them with less memory."""
    plain, *low, less = (form for form in forms if form.fused and not form.compiled)
    return [forms[0], replace(plain, name="ours"), *[replace(f, name="ours in bfloat16") for f in low], less]


def for_inference(forms: list[Form]) -> list[Form]:
    """From images, without what only training knows; the last one once more from cached features."""
    different: dict[Form, Form] = {}
    for form in forms:
        plain = replace(form, cached=False, fused=False, recompute=False)
        different.setdefault(replace(plain, name=""), plain)
    *others, last = different.values()
    return [*others, last, replace(last, name="cached features", cached=True)]


class Clock:
    """Sums what `now` counts (seconds or FLOPs) by part, from mark to mark."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.last = now, now()
        self.parts = dict.fromkeys(PARTS, 0.0)

    def mark(self, part: str) -> None:
        now = self.now()
        self.parts[part] += now - self.last
        self.last = now


class Bench:
    """One model, extractor and batch of images for all forms, and how each form computes with them."""

    def __init__(self, size: str, batch: int, device: torch.device, *, cpu_time: bool = False, **changes: Any) -> None:
        self.cpu_time = cpu_time
        changes |= {"pretrained": False, "weights": None}
        changes |= {"memory": 0, "context": 0, "semantics": "learned"}  # the released way has none of these
        config = make_config(PRESETS[size], **changes)
        self.config, self.device, self.side = config, device, config.data.input_size
        torch.manual_seed(config.run.seed)
        self.extractor = FrozenExtractor(config.model.extractor, input_size=self.side, pretrained=False).to(device)
        self.model = VQFlow(config.model, self.extractor.channels, self.extractor.strides).to(device)
        self.released = ReleasedForward(self.model)
        self.images = torch.rand(batch, 3, self.side, self.side, device=device)
        self.masks = torch.zeros(batch, self.side, self.side, dtype=torch.bool)
        self.masks[::2, self.side // 4 : self.side // 3, self.side // 4 : self.side // 2] = True
        self.form = Form(name="")
        with torch.no_grad():
            self.features = self.extract()
        self.clock = Clock(time.perf_counter)
        for hierarchy in (self.model.hierarchy, self.released.hierarchy):
            hierarchy.register_forward_hook(self._after_hierarchy)
        self.model.fusion.register_forward_pre_hook(self._before_fusion)
        self.model.fusion.register_forward_hook(lambda *_: self.clock.mark("fusion"))

    def use(self, form: Form, *, training: bool = True) -> None:
        """Bring the model into a form, with a fresh optimiser for training."""
        self.form, model = form, self.model
        layout = torch.channels_last if form.channels_last else torch.contiguous_format
        for module in (model, self.extractor):
            module.to(memory_format=layout)  # type: ignore[call-overload]
        self.images = self.images.contiguous(memory_format=layout)
        self.features = [f.contiguous(memory_format=layout) for f in self.features]
        self.extractor.requires_grad_(not form.frozen)
        model.hierarchy.direct, model.recompute = not form.structured, form.recompute
        for flow in model.level_flows:
            for block in flow.blocks:
                block.couple, block.subnet.activate = couple, activate
        if form.compiled:
            model.compile_flows()
        if training:
            self.prepare(form)

    def prepare(self, form: Form) -> None:
        """A fresh optimiser that has its state already."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        kind = torch.optim.Adam if form.released else torch.optim.AdamW
        self.optimizer = kind(trained, lr=0.0, fused=form.fused)
        for p in trained:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # allocates its state
        self.optimizer.zero_grad(set_to_none=True)

    def extract(self) -> list[Tensor]:
        """Pooled features of the images, gradients as they are on."""
        plain = self.extractor._levels
        maps = (self.quick_extractor[self.form.bf16] if self.form.quick else plain)(self.images)
        return pool_features(maps, self.extractor.strides, self.config.model.pool_type)

    @cached_property
    def quick_extractor(self) -> dict[bool, FrozenExtractor]:
        """The extractor in its quicker form, in single precision and in bfloat16."""
        made = {}
        for bf16 in (False, True):
            made[bf16] = copy.deepcopy(self.extractor).quicken(self.side, low=torch.bfloat16 if bf16 else None)
            made[bf16].requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return made

    def _features(self) -> list[Tensor]:
        if self.form.cached:
            return self.features
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.form.frozen):
            features = [f.float() for f in self.extract()]
        if features[0].requires_grad:
            features[0].register_hook(lambda _: self.clock.mark("condition"))
        self.clock.mark("extractor")
        return features

    def loss(self) -> Tensor:
        """Of one batch, in training."""
        self.model.train()
        self.released.hierarchy.train()
        with autocast(self.device, self.form.bf16):
            features = self._features()
            if self.form.released:
                return self.released(features)[0]
            return loss_terms(self.model.forward(features), 1.0).total

    def train_step(self) -> float:
        """One step; the loss."""
        loss = self.loss()
        self.clock.mark("fusion")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.clock.mark("condition" if self.form.frozen else "extractor")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 2.0)
        self.optimizer.step()
        self.clock.mark("optimizer")
        for p in self.extractor.parameters():
            p.grad = None
        return float(loss.detach())

    @torch.no_grad()
    def infer(self) -> float:
        """Images -> maps, image scores and metrics."""
        self.model.eval()
        self.released.hierarchy.eval()
        with autocast(self.device, self.form.bf16):
            features = self._features()
            if self.form.released:
                latents, local = self.released(features)[1], None
            else:
                output = self.model.forward(features)
                latents, local = output.latents, output.local_log_det
        self.clock.mark("fusion")
        maps = ScoreMaps(latents, self.side, local)
        labels, scores = self.masks.flatten(1).any(1).long(), image_scores(maps.mul)
        if self.form.released:
            result = thresholded_aupro(maps.mul.cpu().numpy(), self.masks.numpy())
        else:
            accumulator = ClassAccumulator()
            accumulator.update(labels=labels, scores=scores, masks=self.masks, maps=maps.add, pro_maps=maps.mul)
            result = accumulator.compute().aupro
        self.clock.mark("metrics")
        return result

    def _after_hierarchy(self, _: nn.Module, __: Any, out: Any) -> None:
        self.clock.mark("condition")
        for level, condition in enumerate(out.maps):
            tensor = condition.codes.through if condition.codes else condition.map
            if tensor.requires_grad:
                part = "flows" if level < 3 else "fusion"
                tensor.register_hook(lambda _, part=part: self.clock.mark(part))

    def _before_fusion(self, _: nn.Module, args: Any) -> None:
        self.clock.mark("flows")
        for latent in args[0]:
            if latent.requires_grad:
                latent.register_hook(lambda _: self.clock.mark("fusion"))

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.cpu_time else time.perf_counter()

    def timed(self, work: Callable[[], float]) -> dict[str, float]:
        """Seconds by part."""
        self.clock = Clock(self.now)
        work()
        parts, self.clock = self.clock.parts, Clock(self.now)  # what runs untimed next does not count
        return parts

    def counted(self, work: Callable[[], float]) -> dict[str, float]:
        """FLOPs by part, by PyTorch's counter."""
        with FlopCounterMode(display=False) as counter:
            self.clock = Clock(lambda: float(counter.get_total_flops()))
            work()
        return self.clock.parts
