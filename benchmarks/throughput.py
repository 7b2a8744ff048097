"""How fast training steps and inference are, step by step from the released way to ours, measured side by side.

    python benchmarks/throughput.py --size small
    python benchmarks/throughput.py --size paper --batch 4
    python benchmarks/throughput.py --size small --grow

Every form runs once a round, one after the other, so that all see the same machine; a figure is the median over the
rounds, a ratio the median of each round's ratio to the released way of that round. Parts are cut by hooks in the
forward and the backward pass. Peak memory is that of a process of its own (CPU) or of the allocator (CUDA).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.released import ReleasedForward, thresholded_aupro
from default import make_config
from models.extractor import FrozenExtractor
from models.flow import activate, couple
from models.loss import loss_terms
from models.vqflow import VQFlow, pool_features
from utils.device import autocast, has_bfloat16, resolve_device
from utils.metrics import ClassAccumulator
from utils.scoring import image_scores, score_maps

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
        Form(name="fused optimiser", cached=True, channels_last=True, fused=True),
    ]
    if has_bfloat16(device):
        forms.append(replace(forms[-1], name="bf16 autocast", bf16=True))
    best = forms[-1]
    return [
        *forms,
        replace(best, name="compiled flows", compiled=True),
        replace(best, name="activations computed again", recompute=True),
    ]


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
        changes |= {"pretrained": False, "weights": None, "memory": 0}  # the released way has no memory
        config = make_config(PRESETS[size], **changes)
        self.config, self.device, self.side = config, device, config.data.input_size
        torch.manual_seed(config.run.seed)
        self.extractor = FrozenExtractor(config.model.extractor, input_size=self.side, pretrained=False).to(device)
        self.model = VQFlow(config.model, self.extractor.channels, self.extractor.strides).to(device)
        self.released = ReleasedForward(self.model)
        self.images = torch.randn(batch, 3, self.side, self.side, device=device)
        self.masks = torch.zeros(batch, self.side, self.side, dtype=torch.bool)
        self.masks[::2, self.side // 4 : self.side // 3, self.side // 4 : self.side // 2] = True
        with torch.no_grad():
            self.features = self.extract()
        self.clock = Clock(time.perf_counter)
        self.form = Form(name="")
        for hierarchy in (self.model.hierarchy, self.released.hierarchy):
            hierarchy.register_forward_hook(self._after_hierarchy)
        self.model.fusion.register_forward_pre_hook(self._before_fusion)
        self.model.fusion.register_forward_hook(lambda *_: self.clock.mark("fusion"))

    def use(self, form: Form) -> None:
        """Bring the model into a form, with a fresh optimiser."""
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
        trained = [p for p in model.parameters() if p.requires_grad]
        kind = torch.optim.Adam if form.released else torch.optim.AdamW
        self.optimizer = kind(trained, lr=0.0, fused=form.fused)
        for p in trained:
            p.grad = torch.zeros_like(p)
        self.optimizer.step()  # allocates its state
        self.optimizer.zero_grad(set_to_none=True)

    def extract(self) -> list[Tensor]:
        """Pooled features of the images, gradients as they are on."""
        maps = self.extractor.net(self.images)
        if self.extractor._channels_last:
            maps = [m.permute(0, 3, 1, 2) for m in maps]
        return pool_features(maps, self.extractor.strides, self.config.model.pool_type)

    def _features(self) -> list[Tensor]:
        if self.form.cached:
            return self.features
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.form.frozen):
            features = [f.float() for f in self.extract()]
        if features[0].requires_grad:
            features[0].register_hook(lambda _: self.clock.mark("condition"))
        self.clock.mark("extractor")
        return features

    def train_step(self) -> float:
        """One step; the loss."""
        self.model.train()
        self.released.hierarchy.train()
        with autocast(self.device, self.form.bf16):
            features = self._features()
            if self.form.released:
                loss = self.released(features)[0]
            else:
                loss = loss_terms(self.model.forward_pooled(features), 1.0).total
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
                output = self.model.forward_pooled(features)
                latents, local = output.latents, output.local_log_det
        self.clock.mark("fusion")
        maps = score_maps(latents, self.side, local)
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


def matrix_rate(device: torch.device, dtype: torch.dtype, cpu_time: bool) -> float:
    """FLOP/s of a large matrix product, the median of nine."""
    now = time.process_time if cpu_time else time.perf_counter
    side = 8192 if device.type == "cuda" else 2048
    a = torch.randn(side, side, device=device, dtype=dtype)
    seconds = []
    for _ in range(9):
        begin = now()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(now() - begin)
    return 2 * side**3 / median(seconds)


def check_agreement(bench: Bench) -> None:
    """The reconstruction and ours give the same loss."""
    losses = []
    for form in (Form(name="", released=True, cached=True, structured=False), Form(name="", cached=True)):
        bench.form, bench.model.hierarchy.direct = form, not form.structured
        bench.model.eval()
        bench.released.hierarchy.eval()
        with torch.no_grad():
            ours = loss_terms(bench.model.forward_pooled(bench.features), 1.0).total
            losses.append(float(bench.released(bench.features)[0] if form.released else ours))
    print(f"loss, released way and structured: {losses[0]:.6g} {losses[1]:.6g}")
    assert abs(losses[0] - losses[1]) < 1e-3 * abs(losses[0])


def compare(bench: Bench, kind: str, forms: list[Form], rounds: int, rates: dict[bool, float]) -> list[dict[str, Any]]:
    """Medians of every form over interleaved rounds; prints a table row for each."""
    seconds: dict[str, list[dict[str, float]]] = {form.name: [] for form in forms}
    work = bench.train_step if kind == "training" else bench.infer
    flops = {}
    for number in range(rounds + 1):
        for form in forms:
            if number == 0:  # warms up; compiled code is counted uncompiled
                bench.use(replace(form, compiled=False))
                if kind == "inference":
                    work()
                flops[form.name] = bench.counted(work)
                if form.compiled:
                    bench.use(form)
                    work()
            else:
                bench.use(form)
                if kind == "inference":
                    work()  # makes the tables that a model keeps from batch to batch
                seconds[form.name].append(bench.timed(work))
    rows = []
    print(f"\n{kind}, batch {len(bench.images)}: medians of {rounds} interleaved rounds")
    print("| form | images/s | ratio | GFLOP/image | share of matrix rate | " + " s | ".join(PARTS) + " s |")
    print("|---|" + "---|" * (4 + len(PARTS)))
    for form in forms:
        runs, first = seconds[form.name], seconds[forms[0].name]
        total = median(sum(r.values()) for r in runs)
        ratio = median(sum(a.values()) / sum(b.values()) for a, b in zip(first, runs, strict=True))
        parts = {part: median(r[part] for r in runs) for part in PARTS}
        work_done = sum(flops[form.name].values())
        row = {
            "form": form.name, "images/s": len(bench.images) / total, "ratio": ratio,
            "GFLOP/image": work_done / len(bench.images) / 1e9, "share": work_done / total / rates[form.bf16],
            "flows share": flops[form.name]["flows"] / max(parts["flows"], 1e-9) / rates[form.bf16], "parts": parts,
        }  # fmt: skip
        rows.append(row)
        print(
            f"| {form.name} | {row['images/s']:.3g} | {ratio:.2f} | {row['GFLOP/image']:.4g} | {row['share']:.2f} | "
            + " | ".join(f"{parts[part]:.3g}" for part in PARTS) + " |", flush=True,
        )  # fmt: skip
    return rows


def peak_memory(bench: Bench, form: Form) -> float:
    """GiB at the peak of one training step in this process (which did nothing else before), or on the device."""
    bench.use(form)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        bench.train_step()
        return torch.cuda.max_memory_allocated() / 2**30
    bench.train_step()
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(row for row in status.read_text(encoding="utf-8").splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return float("nan")


def memory_table(args: argparse.Namespace, forms: list[Form]) -> None:
    """Peak memory of some forms, each in a fresh process."""
    print(f"\npeak memory of a training step, batch {args.memory_batch or args.batch}")
    for number, form in enumerate(forms):
        command = [
            sys.executable, __file__, "--size", args.size, "--batch", str(args.memory_batch or args.batch),
            "--device", args.device, "--one", str(number),
        ] + ["--ends"] * args.ends  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        shown = f"{float(done.stdout.split()[-1]):.2f} GiB" if done.returncode == 0 else f"failed ({done.returncode})"
        print(f"| {form.name} | {shown} |", flush=True)


def grow(args: argparse.Namespace, device: torch.device) -> None:
    """How a training step and inference of our best form grow, one setting changed at a time."""
    form = [f for f in ladder(device) if not f.compiled and not f.recompute][-1]
    changes: dict[str, list[tuple[int, dict[str, Any]]]] = {
        "image size": [(side, {"input_size": side}) for side in (256, 384, 512)],
        "codes": [(codes, {"k_cspc": codes}) for codes in (128, 512, 1024, 4096)],
        "concepts (one or more a class)": [(k, {"k_cpc": k}) for k in (16, 64, 256)],
    }
    print("| what | value | training s | GFLOP | inference s |\n|---|---|---|---|---|")
    settings = [(name, v, args.batch, c) for name, values in changes.items() for v, c in values]
    for name, value, batch, change in [*settings, *[("batch", b, b, {}) for b in (2, 4, 8, 16)]]:
        bench = Bench(args.size, batch, device, cpu_time=args.cpu_time, **change)
        bench.use(form)
        flops = sum(bench.counted(bench.train_step).values()) / 1e9
        trained = median(sum(bench.timed(bench.train_step).values()) for _ in range(args.rounds))
        bench.use(replace(form, cached=False))
        bench.infer()
        inferred = median(sum(bench.timed(bench.infer).values()) for _ in range(args.rounds))
        print(f"| {name} | {value} | {trained:.3g} | {flops:.4g} | {inferred:.3g} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(PRESETS), default="small")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--memory-batch", type=int, help="batch of the memory table (default: --batch)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread and its processor time: for machines that others use too"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--grow", action="store_true", help="how the cost grows instead of the comparison")
    parser.add_argument("--no-compile", action="store_true", help="without the compiled form")
    parser.add_argument("--ends", action="store_true", help="only the released way and our best: for large batches")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # peak memory of one form, in this process
    args = parser.parse_args()
    np.random.seed(0)
    if args.cpu_time:
        torch.set_num_threads(1)
    device = resolve_device(args.device)
    forms = [form for form in ladder(device) if not (args.no_compile and form.compiled)]
    if args.ends:
        forms = [forms[0], *(form for form in forms if form.fused and not form.compiled)]
    if args.grow:
        grow(args, device)
        return
    bench = Bench(args.size, args.batch, device, cpu_time=args.cpu_time)
    if args.one is not None:
        print(peak_memory(bench, [form for form in forms if not form.compiled][args.one]))
        return
    rates = {False: matrix_rate(device, torch.float32, args.cpu_time)}
    rates[True] = matrix_rate(device, torch.bfloat16, args.cpu_time) if has_bfloat16(device) else float("nan")
    print(
        f"size {args.size}, {device}, {torch.get_num_threads()} threads, matrix rate {rates[False] / 1e9:.4g} GFLOP/s"
    )
    check_agreement(bench)
    trained_alike = ("cached features", "fused optimiser", "activations computed again")  # no steps of inference
    inference = [replace(form, cached=False) for form in forms if form.name not in trained_alike]
    if args.ends:
        inference.append(replace(forms[1], name="ours", cached=False))
    inference.append(replace(inference[-1], name="cached features", cached=True))
    rows = {
        "inference": compare(bench, "inference", inference, args.rounds, rates),
        "training": compare(bench, "training", forms, args.rounds, rates),
    }
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    del bench, rows
    memory_table(args, [form for form in forms if not form.compiled])


if __name__ == "__main__":
    main()
