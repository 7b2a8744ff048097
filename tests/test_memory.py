"""The memory against a plain search, what it keeps, its place in the detector, and calibrated opinions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.nn import functional as F

from datasets import are_unseen, split_holdout
from datasets.folder import ImageFolder, Item
from datasets.geometry import Geometry
from default import UsageError, make_config
from models import memory
from models.detector import Detector
from models.first_look import first_look, stacked
from models.memory import Choice, Memory, Remembering, nearest, nearest_in_rounds
from models.official import load_strictly
from models.scorer import ScoreMaps, Scorer, ScoreRule
from tests.test_vqflow import CHANNELS, build
from utils.metrics.concepts import agreement

IMAGES = 7
RULE = ScoreRule()
VIEWS = RULE.views


def levels(images: int, seed: int, side: int = 64) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(images, c, side // s, side // s) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]


def parts(features: list[torch.Tensor], at: int) -> list[list[torch.Tensor]]:
    return [[f[:at] for f in features], [f[at:] for f in features]]


def fitted(images: int = IMAGES, size: int = 1000, search: tuple[int, ...] = RULE.search) -> Memory:
    found = Memory(channels=CHANNELS, views=VIEWS, search=search)
    features = levels(images, 0)
    torch.manual_seed(2)
    remembering = Remembering(found, images=images, size=size)
    for part in parts(features, 3):
        remembering.add(part)
    remembering.finish([torch.zeros(c) for c in CHANNELS], [torch.ones(c) for c in CHANNELS])
    return found


@pytest.mark.parametrize("rows", [1, memory.ROWS - 1, memory.ROWS, 2 * memory.ROWS + 3])
def test_nearest_equals_a_plain_search(rows: int) -> None:
    torch.manual_seed(0)
    places, vectors = torch.randn(2, 9, 5), torch.randn(2, rows, 5)
    found = nearest(places, vectors.half())
    for b in range(2):
        np.testing.assert_allclose(found[b], cdist(places[b], vectors[b].half().float()).min(1), atol=1e-3)


def rounds_of(seed: int, images: int = 2) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """64 places of which the last ones are ever farther away, and three rounds of vectors."""
    torch.manual_seed(seed)
    places = torch.randn(images, 64, 5) * torch.linspace(1, 6, 64)[:, None]
    return places, [torch.randn(images, 30, 5) for _ in range(3)]


def test_in_rounds_far_places_have_the_distance_to_the_nearest_of_all() -> None:
    """Others have no less, and no more than after the first round."""
    for seed in range(20):
        places, vectors = rounds_of(seed)
        found, every, first = (
            nearest_in_rounds(places, vectors), nearest(places, torch.cat(vectors, 1)), nearest(places, vectors[0])
        )  # fmt: skip
        assert bool((found >= every - 1e-5).all()) and bool((found <= first + 1e-5).all())
        assert torch.equal(found.amax(1), every.amax(1))
        highest = every.topk(4).indices
        torch.testing.assert_close(found.gather(1, highest), every.gather(1, highest))
        assert (found > every + 1e-3).float().mean() > 0.1, "all were compared with all"
    torch.testing.assert_close(nearest_in_rounds(places, vectors[:1]), first)


def test_each_round_has_half_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "nearest", lambda p, v: compared.append((p.shape[1], v.shape[1])) or nearest(p, v))
    kept = fitted(images=sum(RULE.search))
    kept(levels(1, 3))
    assert [(places, rows // VIEWS[0].places) for places, rows in compared[:4]] == [
        (256, 8),
        (129, 8),
        (65, 16),
        (33, 16),
    ]
    assert len(compared) == 4 * len(VIEWS)


def test_a_small_change_of_the_places_is_a_small_change_of_the_distances() -> None:
    """Also where it changes which places are among the farthest."""
    places, vectors = rounds_of(0, images=4000)
    moved = places + 1e-4 * torch.randn_like(places)
    torch.testing.assert_close(
        nearest_in_rounds(places, vectors), nearest_in_rounds(moved, vectors), atol=0.02, rtol=0
    )  # fmt: skip
    before, after = (nearest(p, vectors[0]).topk(32).indices.sort().values for p in (places, moved))
    assert not torch.equal(before, after), "no place came or went"


def test_a_map_is_the_distance_to_the_most_similar_images() -> None:
    kept, asked = fitted(search=(2,)), levels(3, 5)
    for v, (view, found) in enumerate(zip(VIEWS, kept(asked), strict=True)):
        a, b = view.levels
        grid = asked[a].shape[-1]
        assert found.shape == (3, grid, grid)
        for i in range(3):
            order = cdist(asked[3][i].mean((1, 2))[None], kept.descriptors.float())[0].argsort()[:2]
            fine = F.avg_pool2d(asked[a][i : i + 1], 3, 1, 1)
            coarse = F.interpolate(F.avg_pool2d(asked[b][i : i + 1], 3, 1, 1), size=(grid, grid), mode="bilinear")
            place = torch.cat([fine, coarse], 1)[0].flatten(1).T
            stored = getattr(kept, f"vectors_{v}")[order].flatten(0, 1).float()
            np.testing.assert_allclose(found[i].flatten(), cdist(place, stored).min(1), atol=2e-3)


def test_remembered_images_are_near_and_others_are_not() -> None:
    kept = fitted()
    own, other = kept(levels(IMAGES, 0)), kept([f + 3 for f in levels(IMAGES, 0)])
    for view, near, far in zip(VIEWS, own, other, strict=True):
        stored = min(view.places, near[0].numel())
        assert (near.flatten(1) < 0.05).sum(1).min() >= stored  # its own places, to half precision
        assert far.min() > near.median()


def test_own_vectors_are_left_out() -> None:
    """Each image meets the memory of all others, as if it had never been stored; a new image meets all of it."""
    kept, features = fitted(), levels(IMAGES, 0)
    found = kept(features, own=False)
    for i in range(IMAGES):
        others = Memory(channels=CHANNELS, views=VIEWS, search=RULE.search)
        rows = [n for n in range(IMAGES) if n != i]
        for name, value in kept.named_buffers():
            setattr(others, name, value[rows])
        for a, b in zip(found, others([f[i : i + 1] for f in features]), strict=True):
            torch.testing.assert_close(a[i : i + 1], b)
    new = levels(2, 9)
    for a, b in zip(kept(new, own=False), kept(new), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("size", "expected"), [(3, 3), (1000, IMAGES)])
def test_it_keeps_as_many_images_as_asked_for(size: int, expected: int) -> None:
    kept = fitted(size=size)
    assert kept.descriptors.shape == (expected, CHANNELS[-1])
    for v, view in enumerate(VIEWS):
        places = (64 // (4, 8, 16)[v]) ** 2
        rows = getattr(kept, f"vectors_{v}")
        assert rows.shape == (expected, min(view.places, places), sum(CHANNELS[level] for level in view.levels))
        assert all(len(row.unique(dim=0)) == len(row) for row in rows)  # no place twice
    every = levels(IMAGES, 0)[3].mean((2, 3)).half()
    assert all((every == row).all(1).any() for row in kept.descriptors)


def test_what_is_remembered_is_standardized_as_if_it_had_been_before() -> None:
    """The statistics are known only when the pass is over; at the border a mean counts zeros."""
    features, means = levels(IMAGES, 0), [torch.linspace(-3, 5, c) for c in CHANNELS]
    stds = [torch.linspace(0.5, 4, c) for c in CHANNELS]
    ready = [(f - m[:, None, None]) / s[:, None, None] for f, m, s in zip(features, means, stds, strict=True)]
    kept = []
    for rows, statistics in ((features, (means, stds)), (ready, ([0 * m for m in means], [0 * s + 1 for s in stds]))):
        found = Memory(channels=CHANNELS, views=VIEWS, search=(3,))
        torch.manual_seed(4)
        remembering = Remembering(found, images=IMAGES, size=5)
        for part in parts(rows, 2):
            remembering.add(part)
        remembering.finish(*statistics)
        kept.append(dict(found.named_buffers()))
    for name, value in kept[0].items():
        torch.testing.assert_close(value, kept[1][name], rtol=2e-3, atol=2e-3)


def test_a_choice_takes_every_image_alike() -> None:
    torch.manual_seed(0)
    counts = torch.zeros(10)
    for _ in range(400):
        choice, at = Choice(images=10, size=4), 0
        for length in (4, 5, 1):
            counts[choice.rows(torch.zeros(length)) + at] += 1
            at += length
    assert counts.sum() == 1600 and counts.min() > 120 and counts.max() < 200


def test_more_images_than_are_searched() -> None:
    kept = fitted(images=sum(RULE.search) + 5)
    assert len(kept.descriptors) == sum(RULE.search) + 5
    assert all(torch.isfinite(found).all() for found in kept(levels(2, 1)))


# --- in the detector


def detector(memory: int = 4, **options: object) -> Detector:
    flow = build(memory=memory, concat_pos=True, mixed_gaussian=True, **options)
    return Detector(flow, Scorer(channels=CHANNELS, memory=bool(memory)), size=32)


def trained(**options: object) -> Detector:
    found = detector(**options)
    first_look(found, lambda: parts(levels(IMAGES, 0), 3), images=IMAGES, batch_size=3)
    return found.eval()


@pytest.mark.parametrize("pool", ["avg", "none"])
def test_flows_see_pooled_features_and_the_memory_all_places(pool: str) -> None:
    found, asked = trained(pool_type=pool), levels(2, 1)
    assert found.flow.config.kept_pool == "none"
    plain = build(pool_type=pool, concat_pos=True, mixed_gaussian=True).eval()
    load_strictly(plain, found.flow.state_dict(), "")
    judgement, without = found.judge(found.flow.keep(asked)), plain(plain.keep(asked))
    for z, expected in zip(judgement.output.latents, without.latents, strict=True):
        torch.testing.assert_close(z, expected)
    assert [tuple(s.shape[1:]) for s in judgement.maps.opinions()[3:]] == [(16, 16), (8, 8), (4, 4)]


def test_the_first_look_uses_all_images_and_standardizes_what_is_remembered() -> None:
    found, features = trained(memory=100, pool_type="none"), levels(IMAGES, 0)
    for level, (mean, std) in enumerate(zip(*found.flow.statistics(), strict=True)):
        torch.testing.assert_close(mean, features[level].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(std, features[level].std((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-5)
    assert found.scorer.memory is not None
    assert len(found.scorer.memory.descriptors) == IMAGES
    standardized = found.flow.standardize(features)
    assert all(near.flatten(1).median() < 0.05 for near in found.scorer.memory(standardized)[1:])


def test_codes_start_in_the_data() -> None:
    """After the first look every image's concept and every pattern is near a code; random codes are not."""
    seeded, features = trained(pool_type="none").flow, levels(IMAGES, 0)
    random = detector(pool_type="none").flow
    random.load_state_dict(
        seeded.state_dict() | {k: v for k, v in random.state_dict().items() if ".cspc." in k or ".cpc." in k}
    )
    gaps = [float(flow.train()(features).commitment.detach()) for flow in (seeded, random)]
    assert gaps[0] < 0.3 * gaps[1]


