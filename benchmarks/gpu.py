"""All that a GPU is to show, in one command of a few minutes: right results, speed, memory, waits, largest kernels.

    python benchmarks/gpu.py            (make benchmark-gpu) writes benchmarks/results/GPU.json and BENCHMARKS.md
    python benchmarks/gpu.py --small    a smoke test of a few seconds, also on a CPU; only prints, or writes --out

The sizes are the paper's, features are of random images and an extractor with random weights: neither matters to
time. Sections that would begin after `LIMIT` seconds are left out, and named. One that fails says so in its table, and
the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.forms import Bench, ladder
from benchmarks.throughput import compare, matrix_rate, peak_memory
from datasets.features import FeatureBatch
from models.loss import loss_terms
from models.memory import nearest
from steps import take_step
from utils.run.device import exact_products, has_bfloat16, resolve_device

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 360.0  # seconds; the longest section takes less than two minutes more
RESULTS, TABLES = ROOT / "benchmarks" / "results" / "GPU.json", ROOT / "BENCHMARKS.md"
BEGIN, END = "<!-- benchmarks/gpu.py writes from here -->", "<!-- to here -->"
VITS = {False: "vit_small_patch14_dinov2", True: "test_vit"}
TINY = {
    "input_size": 64, "extractor": "test_efficientnet", "parallel_blocks": (1, 1, 1), "dim_cpc": 8, "k_cpc": 4,
    "k_cspc": 16, "c_pos_conds": (8,),
}  # fmt: skip

FAILED = "failed"

Rows = list[dict[str, Any]]


class Session:
    """What all sections share: the device, its rates, and sizes.

    Args:
        small: tiny models on tiny images, two at a time, instead of the paper's size.
    """

    def __init__(self, device: torch.device, *, small: bool) -> None:
        self.device, self.small = device, small
        self.size, self.batch, self.rounds = ("small", 2, 1) if small else ("paper", 16, 5)
        bf16 = has_bfloat16(device)
        self.rates = {False: matrix_rate(device, torch.float32, False)}
        self.rates[True] = matrix_rate(device, torch.bfloat16, False) if bf16 else math.nan
        *_, best = (form for form in ladder(device) if not (form.compiled or form.recompute))
        plain = replace(best, name="ours in float32", bf16=False)
        self.forms = [ladder(device)[0], plain] + [replace(best, name="ours in bfloat16")] * bf16

    def bench(self, batch: int | None = None, **changes: Any) -> Bench:
        """Model, extractor and images, new ones."""
        changes = (TINY if self.small else {}) | changes
        return Bench(self.size, batch or self.batch, self.device, **changes)


def machine(session: Session) -> Rows:
    """What it was measured on."""
    cuda = session.device.type == "cuda"
    return [{
        "device": torch.cuda.get_device_name() if cuda else "CPU", "torch": torch.__version__,
        "float32 TFLOP/s": session.rates[False] / 1e12, "bfloat16 TFLOP/s": session.rates[True] / 1e12,
        "memory GiB": torch.cuda.get_device_properties(0).total_memory / 2**30 if cuda else math.nan,
    }]  # fmt: skip


def correctness(session: Session) -> Rows:
    """Loss, log-determinant and gradients of one step beside the CPU's, as shares of their size."""
    bench, found = session.bench(2), []
    for device in (torch.device("cpu"), session.device):
        model = bench.model.to(device).train()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        model.zero_grad(set_to_none=True)
        with exact_products(device), torch.backends.cudnn.flags(allow_tf32=False):
            output = model([f.detach().to(device) for f in bench.features])
            loss = loss_terms(output, 1.0).total
            loss.backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
        found.append({"loss": loss.detach().cpu(), "log-determinant": output.log_det.detach().cpu(), "gradient": grads})
        model.load_state_dict(state)
    here, there = found
    rows = [{"what": k, "difference": float((there[k] - v).norm() / v.norm())} for k, v in here.items()]
    return rows + searches(session.device)


def searches(device: torch.device) -> Rows:
    """The memory's distances, of the same places to the same vectors, beside the CPU's in single precision."""
    places, vectors = torch.randn(2, 500, 64) + 3, (torch.randn(2, 2000, 64) + 3).half()
    expected, rows = nearest(places, vectors), []
    for name, dtype in {"the memory's distances": torch.float32, "the same in bfloat16": torch.bfloat16}.items():
        with exact_products(device):
            found = nearest(places.to(device, dtype), vectors.to(device)).cpu()
        rows.append({"what": name, "difference": float((found - expected).norm() / expected.norm())})
    return rows


def training(session: Session) -> Rows:
    """Training steps with cached features, beside the released way; peak memory of each."""
    return compared(session.bench(), session, "training")


def inference(session: Session) -> Rows:
    """Images to maps, scores and metrics, with the extractor, beside the released way."""
    return compared(session.bench(), session, "inference")


def transformer(session: Session) -> Rows:
    """The same with a ViT, whose levels are all of one size."""
    bench = session.bench(min(session.batch, 8), extractor=VITS[session.small])
    return [{"work": kind} | row for kind in ("training", "inference") for row in compared(bench, session, kind)]


