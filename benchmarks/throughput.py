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
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.forms import PARTS, PRESETS, Bench, Form, ends, for_inference, ladder
from models.loss import loss_terms
from utils.run.device import has_bfloat16, resolve_device


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
            ours = loss_terms(bench.model(bench.features), 1.0).total
            losses.append(float(bench.released(bench.features)[0] if form.released else ours))
    print(f"loss, released way and structured: {losses[0]:.6g} {losses[1]:.6g}")
    assert abs(losses[0] - losses[1]) < 1e-3 * abs(losses[0])


def compare(bench: Bench, kind: str, forms: list[Form], rounds: int, rates: dict[bool, float]) -> list[dict[str, Any]]:
    """Medians of every form over interleaved rounds; prints a table row for each."""
    seconds: dict[str, list[dict[str, float]]] = {form.name: [] for form in forms}
    work = bench.train_step if kind == "training" else bench.infer
    flops, training = {}, kind == "training"
    for number in range(rounds + 1):
        for form in forms:
            if number == 0:  # warms up; compiled code is counted uncompiled
                bench.use(replace(form, compiled=False), training=training)
                if kind == "inference":
                    work()
                flops[form.name] = bench.counted(work)
                if form.compiled:
                    bench.use(form, training=training)
                    work()
            else:
                bench.use(form, training=training)
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
        bench.use(replace(form, cached=False), training=False)
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
    parser.add_argument("--only", choices=("inference", "training"), help="one of the two, which need not fit together")
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
        forms = ends(forms)
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
    kinds = {"inference": for_inference(forms), "training": forms}
    rows = {k: compare(bench, k, kinds[k], args.rounds, rates) for k in kinds if args.only in (None, k)}
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    del bench, rows
    if args.only == "inference":
        return
    memory_table(args, [form for form in forms if not form.compiled])


if __name__ == "__main__":
    main()
