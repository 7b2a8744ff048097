"""Maps and image scores against formulas written out with loops, and the learning-rate schedules."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from default import TrainConfig
from models.scorer import ScoreMaps, image_scores
from utils.run.schedule import learning_rate


def resize_by_hand(a: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, corners aligned, one pixel at a time."""
    h, w = a.shape
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y, x = i * (h - 1) / (size - 1), j * (w - 1) / (size - 1)
            y0, x0 = min(int(y), h - 2) if h > 1 else 0, min(int(x), w - 2) if w > 1 else 0
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            top = a[y0, x0] * (1 - (x - x0)) + a[y0, x1] * (x - x0)
            bottom = a[y1, x0] * (1 - (x - x0)) + a[y1, x1] * (x - x0)
            out[i, j] = top * (1 - (y - y0)) + bottom * (y - y0)
    return out


def test_maps_by_hand() -> None:
    torch.manual_seed(0)
    latents = [torch.randn(2, 3, 6, 6).double(), torch.randn(2, 4, 3, 3).double(), torch.randn(2, 5, 2, 2).double()]
    local = [torch.randn(2, *z.shape[2:]).double() for z in latents]
    maps = ScoreMaps([z.float() for z in latents], 8, [j.float() for j in local])
    for b in range(2):
        levels = [-0.5 * (z[b].numpy() ** 2).mean(0) for z in latents]
        product = sum(resize_by_hand(a, 8) for a in levels)
        density = product + sum(
            resize_by_hand(j[b].numpy() / z.shape[1], 8) for j, z in zip(local, latents, strict=True)
        )
        product = np.exp(product - product.max())
        total = sum(resize_by_hand(np.exp(a - a.max()), 8) for a in levels)
        np.testing.assert_allclose(maps.mul[b], product.max() - product, atol=1e-5)
        np.testing.assert_allclose(maps.add[b], total.max() - total, atol=1e-5)
        np.testing.assert_allclose(maps.likelihood[b], -density, atol=1e-5)


@pytest.mark.parametrize("height", [1.0, 9.0])
def test_contrast_takes_a_part_of_the_level_of_normal_images_off(height: float) -> None:
    torch.manual_seed(0)
    opinions = [torch.rand(2, 10, 10)]
    opinions[0][1] *= height
    maps = ScoreMaps([torch.zeros(2, 1, 10, 10)] * 3, 10, opinions=lambda: opinions)
    level = min(float(opinions[0][1].max()), 2.5)  # one pixel in a hundred
    torch.testing.assert_close(maps.contrast[1], maps.surprise[1] - 0.3 * level)
    torch.testing.assert_close(maps.surprise, opinions[0])


def test_likelihood_is_absolute_and_the_published_maps_are_not() -> None:
    torch.manual_seed(0)
    quiet = [torch.randn(1, 4, 8, 8) * 0.1 for _ in range(3)]
    loud = [z * 20 for z in quiet]
    a, b = ScoreMaps(quiet, 16), ScoreMaps(loud, 16)
    assert b.likelihood.min() > a.likelihood.max() - 1e-3
    assert a.mul.min() == b.mul.min() == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(2, 30), st.floats(1e-6, 1.0), st.integers(0, 1000))
def test_image_score_is_the_mean_of_the_top(batch: int, side: int, share: float, seed: int) -> None:
    maps = torch.from_numpy(np.random.default_rng(seed).normal(size=(batch, side, side))).float()
    count = max(int(side * side * share), 1)
    expected = [np.sort(m.numpy().ravel())[-count:].mean() for m in maps]
    np.testing.assert_allclose(image_scores(maps, share), expected, rtol=1e-4, atol=1e-5)


def test_released_schedule_at_its_sub_epochs() -> None:
    config = TrainConfig(schedule="released", lr=1.0, meta_epochs=50, sub_epochs=2)
    rates = [learning_rate(config, (e + 0.3) / 100) for e in range(100)]
    assert rates[:3] == pytest.approx([0.1, 0.19, 0.28])
    assert rates[10:70] == pytest.approx([1.0] * 60)
    assert rates[70:90] == pytest.approx([0.33] * 20)
    assert rates[90:] == pytest.approx([0.33**2] * 10)


def test_relative_schedules() -> None:
    step = TrainConfig(schedule="step", lr=1.0, warmup=0.1)
    assert [learning_rate(step, p) for p in (0, 0.1, 0.69, 0.71, 0.91)] == pytest.approx([0.1, 1, 1, 0.33, 0.1089])
    cosine = TrainConfig(schedule="cosine", lr=1.0, warmup=0.2)
    assert [learning_rate(cosine, p) for p in (0.2, 0.6, 1.0)] == pytest.approx([1, 0.5, 0], abs=1e-12)
    assert learning_rate(TrainConfig(schedule="constant", lr=1.0, warmup=0.0), 0.99) == 1.0
    assert all(math.isfinite(learning_rate(TrainConfig(schedule="cosine", warmup=1.0), p / 10)) for p in range(11))