def compared(bench: Bench, session: Session, kind: str) -> Rows:
    """The forms side by side; with peak memory where the device tells it."""
    forms, rows = [replace(form, cached=kind == "training") for form in session.forms], []
    for form, row in zip(forms, compare(bench, kind, forms, session.rounds, session.rates), strict=True):
        rows.append({k: v for k, v in row.items() if k != "parts"} | {f"{k} s": v for k, v in row["parts"].items()})
        if kind == "training" and session.device.type == "cuda":
            rows[-1]["peak GiB"] = peak_memory(bench, form)
    return rows


def batches(session: Session) -> Rows:
    """Images/s of inference from images, by batch."""
    rows, form = [], replace(session.forms[-1], cached=False)
    for batch in (1, 2) if session.small else (1, 8, 32):
        bench = session.bench(batch)
        bench.use(form)
        bench.infer()
        seconds = median(sum(bench.timed(bench.infer).values()) for _ in range(session.rounds))
        rows.append({"batch": batch, "form": form.name, "images/s": batch / seconds})
    return rows


def step_of(session: Session) -> Callable[[], Any]:
    """A step as a training run takes it, warm; the host does not wait for it on CUDA."""
    bench, cuda = session.bench(), session.device.type == "cuda"
    bench.use(session.forms[-1])
    mask = bench.masks.to(session.device)
    label = mask.flatten(1).any(1).long()
    batch = FeatureBatch(
        features=bench.features, mask=mask, label=label, class_index=label, path=("",) * len(label)
    )  # fmt: skip
    config = replace(bench.config.train, amp_enable=bench.form.bf16)

    def step() -> Any:
        return take_step(bench.model, [batch], bench.optimizer, config, wait=not cuda)

    for _ in range(2):
        step()
    return step


def waits(session: Session) -> Rows:
    """How often a training step makes the host wait for the device: never is the goal."""
    if session.device.type != "cuda":
        return [{"waits of a training step": math.nan}]
    step = step_of(session)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [{"waits of a training step": sum("synchronizing" in str(w.message) for w in found)}]


def kernels(session: Session) -> Rows:
    """The five kernels (operators on a CPU) that take the most time of a training step."""
    step, cuda = step_of(session), session.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as traced:
        step()
        if cuda:
            torch.cuda.synchronize()
    events = [e for e in traced.key_averages() if not cuda or e.device_type == DeviceType.CUDA]
    times = {e.key: (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3 for e in events}
    total = sum(times.values())
    largest = sorted(times, key=times.__getitem__, reverse=True)[:5]
    return [{"kernel": name[:80], "ms": times[name], "share": times[name] / total} for name in largest]


def compilation(session: Session) -> Rows:
    """Training steps with compiled flows beside our others; the time to compile does not count."""
    if session.small:
        return []
    bench, last = session.bench(), session.forms[-1]
    forms = [last, replace(last, name="compiled flows", compiled=True)]
    rows = compare(bench, "training", forms, session.rounds, session.rates)
    return [{"form": row["form"], "images/s": row["images/s"], "ratio": row["ratio"]} for row in rows]


SECTIONS: dict[str, Callable[[Session], Rows]] = {
    "Machine": machine, "Difference from the CPU": correctness, "Waits": waits, "Training": training,
    "Inference": inference, "Inference by batch": batches, "Largest kernels": kernels, "ViT": transformer,
    "Compiled": compilation,
}  # fmt: skip


def measured(session: Session) -> tuple[dict[str, Rows], list[str]]:
    """The rows of each section, and the names of those that there was no time for."""
    began, found, left_out = time.perf_counter(), {}, []
    for name, section in SECTIONS.items():
        if time.perf_counter() - began > LIMIT:
            left_out.append(name)
            continue
        print(f"{time.perf_counter() - began:.0f} s: {name}", flush=True)
        try:
            found[name] = section(session)
        except RuntimeError as error:  # of PyTorch: no memory, or no such kernel; the other sections still count
            found[name] = [{FAILED: str(error).splitlines()[0]}]
    return found, left_out


def shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.3g}"
    return str(value).replace("|", "/")


def table(rows: Rows) -> str:
    """As Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *[[shown(row[name]) for name in names] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(found: Mapping[str, Rows], left_out: Sequence[str]) -> str:
    """All sections as Markdown."""
    parts = [f"### {name}\n\n{table(rows)}" for name, rows in found.items() if rows]
    return "\n\n".join(parts + [f"Left out for want of time: {', '.join(left_out)}."] * bool(left_out))


def write_tables(path: Path, text: str) -> None:
    """Put the tables between the two marks in a Markdown file."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny sizes and one round: a smoke test")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help=f"file for the figures (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--tables", type=Path, help="Markdown file with the marks (default: BENCHMARKS.md)")
    args = parser.parse_args()
    torch.manual_seed(0)
    np.random.seed(0)
    device = resolve_device(args.device)
    if device.type == "cpu" and not args.small:
        parser.error("--device: there is no GPU here; --small tries the program out on a CPU")
    found, left_out = measured(Session(device, small=args.small))
    text = tables(found, left_out)
    print(text)
    out, into = (args.out, args.tables) if args.small else (args.out or RESULTS, args.tables or TABLES)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"sections": found, "left_out": left_out}, indent=1)
        out.write_text(content.replace("NaN", "null") + "\n", encoding="utf-8")
    if into:
        write_tables(into, text)
    sys.exit(int(any(FAILED in row for rows in found.values() for row in rows)))


if __name__ == "__main__":
    main()
