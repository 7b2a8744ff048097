"""Memory of a training step at the paper's size, counted: for batches that no machine at hand has the memory for.

    python -m benchmarks.counted --batches 2 4 8 16

Both ways run on the device "meta", whose tensors have sizes and no content. What is counted is what tensors hold at
once at most, weights, the optimizer's moments, the extractor and the images among them, from the forward pass to the
end of the backward pass, in float32; libraries and the allocator take some tenths of a GiB more.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.forms import PRESETS, Bench, Form, ends, ladder


class Held(TorchDispatchMode):
    """Bytes that tensors hold `now` and at the `peak`, `known` ones and those that come to be."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.there: set[int] = set()
        for tensor in known:
            self.note(tensor)

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's memory until it goes, once for all that share it."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.there:
            self.there.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.there.remove(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor):
                self.note(value)
        return out


def peak_gib(size: str, batch: int, form: Form) -> float:
    """Of one training step."""
    bench = Bench(size, batch, torch.device("meta"))
    bench.use(replace(form, fused=False, quick=False))  # "meta" has no fused optimizer, and need not be quick
    moments = [v for state in bench.optimizer.state.values() for v in state.values()]
    weights = [v for m in (bench.model, bench.extractor) for v in (*m.parameters(), *m.buffers())]
    held = Held([*weights, *moments, bench.images, *bench.features])
    with held:
        bench.loss().backward()
    return held.peak / 2**30


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
