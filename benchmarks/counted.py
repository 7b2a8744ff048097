"""Memory of a training step at the paper's size, counted: for batches that no machine at hand has the memory for.

    python -m benchmarks.counted --batches 2 4 8 16

Both ways run on the device "meta", whose tensors have sizes and no content. What is counted is what tensors hold at
once at most, weights, the optimizer's moments, the extractor and the images among them, from the forward pass to the
end of the backward pass, in float32; libraries and the allocator take some tenths of a GiB more.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.forms import PRESETS, Bench, Form, ends, ladder
from models.work import Work


def peak_gib(size: str, batch: int, form: Form) -> float:
    """Of one training step."""
    bench = Bench(size, batch, torch.device("meta"))
    bench.use(replace(form, fused=False, quick=False))  # "meta" has no fused optimizer, and need not be quick
    moments = [v for state in bench.optimizer.state.values() for v in state.values()]
    weights = [v for m in (bench.model, bench.extractor) for v in (*m.parameters(), *m.buffers())]
    with Work([*weights, *moments, bench.images, *bench.features]) as work:
        bench.loss().backward()
    return work.peak / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(PRESETS), default="paper")
    parser.add_argument("--batches", type=int, nargs="+", default=[2, 4, 8, 16])
    args = parser.parse_args()
    forms = [form for form in ends(ladder(torch.device("cpu"))) if not form.bf16 or form.recompute]
    forms = [replace(form, bf16=False) for form in forms]  # there is no autocast on "meta"
    print("| batch | " + " | ".join(f"{form.name}: GiB" for form in forms) + " | ratio of ours |")
    print("|---|" + "---|" * (len(forms) + 1))
    for batch in args.batches:
        found = [peak_gib(args.size, batch, form) for form in forms]
        cells = " | ".join(f"{gib:.2f}" for gib in found)
        print(f"| {batch} | {cells} | {found[1] / found[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
