"""The memory against a plain search, what it keeps, its place in the model, and calibrated opinions."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch.nn import functional as F

from datasets import split_holdout
from datasets.folder import ImageFolder, Item
from default import ModelConfig, UsageError, make_config
from models import memory
from models.memory import NEAREST, VIEWS, Memory, nearest
from models.official import load_strictly
from models.vqflow import VQFlow
from tests.test_vqflow import CHANNELS, SMALL, build
from train import initialize
from utils.metrics.concepts import agreement
from utils.scoring import score_maps

IMAGES = 7


def levels(images: int, seed: int, side: int = 64) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(images, c, side // s, side // s) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]


def fitted(images: int = IMAGES, size: int = 1000) -> Memory:
    found = Memory(channels=CHANNELS)
    features = levels(images, 0)
    torch.manual_seed(2)
    found.fit([[f[:3] for f in features], [f[3:] for f in features]], images=images, size=size)
    return found


@pytest.mark.parametrize("rows", [1, memory.ROWS - 1, memory.ROWS, 2 * memory.ROWS + 3])
def test_nearest_equals_a_plain_search(rows: int) -> None:
    torch.manual_seed(0)
    places, vectors = torch.randn(2, 9, 5), torch.randn(2, rows, 5)
    found = nearest(places, vectors.half())
    for b in range(2):
        np.testing.assert_allclose(found[b], cdist(places[b], vectors[b].half().float()).min(1), atol=1e-3)


def test_a_map_is_the_distance_to_the_most_similar_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "NEAREST", 2)
    kept, asked = fitted(), levels(3, 5)
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


def test_more_images_than_are_searched() -> None:
    kept = fitted(images=NEAREST + 5)
    assert len(kept.descriptors) == NEAREST + 5
    assert all(torch.isfinite(found).all() for found in kept(levels(2, 1)))


# --- in the model


class Batch:
    def __init__(self, features: list[torch.Tensor]) -> None:
        self.features, self.path = features, ("",) * len(features[0])


def trained(**options: object) -> VQFlow:
    model = build(memory=4, concat_pos=True, mixed_gaussian=True, **options)
    initialize(model, lambda _: iter([Batch(levels(IMAGES, 0))]), IMAGES)  # type: ignore[arg-type]
    return model.eval()


@pytest.mark.parametrize("pool", ["avg", "none"])
def test_flows_see_pooled_features_and_the_memory_all_places(pool: str) -> None:
    model, asked = trained(pool_type=pool), levels(2, 1)
    assert model.config.kept_pool == "none"
    plain = build(pool_type=pool, concat_pos=True, mixed_gaussian=True).eval()
    load_strictly(plain, {k: v for k, v in model.state_dict().items() if k in plain.state_dict()} | {
        f"surprise_{k}": torch.zeros(3) for k in ("mean", "std")}, "")  # fmt: skip
    output, without = model.forward_features(asked), plain.forward_features(asked)
    for z, expected in zip(output.latents, without.latents, strict=True):
        torch.testing.assert_close(z, expected)
    assert [tuple(s.shape[1:]) for s in output.surprise[3:]] == [(16, 16), (8, 8), (4, 4)]
    assert not model.train().forward_features(asked).surprise


def test_calibrated_opinions_have_mean_zero_and_their_weight_as_deviation() -> None:
    model = trained()
    unseen = levels(6, 3)
    nll = model.calibrate([[f[:2] for f in unseen], [f[2:] for f in unseen]])
    output = model.forward_pooled(unseen)
    assert nll == pytest.approx(float(output.nll.detach().mean()) / output.dims, rel=1e-5)
    weights = [1.0, 1.0, 1.0] + [view.weight for view in VIEWS]
    for found, weight in zip(output.surprise, weights, strict=True):
        assert abs(float(found.detach().mean())) < 1e-3
        assert float(found.detach().std(unbiased=False)) == pytest.approx(weight / sum(weights), rel=1e-3)
    again = model.calibrate([unseen])  # from scratch, whatever was known
    assert again == pytest.approx(nll, rel=1e-5)
    torch.testing.assert_close(model.forward_pooled(unseen).surprise[4], output.surprise[4], rtol=1e-3, atol=1e-3)


def test_the_surprise_map_is_the_sum_of_the_resized_opinions() -> None:
    model = trained()
    output = model.forward_features(levels(2, 1))
    maps = score_maps(output.latents, 32, surprise=output.surprise).surprise
    total = sum(
        F.interpolate(s[:, None], size=(32, 32), mode="bilinear", align_corners=True)[:, 0] for s in output.surprise
    )
    torch.testing.assert_close(maps, total)
    plain = score_maps(output.latents, 32)
    torch.testing.assert_close(plain.surprise, plain.likelihood)


def test_a_checkpoint_brings_its_memory_whatever_its_size() -> None:
    model = trained()
    fresh = VQFlow(ModelConfig(**SMALL, quantize_enable=True, memory=9, concat_pos=True, mixed_gaussian=True), CHANNELS)  # type: ignore[arg-type]
    load_strictly(fresh, model.state_dict(), "file.pt")
    asked = levels(2, 1)
    for a, b in zip(fresh.eval().forward_features(asked).surprise, model.forward_features(asked).surprise, strict=True):
        torch.testing.assert_close(a, b)
    narrow = model.state_dict() | {"memory.vectors_1": torch.zeros(4, 64, 3)}
    with pytest.raises(UsageError, match=r"memory\.vectors_1"):
        load_strictly(fresh, narrow, "file.pt")


# --- which images calibrate


def folder_of(counts: tuple[int, ...]) -> ImageFolder:
    names = [(c, n) for c, count in enumerate(counts) for n in range(count)]
    items = [
        Item(path=f"{c}_{n}.png", mask_path=None, label=0, class_index=c, kind="good", name=f"{n}")  # type: ignore[arg-type]
        for c, n in names
    ]
    return ImageFolder(items, 32)


@pytest.mark.parametrize(("share", "held"), [(0.1, (4, 2, 1)), (0.5, (20, 11, 2))])
def test_held_out_images_are_not_trained_on(share: float, held: tuple[int, ...]) -> None:
    whole = folder_of((40, 22, 4))
    kept, out = split_holdout(whole, share)
    assert sorted([*kept.items, *out.items], key=str) == sorted(whole.items, key=str)
    assert tuple(sum(i.class_index == c for i in out.items) for c in range(3)) == held


def test_without_a_share_all_are_trained_on_and_a_few_of_each_class_calibrate() -> None:
    kept, out = split_holdout(folder_of((40, 5)), 0.0)
    assert len(kept.items) == 45
    assert [sum(i.class_index == c for i in out.items) for c in range(2)] == [16, 5]
    with pytest.raises(UsageError, match=r"--holdout: 0\.5"):
        split_holdout(folder_of((1,)), 0.5)


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
