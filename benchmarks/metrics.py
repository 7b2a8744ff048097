"""Our seven metrics against three other ways: seconds, ratio, deviation, and peak memory as the images grow in number.

    python benchmarks/metrics.py --repeats 5

Outcome in BENCHMARKS.md. Needs Linux or macOS for the memory part. The maps are smooth noise with raised defects, 60 %
of the images have one to three of them. (a) and (c) compute AUPRO alone, (b) image and pixel AUROC and AP alone; ours
are all seven. Every way runs in one thread; seconds are its processor time, which other programs do not disturb.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from skimage.measure import label, regionprops
from sklearn.metrics import average_precision_score, roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.metrics import METRICS, ClassAccumulator, ClassResult, evaluate_maps

BATCH, LIMIT = 10, 0.3
Case = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # labels (N,), scores (N,), masks and maps (N, S, S)


def make_batch(number: int, size: int, seed: int) -> Case:
    """Ten images: float32 maps, bool masks."""
    rng = np.random.default_rng([seed, number])
    masks, maps = np.zeros((BATCH, size, size), bool), np.empty((BATCH, size, size), np.float32)
    for i in range(BATCH):
        if i % 5 < 3:
            drawn = np.zeros((size, size), np.uint8)
            for _ in range(rng.integers(1, 4)):
                centre, axes = rng.integers(size // 8, size - size // 8, 2), rng.integers(size // 64, size // 10, 2)
                cv2.ellipse(drawn, centre.tolist(), axes.tolist(), float(rng.uniform(0, 180)), 0, 360, 1, -1)
            masks[i] = drawn > 0
        noise = cv2.GaussianBlur(rng.normal(size=(size, size)).astype(np.float32), (0, 0), 4)
        maps[i] = noise / noise.std() + 1.5 * cv2.GaussianBlur(masks[i].astype(np.float32), (0, 0), 3)
    return masks.any((1, 2)).astype(int), maps.max((1, 2)), masks, maps


def batches(count: int, size: int, seed: int) -> Iterator[Case]:
    return (make_batch(number, size, seed) for number in range(count // BATCH))


def ours(case: Case) -> ClassResult:
    return evaluate_maps(*case, fpr_limit=LIMIT)


def ours_streamed(case: Case) -> ClassResult:
    """In batches, as the evaluation loop does it."""
    accumulator = ClassAccumulator(fpr_limit=LIMIT)
    for i in range(0, len(case[0]), BATCH):
        labels, scores, masks, maps = (value[i : i + BATCH] for value in case)
        accumulator.update(labels=labels, scores=scores, masks=masks, maps=maps)
    return accumulator.compute()


def integrated(rates: list[float], overlaps: list[float]) -> float:
    """Area under the points with a false-positive rate up to the limit, stretched to it, as sweeps do it."""
    x, y = np.array(rates), np.array(overlaps)
    inside = x < LIMIT
    x, y = x[inside], y[inside]
    order = np.argsort(x)
    return float(np.trapezoid(y[order], x[order] / x.max()))


def released(case: Case, steps: int = 800) -> float:
    """(a) AUPRO at equally spaced thresholds; the components of every mask are labelled again at each."""
    _, _, masks, maps = case
    normal = (~masks).sum()
    rates, overlaps = [], []
    for threshold in np.linspace(maps.min(), maps.max(), steps, endpoint=False):
        found = maps > threshold
        shares = []
        for one, mask in zip(found, masks, strict=True):
            for region in regionprops(label(mask)):
                shares.append(one[region.coords[:, 0], region.coords[:, 1]].mean())
        rates.append((found & ~masks).sum() / normal)
        overlaps.append(float(np.mean(shares)))
    return integrated(rates, overlaps)


def sweep(case: Case, steps: int = 200) -> float:
    """(c) AUPRO at 200 equally spaced thresholds, regions found once."""
    _, _, masks, maps = case
    regions = [
        m[r.coords[:, 0], r.coords[:, 1]] for k, m in zip(masks, maps, strict=True) for r in regionprops(label(k))
    ]
    normal = maps[~masks]
    thresholds = np.linspace(maps.min(), maps.max(), steps, endpoint=False)
    rates = [float((normal > t).mean()) for t in thresholds]
    return integrated(rates, [float(np.mean([(r > t).mean() for r in regions])) for t in thresholds])


def exact(case: Case) -> dict[str, float]:
    """(b) Full sorts by scikit-learn."""
    labels, scores, masks, maps = case
    pixels, truth = maps.ravel(), masks.ravel()
    return {
        "image_auroc": roc_auc_score(labels, scores), "image_ap": average_precision_score(labels, scores),
        "pixel_auroc": roc_auc_score(truth, pixels), "pixel_ap": average_precision_score(truth, pixels),
    }  # fmt: skip


def exact_aupro(case: Case) -> float:
    """Every threshold, by one full sort in double precision; independent of utils/."""
    _, _, masks, maps = case
    shares, count = np.zeros(masks.shape), 0
    for mask, share in zip(masks, shares, strict=True):
        numbered = label(mask)
        sizes = np.bincount(numbered.ravel())
        share[mask], count = 1 / sizes[numbered[mask]], count + len(sizes) - 1
    order = np.argsort(-maps.ravel(), kind="stable")
    values = maps.ravel()[order]
    last = np.append(values[1:] != values[:-1], True)
    x = np.append(0, np.cumsum(~masks.ravel()[order])[last] / (~masks).sum())
    y = np.append(0, np.cumsum(shares.ravel()[order])[last] / count)
    inside = x <= LIMIT
    xs, ys = np.append(x[inside], LIMIT), np.append(y[inside], np.interp(LIMIT, x, y))
    return float(np.trapezoid(ys, xs) / LIMIT)


def timed(way: Callable[[Case], Any], case: Case, repeats: int) -> tuple[list[float], Any]:
    seconds, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = way(case)
        seconds.append(time.process_time() - start)
    return seconds, result


def stream(count: int, size: int, seed: int) -> None:
    """Child process: feed `count` maps batch by batch, print the peak memory in KiB."""
    import resource

    accumulator = ClassAccumulator(fpr_limit=LIMIT)
    for labels, scores, masks, maps in batches(count, size, seed):
        accumulator.update(labels=labels, scores=scores, masks=masks, maps=maps)
    accumulator.compute()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(peak // 1024 if sys.platform == "darwin" else peak)


def peak_memory(count: int, arguments: argparse.Namespace, *, give_back: bool) -> float:
    """MiB at the peak of a process of its own that evaluates `count` maps.

    With `give_back` glibc's allocator returns freed blocks at once, so that the peak is what is held and not what the
    allocator keeps for later. A child's peak starts from what its parent held, so this comes before the parent makes
    its maps.
    """
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if give_back else {})
    command = [sys.executable, __file__, "--stream", str(count), "--size", str(arguments.size)]
    command += ["--seed", str(arguments.seed)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout) / 1024


def report(arguments: argparse.Namespace) -> None:
    peaks = {give: [peak_memory(n, arguments, give_back=give) for n in (100, 2000)] for give in (True, False)}
    parts = list(batches(arguments.count, arguments.size, arguments.seed))
    case: Case = tuple(np.concatenate([part[i] for part in parts]) for i in range(4))  # type: ignore[assignment]
    del parts
    print(f"{arguments.count} maps of {arguments.size}², one thread, seed {arguments.seed}")
    print(f"median of {arguments.repeats} repeats, (a) of {arguments.slow_repeats}; in brackets the fastest, slowest")
    seconds: dict[str, float] = {}
    results: dict[str, Any] = {}
    for name, way, repeats in (
        ("ours, at once", ours, arguments.repeats), ("ours, batches of 10", ours_streamed, arguments.repeats),
        ("(b) scikit-learn", exact, arguments.repeats), ("(c) 200 steps", sweep, arguments.repeats),
        ("(a) 800 steps", released, arguments.slow_repeats),
    ):  # fmt: skip
        times, results[name] = timed(way, case, repeats)
        seconds[name] = statistics.median(times)
        ratio = seconds[name] / seconds["ours, at once"]
        print(f"{name:20} {seconds[name]:8.3f} s [{min(times):.3f}, {max(times):.3f}]  {ratio:7.1f}x", flush=True)
    aupro = exact_aupro(case)
    reference = results["(b) scikit-learn"] | {"aupro": aupro}
    for name in ("ours, at once", "ours, batches of 10"):
        worst = max(abs(getattr(results[name], m) - reference[m]) for m in METRICS if m in reference)
        print(f"{name}: largest deviation of AUROC, AP and AUPRO from the exact sort {worst:.1e}")
    print(f"AUPRO exact {aupro:.5f}, (a) {results['(a) 800 steps']:.5f}, (c) {results['(c) 200 steps']:.5f}")
    for give, (few, many) in peaks.items():
        how = "freed blocks given back" if give else "allocator as it is"
        print(f"peak memory, {how}: 100 maps {few:.0f} MiB, 2000 maps {many:.0f} MiB, ratio {many / few:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for flag, default, text in (
        ("--count", 100, "maps, a multiple of 10"), ("--size", 384, "their side"), ("--repeats", 5, "of each way"),
        ("--slow-repeats", 1, "of (a), which takes minutes"), ("--seed", 9826, ""),
        ("--stream", 0, argparse.SUPPRESS),
    ):  # fmt: skip
        parser.add_argument(flag, type=int, default=default, help=text)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if arguments.stream:
        stream(arguments.stream, arguments.size, arguments.seed)
    else:
        report(arguments)


if __name__ == "__main__":
    main()
