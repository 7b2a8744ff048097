"""Decisions: p-values against their definition, the guaranteed rate by simulation, tails against scipy, checkpoints."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, genpareto

from default import EvalConfig
from models.decision import Calibrated, Decision, Tail, categories, enough, scoring_of, split_in_two, threshold
from utils.metrics.decisions import Decided, Rate


def calibrated(scores: Any, concepts: Any = None, *, unseen: bool = True) -> Calibrated:
    numbers = tuple(float(s) for s in scores)
    own = (-1,) * len(numbers) if concepts is None else tuple(int(c) for c in concepts)
    return Calibrated(scores=numbers, peaks=tuple(2 * s for s in numbers), concepts=own, scoring={}, unseen=unseen)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(-5, 5), min_size=4, max_size=60), st.lists(st.integers(-6, 6), min_size=1, max_size=20),
    st.sampled_from([0.01, 0.05, 0.1, 0.2, 0.5]),
)  # fmt: skip
def test_p_values_by_their_definition(known: list[int], new: list[int], rate: float) -> None:
    decision = Decision(calibrated(known), rate)
    verdict = decision(torch.tensor(new).float(), None)
    expected = [(1 + sum(k >= s for k in known)) / (len(known) + 1) for s in new]
    np.testing.assert_allclose(verdict.p_value, expected, rtol=1e-6)
    if len(known) >= enough(rate):
        assert verdict.defective.tolist() == [p <= rate + 1e-9 for p in expected]
        assert verdict.pixel_threshold[0] == pytest.approx(2 * float(verdict.threshold[0]))
    else:
        assert not (verdict.defective & (torch.tensor(new) <= max(known))).any()


@pytest.mark.parametrize(("rate", "count"), [(0.05, 19), (0.05, 60), (0.1, 60), (0.01, 120)])
def test_the_rate_is_kept_on_new_normal_images(rate: float, count: int) -> None:
    """On average over calibrations, by their exact expectation: floor(rate (n + 1)) / (n + 1)."""
    rng, alarms = np.random.default_rng(0), []
    for _ in range(300):
        known, new = rng.standard_t(3, count), rng.standard_t(3, 400)
        verdict = Decision(calibrated(known), rate)(torch.from_numpy(new).float(), None)
        alarms.append(float(verdict.defective.float().mean()))
    expected = math.floor(rate * (count + 1) + 1e-9) / (count + 1)
    k = math.floor(rate * (count + 1) + 1e-9)
    spread = math.sqrt((beta.var(k, count + 1 - k) + expected / 400) / 300)
    assert abs(np.mean(alarms) - expected) < 4 * spread
    assert expected <= rate


def test_concepts_with_images_enough_have_thresholds_of_their_own() -> None:
    rng = np.random.default_rng(1)
    concepts = np.repeat([0, 3, 5, 7], [40, 25, 12, 10])
    scores = rng.normal(size=len(concepts)) + concepts
    decision = Decision(calibrated(scores, concepts), 0.05)
    assert decision.counts == [22, 40, 25]
    verdict = decision(torch.zeros(5), torch.tensor([0, 3, 5, 7, 9]))
    rest = scores[(concepts == 5) | (concepts == 7)]
    expected = [threshold(s, 0.05) for s in (scores[concepts == 0], scores[concepts == 3], rest, rest, rest)]
    np.testing.assert_allclose(verdict.threshold, expected, rtol=1e-6)
    assert decision.guaranteed and "3 groups" in decision.basis


def test_categories_leave_enough_images_to_the_others() -> None:
    concepts = np.repeat([0, 1, 2], [30, 20, 5])
    assert categories(concepts, 19) == {0: 1}, "five alone would be too few"
    assert categories(np.repeat([0, 1], [30, 30]), 19) == {0: 1}, "somebody may choose a concept that none did"
    assert categories(np.full(9, -1), 5) == {}
    assert categories(np.repeat([4], [30]), 19) == {}


@pytest.mark.parametrize(("rate", "least"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.5, 1)])
def test_how_many_images_are_enough(rate: float, least: int) -> None:
    assert enough(rate) == least
    assert math.floor(rate * (least + 1) + 1e-9) == 1 and math.floor(rate * least + 1e-9) == 0


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.25])
def test_tails_are_fitted(shape: float) -> None:
    """Quantiles beyond the data, near those of the distribution that it was drawn from."""
    scores = genpareto.rvs(shape, scale=2.0, size=4000, random_state=0)
    tail = Tail.of(scores)
    assert tail is not None and tail.share == 0.25
    for rate in (0.05, 0.01, 0.002):
        assert tail.quantile(rate) == pytest.approx(genpareto.isf(rate, shape, scale=2.0), rel=0.12)
    fitted = genpareto(tail.shape, scale=tail.scale)
    assert tail.excess(0.3) == pytest.approx(fitted.isf(0.3), rel=1e-9)
    exact = Tail.fitted(0.0, fitted.isf((np.arange(1, 100_001) - 0.35) / 100_000), 1.0)
    assert exact is not None
    assert (exact.shape, exact.scale) == (pytest.approx(tail.shape, abs=0.01), pytest.approx(tail.scale, rel=0.01))


def test_too_few_images_give_an_estimate_with_an_interval() -> None:
    rng = np.random.default_rng(2)
    decision = Decision(calibrated(rng.normal(size=40)), 0.01)
    low, high = decision.interval()
    assert not decision.guaranteed and "estimate" in decision.basis and "99 would give" in decision.basis
    assert low < float(decision.thresholds[0]) < high
    assert max(decision.calibrated.scores) <= float(decision.thresholds[0]) < 6
    for few in ([1.0], [1.0, 2.0, 3.0], [4.0] * 30):
        found = Decision(calibrated(few), 0.01)
        assert float(found.thresholds[0]) == max(few) and found.interval() == (max(few), math.inf)
    assert "no guarantee" in Decision(calibrated(range(200), unseen=False), 0.05).basis
    assert not Decision(calibrated(range(200), unseen=False), 0.05).guaranteed


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_units_and_scores_come_from_different_images_of_every_class(classes: list[int]) -> None:
    units, deciding = split_in_two(classes)
    assert sorted([*units, *deciding]) == list(range(len(classes)))
    assert 0 <= len(units) - len(deciding) <= 1
    for c in set(classes):
        ours, theirs = (sum(classes[n] == c for n in part) for part in (units, deciding))
        assert abs(ours - theirs) <= 1


def test_plain_values_come_back() -> None:
    config = EvalConfig(image_score="surprise", pixel_score="contrast")
    one = Calibrated(scores=(1.0, 2.0), peaks=(3.0, 4.0), concepts=(0, 2), scoring=scoring_of(config, 64), unseen=True)
    assert Calibrated.of(one.plain()) == one
    with pytest.raises(ValueError, match="as many scores"):
        Calibrated.of(one.plain() | {"peaks": [1.0]})
    assert config.shown_score == "surprise"
    assert EvalConfig(image_score="mul", pixel_score="contrast").shown_score == "contrast"
    assert EvalConfig().shown_score == "likelihood"


def test_rates_have_exact_intervals() -> None:
    low, high = Rate(hits=3, count=72).interval()
    assert (low, high) == (pytest.approx(beta.ppf(0.025, 3, 70)), pytest.approx(beta.ppf(0.975, 4, 69)))
    assert Rate(hits=0, count=0).interval() == (0.0, 1.0)
    assert str(Rate.of([True, False])).startswith("1 of 2 (50.0%, 95 % interval ")


def test_models_of_single_classes_are_told_of_together() -> None:
    parts = [
        Decided(
            rate=0.05, calibration=n, basis=f"basis {n}", threshold=1.0, interval=None,
            false_alarms={name: Rate(hits=1, count=10)}, found={name: Rate(hits=4, count=5)},
        )
        for name, n in (("a", 30), ("b", 20))
    ]  # fmt: skip
    whole = Decided.joined(parts)
    assert whole is not None and whole.basis == "basis 20"
    assert "2 of 20 (10.0%" in str(whole) and "8 of 10 (80.0%" in str(whole)
    assert whole.plain()["classes"]["found"]["b"]["images"] == 4
    assert Decided.joined([]) is None