def test_seed_batches_hold_every_image_once() -> None:
    rows = [[torch.full((1,), float(i)), torch.full((2,), float(i))] for i in range(11)]
    batches = list(stacked(rows, 4))
    assert [len(b[0]) for b in batches] == [3, 4, 4]
    assert torch.cat([b[0] for b in batches]).flatten().tolist() == list(range(11))
    assert all(torch.equal(a[:, 0], b[:, 1]) for a, b in batches)


def test_calibrated_opinions_have_mean_zero_and_their_weight_as_deviation() -> None:
    found, unseen = trained(), levels(6, 3)
    nll = found.calibrate(parts(unseen, 2))
    assert int(found.scorer.calibrated) == 6
    judgement = found.judge(unseen)
    assert nll == pytest.approx(float(judgement.output.nll.mean()) / judgement.output.dims, rel=1e-5)
    assert found.nll_per_dim([unseen]) == pytest.approx(nll, rel=1e-5)
    weights = [ScoreRule().flow_weight] * 3 + [view.weight for view in VIEWS]
    opinions = judgement.maps.opinions()
    for own, weight in zip(opinions, weights, strict=True):
        assert abs(float(own.mean())) < 1e-3
        assert float(own.std(unbiased=False)) == pytest.approx(weight / sum(weights), rel=1e-3)
    assert found.calibrate([unseen]) == pytest.approx(nll, rel=1e-5)  # from scratch, whatever was known
    torch.testing.assert_close(found.judge(unseen).maps.opinions()[4], opinions[4], rtol=1e-3, atol=1e-3)


