"""All seven metrics against scikit-learn, a brute force and themselves; the sketch on hard distributions."""

import math
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from utils.metrics import METRICS, ClassAccumulator, evaluate_maps, mean_results, sketch


def exact(truth: np.ndarray, scores: np.ndarray) -> tuple[float, float, float]:
    y, s = truth.ravel(), scores.ravel().astype(np.float64)
    precision, recall, _ = precision_recall_curve(y, s)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    return roc_auc_score(y, s), average_precision_score(y, s), f1.max()


def brute_force_aupro(masks: np.ndarray, maps: np.ndarray, limit: float) -> float:
    regions = []
    for mask, scores in zip(masks, maps, strict=True):
        numbered = label(mask, connectivity=2)
        regions += [scores[numbered == k] for k in range(1, numbered.max() + 1)]
    normal = maps[~masks]
    x, y = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        x.append((normal >= threshold).mean())
        y.append(np.mean([(r >= threshold).mean() for r in regions]))
    inside = np.array(x) <= limit
    xs, ys = np.append(np.array(x)[inside], limit), np.append(np.array(y)[inside], np.interp(limit, x, y))
    return np.trapezoid(ys, xs) / limit


def case(seed: int, count: int = 6, side: int = 24) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, side, side), bool)
    for i in range(0, count, 2):
        masks[i, 3:9, 4:12] = True
        masks[i, 15 + i : 16 + i, 15 + i : 17 + i] = True
        masks[i, 16 + i, 17 + i] = True  # touches the one before by a corner: one region
    maps = (rng.normal(size=masks.shape) + 1.5 * masks).astype(np.float32)
    return masks.any((1, 2)).astype(int), maps.max((1, 2)), masks, maps


