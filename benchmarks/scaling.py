"""Training steps in one, two and three processes of this machine, beside what `--mode plan` says of them.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --processes 1 2 --steps 10 --batch 24

Each process computes with one thread on features of noise; torchrun and Gloo connect them. What the plan assumes is
measured in the same processes, all at once: products of matrices, copies, sums over all processes. What a single
process reaches of these is assumed of all, so its images/s are no prediction; all other figures are. Seconds are the
least of some, as other programs only add to them; bytes carried are the loopback device's, of which the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.features import FeatureBatch
from default import Config, make_config
from models.extractor import FrozenExtractor
from models.vqflow import VQFlow, pool_features
from models.work import state_bytes
from plan import Plan, plan_of, sent
from steps import shared_by_all, take_step
from utils.run.distributed import highest, is_first, processes, together, wait

SUM = 1 << 23  # numbers in the sum over all processes that tells their rate


def settings(words: argparse.Namespace) -> Config:
    """What is trained; it stands in for a run, so it needs no images."""
    own: dict[str, Any] = (
        {"extractor": "test_efficientnet", "dim_cpc": 16, "k_cspc": 16, "input_size": 64} if words.small else {}
    )
    return make_config(
        "cpu", batch_size=words.batch, mode="plan", images=words.batch, holdout=0.0, memory=0, context=0, **own
    )


# --- in each process


def status(name: str) -> int:
    """Bytes, as Linux tells of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(name)))


def carried() -> int:
    """Bytes that the loopback device has sent."""
    lines = Path("/proc/net/dev").read_text(encoding="utf-8").splitlines()
    return int(next(line.split(":")[1].split()[8] for line in lines if line.strip().startswith("lo:")))


def least(work: Callable[[], Any], repeats: int = 9) -> float:
    """Least seconds, of all processes at once: other programs only add to them."""
    work()
    found = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return min(found)


def rates() -> dict[str, float]:
    """What the plan assumes, in its flags' units."""
    side, large = torch.randn(1024, 1024), torch.empty(1 << 25)
    found = {
        "tflops": 2 * 1024**3 / least(lambda: side @ side) / 1e12,
        "bandwidth": 2 * large.nbytes / least(large.clone) / 1e9,
    }
    if processes() == 1:
        return found
    one, many = torch.zeros(1), torch.zeros(SUM)
    latency = least(lambda: dist.all_reduce(one), 50)
    seconds = least(lambda: dist.all_reduce(many)) - latency
    return found | {"interconnect": sent(many.nbytes, processes()) / seconds / 1e9, "latency": 1e6 * latency}


class Sums:
    """Notes the bytes of each sum over all processes: of the gradients, then of all else."""

    def __init__(self) -> None:
        self.gradients, self.others = 0, []  # type: ignore[var-annotated]
        self._reduce, dist.all_reduce = dist.all_reduce, self._noted

    def _noted(self, values: Tensor, *rest: Any, **more: Any) -> Any:
        self.others.append(values.nbytes)
        return self._reduce(values, *rest, **more)

    def hook(self, _, bucket):  # no annotations: PyTorch compares them, and here they are texts
        """Averages a bucket of gradients, as DistributedDataParallel does by itself."""
        values = bucket.buffer().div_(processes())
        self.gradients += values.nbytes
        return self._reduce(values, async_op=True).get_future().then(lambda done: done.value()[0])