def test_calibration_on_remembered_images_says_what_new_ones_have() -> None:
    """Images that meet themselves in the memory are too near: new ones would all look strange."""
    new = levels(40, 8)
    shift = []
    for own in (False, True):
        found = trained(memory=100)
        found.calibrate([levels(IMAGES, 0)], own=own)
        shift.append(float(found.judge(new).maps.opinions()[5].mean()) / found.scorer.weights[5])
    assert abs(shift[0]) < 0.5 < shift[1]


def test_calibration_leaves_the_mode_and_the_flow_as_they_were() -> None:
    found = trained().train()
    before = {k: v.clone() for k, v in found.flow.state_dict().items()}
    found.calibrate([levels(4, 3)])
    assert found.training and found.flow.training
    assert all(torch.equal(v, before[k]) for k, v in found.flow.state_dict().items())


def test_the_surprise_map_is_the_sum_of_the_resized_opinions() -> None:
    found = trained()
    maps = found.judge(levels(2, 1)).maps
    total = sum(
        F.interpolate(s[:, None], size=(32, 32), mode="bilinear", align_corners=True)[:, 0] for s in maps.opinions()
    )
    torch.testing.assert_close(maps.surprise, total)


def test_published_scores_do_not_search_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained()
    searched: list[int] = []
    found.scorer.memory.register_forward_hook(lambda *_: searched.append(1))  # type: ignore[union-attr]
    maps = found.judge(levels(2, 1)).maps
    assert maps.mul.shape == maps.add.shape == maps.likelihood.shape == (2, 32, 32)
    assert not searched
    assert maps.surprise.shape == maps.contrast.shape and len(searched) == 1