DISTRIBUTIONS = {
    "normal": lambda z: z,
    "heavy tails": lambda z: np.exp(8 * z.clip(-9, 9)),
    "outlier": lambda z: np.where(np.arange(z.size).reshape(z.shape) == 7, 1e6, z),
    "ties": lambda z: np.floor(2 * z),
    "half": lambda z: z.astype(np.float16),
    "constant": lambda z: np.full_like(z, 0.5),
    "narrow": lambda z: 1 + 1e-7 * z,
    "tiny": lambda z: 1e-30 * z,
    "ceiling": lambda z: 1 - np.exp(-3 - z),
    "infinite": lambda z: np.where(z > 2, np.inf, np.where(z < -2, -np.inf, z)),
    "double": lambda z: 1 + 1e-12 * z.astype(np.float64),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_small_inputs_are_exact(name: str) -> None:
    labels, scores, masks, maps = case(1)
    maps = DISTRIBUTIONS[name](maps)
    maps = maps if name in ("half", "double") else maps.astype(np.float32)
    finite = np.nan_to_num(maps.astype(np.float64), posinf=1e9, neginf=-1e9)
    result = evaluate_maps(labels, scores, masks, maps)
    assert (result.pixel_auroc, result.pixel_ap, result.pixel_f1max) == pytest.approx(exact(masks, finite), abs=1e-9)
    assert (result.image_auroc, result.image_ap, result.image_f1max) == pytest.approx(exact(labels, scores), abs=1e-12)
    assert result.aupro == pytest.approx(brute_force_aupro(masks, finite, 0.3), abs=1e-9)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("order", ["as is", "drifting", "sorted"])
def test_streams_stay_within_1e_4(name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a buffer that holds half of the scores, so that the sketch thins and goes on."""
    rng = np.random.default_rng(0)
    masks = np.zeros((40, 128, 128), bool)
    masks[::2, 20:40, 30:60] = True
    masks[::4, 100:103, 100:102] = True
    z = (rng.normal(size=masks.shape) + 2 * masks).astype(np.float32)
    if order == "drifting":
        z += np.linspace(0, 6, len(z), dtype=np.float32)[:, None, None]
    maps = DISTRIBUTIONS[name](z)
    maps = maps if name in ("half", "double") else maps.astype(np.float32)
    if order == "sorted":
        ranks = np.argsort(maps, axis=None, kind="stable")
        maps, masks = maps.ravel()[ranks].reshape(maps.shape), masks.ravel()[ranks].reshape(maps.shape)
    labels, scores = masks.any((1, 2)), z.max((1, 2))
    expected = evaluate_maps(labels, scores, masks, maps)
    monkeypatch.setattr(sketch, "BUFFER", 1 << 18)
    accumulator = ClassAccumulator()
    for i in range(0, 40, 8):
        part = slice(i, i + 8)
        accumulator.update(labels=labels[part], scores=scores[part], masks=masks[part], maps=maps[part])
    got = accumulator.compute()
    assert accumulator.negative._thinned == (len(np.unique(maps[~masks])) > sketch.BUFFER)
    for metric in METRICS:
        assert getattr(got, metric) == pytest.approx(getattr(expected, metric), abs=1e-4, nan_ok=True), metric


@pytest.mark.parametrize("total", [0.5, 4.0])
def test_ideal_boundaries_are_a_gap_apart(total: float) -> None:
    """One a score down to RESOLUTION, then more and more apart without a step, and other masses in equal parts."""
    last = torch.tensor([total, 0.01], dtype=torch.float64) * sketch.RESOLUTION
    for column in range(2):
        goals = sketch._targets(last, column)
        totals = last.repeat(len(goals) + 1, 1)
        totals[:-1, column] = goals
        counted = sketch._ideal(totals)[:-1, column]
        torch.testing.assert_close(counted, torch.arange(1, len(goals) + 1, dtype=torch.float64))


def test_memory_is_bounded() -> None:
    accumulator, rng = ClassAccumulator(), np.random.default_rng(0)
    for _ in range(6):
        masks = rng.random((8, 256, 256)) > 0.98
        accumulator.update(labels=np.ones(8), scores=np.ones(8), masks=masks, maps=rng.random(masks.shape).astype("f"))
    accumulator.compute()
    assert len(accumulator.negative.cumulative()[0]) < 12 * sketch.RESOLUTION
    assert len(accumulator.found.cumulative()[0]) <= sketch.BUFFER


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 7), st.floats(0.05, 1.0))
def test_random_small_cases(seed: int, side: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    masks = rng.random((4, side, side)) > 0.7
    masks[0, 0, 0], masks[1] = True, False
    maps = rng.integers(0, 6, masks.shape).astype(np.float32)
    result = evaluate_maps(masks.any((1, 2)), maps.max((1, 2)), masks, maps, limit)
    assert (result.pixel_auroc, result.pixel_ap, result.pixel_f1max) == pytest.approx(exact(masks, maps), abs=1e-12)
    assert result.aupro == pytest.approx(brute_force_aupro(masks, maps, limit), abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000))
def test_monotone_maps_and_orders_change_nothing(seed: int) -> None:
    labels, scores, masks, maps = case(seed)
    first = evaluate_maps(labels, scores, masks, maps)
    assert evaluate_maps(labels, np.exp(scores), masks, np.exp(maps.astype(np.float64))) == first
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = evaluate_maps(labels[order], scores[order], masks[order], maps[order])
    assert [getattr(shuffled, m) for m in METRICS] == pytest.approx([getattr(first, m) for m in METRICS], abs=1e-12)


@pytest.mark.parametrize("own", [False, True])
def test_merge_equals_joint_update(own: bool) -> None:
    parts = [case(seed) for seed in range(3)]
    whole, joined = ClassAccumulator(), ClassAccumulator()
    for labels, scores, masks, maps in parts:
        piece, extra = ClassAccumulator(), -maps if own else None
        for accumulator in (whole, piece):
            accumulator.update(labels=labels, scores=scores, masks=masks, maps=maps, pro_maps=extra)
        joined.merge(piece)
    got, expected = joined.compute(), whole.compute()
    assert [getattr(got, m) for m in METRICS] == pytest.approx([getattr(expected, m) for m in METRICS], abs=1e-12)


def test_own_map_for_aupro() -> None:
    labels, scores, masks, maps = case(3)
    accumulator = ClassAccumulator()
    accumulator.update(labels=labels, scores=scores, masks=masks, maps=maps, pro_maps=-maps)
    result, plain, turned = (
        accumulator.compute(), evaluate_maps(labels, scores, masks, maps), evaluate_maps(labels, scores, masks, -maps),
    )  # fmt: skip
    assert result.pixel_auroc == plain.pixel_auroc
    assert result.aupro == turned.aupro


def test_tensors_and_bfloat16() -> None:
    labels, scores, masks, maps = (torch.from_numpy(v) for v in case(2))
    rounded = maps.bfloat16()
    assert evaluate_maps(labels, scores, masks, rounded) == evaluate_maps(labels, scores, masks, rounded.float())


def test_what_is_missing_is_nan_and_left_out_of_means() -> None:
    labels, scores, masks, maps = case(0)
    normal = evaluate_maps(labels[1::2], scores[1::2], masks[1::2], maps[1::2])
    assert all(math.isnan(getattr(normal, m)) for m in METRICS)
    assert math.isnan(normal.mad)
    defective = evaluate_maps(labels[::2], scores[::2], masks[::2], maps[::2])
    assert math.isnan(defective.image_auroc)
    assert math.isnan(defective.image_ap)
    assert not math.isnan(defective.aupro)
    unmasked = evaluate_maps(labels, scores, np.zeros_like(masks), maps)
    assert math.isnan(unmasked.aupro)
    assert math.isnan(unmasked.pixel_ap)
    assert not math.isnan(unmasked.image_auroc)
    everywhere = evaluate_maps(labels, scores, np.ones_like(masks), maps)
    assert math.isnan(everywhere.pixel_auroc)
    full = evaluate_maps(labels, scores, masks, maps)
    assert mean_results({"a": full, "b": normal}) == full


def test_wrong_input_is_refused() -> None:
    labels, scores, masks, maps = case(0)
    with pytest.raises(ValueError, match=r"masks: expected shape .* but got"):
        evaluate_maps(labels, scores, masks[:, 1:], maps)
    with pytest.raises(ValueError, match="scores: expected shape"):
        evaluate_maps(labels, scores[1:], masks, maps)
    with pytest.raises(ValueError, match="maps: expected numbers, but got NaN"):
        evaluate_maps(labels, scores, masks, np.where(maps > 1, np.nan, maps))
    with pytest.raises(ValueError, match="fpr_limit: expected"):
        evaluate_maps(labels, scores, masks, maps, 0.0)


def accumulated(seed: int) -> ClassAccumulator:
    """What one process of several makes of its images."""
    labels, scores, masks, maps = case(seed)
    accumulator = ClassAccumulator()
    accumulator.update(labels=labels, scores=scores, masks=masks, maps=maps, pro_maps=-maps)
    return accumulator


def test_accumulators_add_up_across_processes() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        parts = list(pool.map(accumulated, range(4)))
    joined, alone = ClassAccumulator(), ClassAccumulator()
    for seed, part in enumerate(parts):
        joined.merge(part)
        alone.merge(accumulated(seed))
    assert joined.compute() == alone.compute()
    assert pickle.loads(pickle.dumps(joined)).compute() == joined.compute()


def test_merged_thinned_sketches_stay_within_1e_4(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes with more scores each than the buffer holds, of different places."""
    rng = np.random.default_rng(2)
    masks = np.zeros((4, 8, 160, 160), bool)
    masks[:, ::2, 30:70, 40:90] = True
    maps = (np.exp(3 * rng.normal(size=masks.shape)) * (1 + np.arange(4))[:, None, None, None] + 9 * masks).astype("f")
    labels, scores = masks.any((2, 3)), maps.max((2, 3))
    expected = evaluate_maps(labels.ravel(), scores.ravel(), masks.reshape(-1, 160, 160), maps.reshape(-1, 160, 160))
    monkeypatch.setattr(sketch, "BUFFER", 1 << 17)
    joined = ClassAccumulator()
    for label_, score, mask, values in zip(labels, scores, masks, maps, strict=True):
        part = ClassAccumulator()
        part.update(labels=label_, scores=score, masks=mask, maps=values)
        joined.merge(part)
    assert joined.negative._thinned
    got = joined.compute()
    assert [getattr(got, m) for m in METRICS] == pytest.approx([getattr(expected, m) for m in METRICS], abs=1e-4)
