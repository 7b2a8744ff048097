"""The memory in bfloat16: what is rounded, what is not, and where it is asked for."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from models import memory
from models.memory import nearest
from tests.test_memory import fitted, levels, trained
from utils.run.device import has_bfloat16


@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_nearest_in_bfloat16_is_the_distance_of_rounded_places(mean: float) -> None:
    """Nothing is lost to large norms: of far-off features, and of those that are stored themselves."""
    torch.manual_seed(0)
    places, vectors = (mean + torch.randn(2, n, 40) for n in (30, 2 * memory.ROWS + 3))
    vectors[:, 5] = places[:, 7]
    low = places.bfloat16()
    found = nearest(low, vectors.half())
    assert found.dtype == torch.float32
    for b in range(2):
        expected = cdist(low[b].double(), vectors[b].half().bfloat16().double()).min(1)
        np.testing.assert_allclose(found[b], expected, rtol=2e-3, atol=0.05)
        assert found[b, 7] < 0.2 < 0.1 * expected.mean()


def test_with_autocast_places_are_compared_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[torch.dtype] = []
    known, features = fitted(), levels(3, 1)
    exact = known(features)
    monkeypatch.setattr(memory, "nearest", lambda p, v: kinds.append(p.dtype) or nearest(p, v))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = known(features)
    assert set(kinds) == {torch.bfloat16}
    for a, b in zip(rounded, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02)
        assert not torch.equal(a, b)


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this machine computes no bfloat16")
def test_units_and_opinions_are_of_one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[torch.dtype] = []
    monkeypatch.setattr(memory, "nearest", lambda p, v: kinds.append(p.dtype) or nearest(p, v))
    for amp, expected in ((False, torch.float32), (True, torch.bfloat16)):
        found, kept = trained(), levels(2, 1)
        found.amp = amp
        found.calibrate([kept])
        first = len(kinds)
        found.judge(kept).maps.surprise  # noqa: B018
        assert 0 < first < len(kinds) and set(kinds) == {expected}
        kinds.clear()