def test_a_rule_survives_a_checkpoint() -> None:
    rule = ScoreRule(
        views=VIEWS[:2], search=(5, 6), flow_weight=0.5, level_share=0.2, level_weight=0.7, level_limit=1.0
    )
    assert ScoreRule.of(rule.plain()) == rule
    older = {name: value for name, value in rule.plain().items() if name != "search"} | {"nearest": 48}
    assert ScoreRule.of(older).search == (48,)
    scorer = Scorer(channels=CHANNELS, memory=True, rule=rule)
    assert scorer.weights == pytest.approx([w / 5.5 for w in (0.5, 0.5, 0.5, 2.0, 2.0)])
    maps = ScoreMaps([torch.zeros(1, 1, 4, 4)] * 3, 4, opinions=lambda: [torch.full((1, 4, 4), 3.0)], rule=rule)
    torch.testing.assert_close(maps.contrast, torch.full((1, 4, 4), 3.0 - 0.7))


# --- which images calibrate


def folder_of(counts: tuple[int, ...]) -> ImageFolder:
    names = [(c, n) for c, count in enumerate(counts) for n in range(count)]
    items = [
        Item(path=f"{c}_{n}.png", mask_path=None, label=0, class_index=c, kind="good", name=f"{n}")  # type: ignore[arg-type]
        for c, n in names
    ]
    return ImageFolder(items, Geometry(input_size=32))