def stepped(words: argparse.Namespace) -> dict[str, Any]:
    """Steps of this process: how long one takes, what they hold, sum and carry."""
    config, batch = settings(words), words.batch // processes()
    rows, flow = fed(config, batch)
    before, sums = status("VmRSS") - state_bytes(flow) - 2 * nbytes(rows.features), Sums()
    model = shared_by_all(flow.train())
    if isinstance(model, DistributedDataParallel):
        model.register_comm_hook(None, sums.hook)
    optimizer = torch.optim.AdamW([p for p in flow.parameters() if p.requires_grad], lr=1e-6, fused=True)
    seconds, moved = [], []
    for number in range(words.steps + 2):  # two to warm up
        wait()
        sums.gradients, sums.others = 0, []
        began, was = time.perf_counter(), carried()
        take_step(model, [rows], optimizer, config.train, wait=True)
        highest(0)  # as the trainer asks whether to stop; all are here now
        if number > 1:
            seconds.append(time.perf_counter() - began)
            moved.append(carried() - was)
    return {
        "seconds": min(seconds), "carried": median(moved), "memory": status("VmHWM") - before,
        "sums": [sums.gradients, *sums.others],
    }  # fmt: skip


def fed(config: Config, batch: int) -> tuple[FeatureBatch, VQFlow]:
    """A batch of noise, and a new flow."""
    side = config.data.input_size
    with torch.device("meta"):
        extractor = FrozenExtractor(config.model.extractor, input_size=side, pretrained=False)
        levels = pool_features(extractor(torch.empty(1, 3, side, side)), extractor.strides, config.model.kept_pool)
    torch.manual_seed(config.run.seed)
    flow = VQFlow(config.model, extractor.channels, extractor.strides).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    features = [torch.randn(batch, *h.shape[1:]).contiguous(memory_format=torch.channels_last) for h in levels]
    zeros = torch.zeros(batch, dtype=torch.long)
    return FeatureBatch(features=features, mask=zeros, label=zeros, class_index=zeros, path=("",) * batch), flow


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Of all of them."""
    return sum(x.nbytes for x in tensors)


# --- beside the plan


def under_torchrun(words: argparse.Namespace, count: int) -> dict[str, Any]:
    """What the first of so many processes measured."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
    options = ["--one", "--steps", str(words.steps), "--batch", str(words.batch), *["--small"] * words.small]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def planned(words: argparse.Namespace, count: int, found: dict[str, Any], reached: float) -> Plan:
    """What the plan says at the rates that were measured, of which so much is reached."""
    config, known = settings(words), {name: found[name] for name in ("interconnect", "latency") if name in found}
    rates = {"tflops": (reached * found["tflops"],), "bandwidth": reached * found["bandwidth"], "efficiency": 1.0}
    return plan_of(replace(config, plan=replace(config.plan, gpus=count, storage=1e6, **rates, **known)))


def compare(words: argparse.Namespace, results: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each number of processes."""
    first = min(results)
    alone = planned(words, first, results[first], 1.0).step
    reached = (alone["seconds"] - alone["seconds_of_sums"]) / results[first]["seconds"]
    print(f"a single process reaches {reached:.2f} of the rates measured beside it")
    rows = []
    for count, found in results.items():
        plan = planned(words, count, found, reached)
        held = sum(plan.memory[part] for part in ("weights", "optimiser", "gradients", "activations", "batches"))
        summed = plan.sums["gradients"] + plan.sums["codebooks_and_norms"] if count > 1 else 0
        rows.append({
            "processes": count, "images/s": words.batch / found["seconds"],
            "planned": plan.step["images_per_second"], "MB held by each": found["memory"] / 1e6,
            "planned ": held / 1e6, "bytes summed a step": sum(found["sums"]), "planned  ": int(summed),
            "MB carried a step": found["carried"] / 1e6 if count > 1 else 0.0,
            "planned   ": count * plan.sums["sent_by_each"] / 1e6,
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=12, help="images of a step in all processes")
    parser.add_argument("--small", action="store_true", help="a tiny model: to try the program out")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # what torchrun starts
    words = parser.parse_args()
    if words.one:
        with together():
            torch.set_num_threads(1)
            found = stepped(words) | rates()
            if is_first():
                print(json.dumps(found))
        return
    rows = compare(words, {count: under_torchrun(words, count) for count in words.processes})
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


if __name__ == "__main__":
    main()