@pytest.mark.parametrize(("share", "held"), [(0.1, (4, 2, 1)), (0.5, (20, 11, 2))])
def test_held_out_images_are_not_trained_on(share: float, held: tuple[int, ...]) -> None:
    whole = folder_of((40, 22, 4))
    kept, out = split_holdout(whole, share)
    assert sorted([*kept.items, *out.items], key=str) == sorted(whole.items, key=str)
    assert tuple(sum(i.class_index == c for i in out.items) for c in range(3)) == held


def test_a_seed_draws_other_images_of_the_same_number_again_and_again() -> None:
    whole = folder_of((40, 22, 4))
    splits = [split_holdout(whole, 0.2, seed)[1].items for seed in (None, 0, 1, 1)]
    assert [[sum(i.class_index == c for i in items) for c in range(3)] for items in splits] == [[8, 4, 1]] * 4
    assert len({tuple(items) for items in splits}) == 3 and splits[2] == splits[3]


def test_without_a_share_all_are_trained_on_and_a_few_of_each_class_calibrate() -> None:
    kept, out = split_holdout(folder_of((40, 5)), 0.0)
    assert len(kept.items) == 45
    assert [sum(i.class_index == c for i in out.items) for c in range(2)] == [16, 5]
    assert not are_unseen(kept, out)


def test_a_class_of_one_image_is_trained_on() -> None:
    kept, out = split_holdout(folder_of((20, 1)), 0.1)
    assert [item.class_index for item in kept.items].count(1) == 1 and len(out.items) == 2
    alone, calibrating = split_holdout(folder_of((1,)), 0.5)
    assert len(alone.items) == len(calibrating.items) == 1 and not are_unseen(alone, calibrating)
    with pytest.raises(UsageError, match=r"--holdout: 0\.5"):
        whole = folder_of((1,))
        split_holdout(whole.having([replace(item, held_out=True) for item in whole.items]), 0.5)


@pytest.mark.parametrize(("share", "held"), [(0.0, (16, 3)), (0.5, (20, 3))])
def test_a_class_with_calibration_images_of_its_own_gives_none_of_its_training_images(
    share: float, held: tuple[int, ...]
) -> None:
    whole = folder_of((40, 8))
    items = [replace(i, held_out=True) if i.class_index and i.name in "147" else i for i in whole.items]
    kept, out = split_holdout(whole.having(items), share)
    assert tuple(sum(i.class_index == c for i in out.items) for c in range(2)) == held
    assert [i.name for i in kept.items if i.class_index] == ["0", "2", "3", "5", "6"]
    assert [i.name for i in out.items if i.class_index] == ["1", "4", "7"]
    assert are_unseen(kept, out) == bool(share)


def test_presets_for_small_machines_use_all_opinions() -> None:
    for preset in ("cpu", "accurate", "sample"):
        config = make_config(preset)
        assert config.model.memory and config.data.holdout
        assert config.eval.image_score == "surprise"
        assert (config.eval.pixel_score, config.eval.pro_score) == ("contrast", "contrast")
    for preset in ("paper-mvtec", "paper-visa", "released"):
        config = make_config(preset)
        assert not config.model.memory and not config.data.holdout
        assert (config.eval.image_score, config.eval.pixel_score, config.eval.pro_score) == ("mul", "add", "mul")


def test_agreement_of_concepts_with_classes() -> None:
    perfect = agreement([3, 3, 5, 5], ["a", "a", "b", "b"])
    assert (perfect.used, perfect.purity) == (2, 1.0)
    assert perfect.mutual_information == pytest.approx(perfect.entropy) == pytest.approx(1.0)
    none = agreement([1, 1, 1, 1], ["a", "a", "b", "b"])
    assert (none.used, none.purity, none.mutual_information) == (1, 0.5, pytest.approx(0.0))
