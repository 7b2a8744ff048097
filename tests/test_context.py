"""A place given its surroundings: against textbook Gaussians, and concepts that stay what they were."""

import pytest
import torch
from sklearn.decomposition import PCA
from test_hierarchy import CHANNELS, build
from torch import Tensor
from torch.distributions import MultivariateNormal

from default import ModelConfig, UsageError
from models.context import FLOOR, Context, Moments, Surrounded
from models.detector import Detector
from models.first_look import first_look
from models.hierarchy import PrincipalComponents
from models.loss import loss_terms
from models.scorer import ScoreRule
from stage import new_scorer


def texture(images: int, channels: int = 3, side: int = 12, seed: int = 0) -> Tensor:
    """Features whose neighbours resemble each other."""
    noise = torch.randn(images, channels, side + 4, side + 4, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.avg_pool2d(noise, 5, 1)
    return (x - x.mean()) / x.std()


def fitted(x: Tensor, concept: Tensor, concepts: int = 2, dilation: int = 2) -> Surrounded:
    level = Surrounded(channels=x.shape[1], concepts=concepts, dilation=dilation)
    moments = Moments(level)
    for part in torch.arange(len(x)).split(5):
        moments.add(x[part], concept[part])
    moments.fit()
    return level


@pytest.mark.parametrize("dilation", [0, 1, 2, 3])
def test_energy_is_the_conditional_density_of_a_joint_gaussian(dilation: int) -> None:
    x = texture(20)
    level = fitted(x, torch.zeros(20, dtype=torch.int64), dilation=dilation).double()
    joint = level.joint(x.double())
    rows = joint.transpose(1, 2).flatten(0, 1)
    mean, covariance = rows.mean(0), torch.cov(rows.T, correction=0)
    covariance = covariance + FLOOR * covariance.diagonal().mean() * torch.eye(len(covariance))
    found = level.energy(x.double(), torch.zeros(20, dtype=torch.int64)).flatten(1)
    expected = -MultivariateNormal(mean, covariance).log_prob(rows).view(20, -1)
    if dilation:
        expected = expected + MultivariateNormal(mean[3:], covariance[3:, 3:]).log_prob(rows[:, 3:]).view(20, -1)
    constant = 0.5 * torch.log(torch.tensor(2 * torch.pi))
    torch.testing.assert_close(found + constant, expected / 3, rtol=1e-4, atol=1e-4)


def test_inverse_and_log_determinant_of_a_place_given_the_others() -> None:
    x, concept = texture(6).double(), torch.tensor([0, 1, 0, 1, 1, 0])
    level = fitted(x.float(), concept).double()
    z, log_det = level(x, concept)
    torch.testing.assert_close(level.inverse(z, x, concept), x)
    jacobian = torch.autograd.functional.jacobian(lambda q: level(q, concept[:1])[0][0, :, 6, 5], x[:1])[:, 0]
    assert isinstance(jacobian, Tensor)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian[:, :, 6, 5])[1], log_det[0])
    seen = jacobian.abs().sum((0, 1)) > 0
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[4:9:2, 3:8:2] = True
    assert torch.equal(seen, expected), "the place itself and the eight at the distance of the dilation, no others"


def test_concepts_are_shrunk_towards_all_images_and_an_unseen_one_is_like_all() -> None:
    x, concept = texture(12), torch.zeros(12, dtype=torch.int64)
    concept[8:] = 1
    x[8:] *= 3
    level = fitted(x, concept, concepts=3)
    alone = fitted(x, torch.zeros_like(concept), concepts=1)
    torch.testing.assert_close(level.log_det[2], alone.log_det[0], rtol=0.05, atol=0)  # up to the floor
    assert level.log_det[0] > level.log_det[2] > level.log_det[1]
    own = fitted(x[8:], torch.zeros(4, dtype=torch.int64), concepts=1)
    assert level.log_det[1] > own.log_det[0], "four images of its own count for little beside ninety of all"


def test_a_strange_place_stands_out_although_all_its_values_are_usual() -> None:
    x = texture(40)
    level = fitted(x, torch.zeros(40, dtype=torch.int64))
    asked = texture(1, seed=5)
    asked[0, :, 6, 5] = -asked[0, :, 6, 5]
    energy = level.energy(asked, torch.zeros(1, dtype=torch.int64))[0]
    before = level.energy(texture(1, seed=5), torch.zeros(1, dtype=torch.int64))[0]
    assert energy[6, 5] > before[6, 5] + 1


def test_wide_levels_see_their_surroundings_in_few_directions() -> None:
    level = Surrounded(channels=100, concepts=2, dilation=2)
    x = torch.randn(8, 100, 6, 6) * torch.linspace(3, 0.1, 100)[:, None, None]
    level.set_basis(x)
    torch.testing.assert_close(level.basis.T @ level.basis, torch.eye(64), rtol=1e-4, atol=1e-4)
    assert (level.basis**2).sum(1)[:40].min() > 0.5 > (level.basis**2).sum(1)[90:].max()
    assert level.joint(x).shape == (8, 100 + 8 * 64, 36)


# --- in the detector


def detector(**options: object) -> Detector:
    flow = build(**({"semantics": "pooled", "context": 2, "memory": 4} | options))
    return Detector(flow, new_scorer(flow.config, CHANNELS), size=32)


def features(images: int, seed: int) -> list[Tensor]:
    return [texture(images, c, s, seed) for c, s in zip(CHANNELS, (16, 8, 4, 4), strict=True)]


def trained(**options: object) -> Detector:
    found, images = detector(**options), features(9, 0)
    first_look(found, lambda: [[h[part] for h in images] for part in torch.arange(9).split(4)], images=9, batch_size=4)
    return found.eval()


@pytest.mark.parametrize("options", [{}, {"memory": 0}, {"quantize_enable": False, "semantics": "learned"}])
def test_context_is_one_opinion_a_level(options: dict[str, object]) -> None:
    found = trained(**options)
    opinions = found.judge(found.flow.keep(features(2, 1))).maps.opinions()
    views = 3 if found.scorer.memory is not None else 0
    assert [tuple(o.shape[1:]) for o in opinions[3:7]] == [(16, 16), (8, 8), (4, 4), (4, 4)]
    assert len(opinions) == 7 + views == len(found.scorer.weights)
    assert sum(found.scorer.weights) == pytest.approx(1)
    weights = found.scorer.rule.context_weights
    assert found.scorer.weights[3] / found.scorer.weights[6] == pytest.approx(weights[0] / weights[3])


def test_a_context_is_fitted_to_the_concepts_of_all_images() -> None:
    found, images = trained(), features(9, 0)
    standard = found.flow.standardize(found.flow.keep(images))
    concept = found.flow.hierarchy.concept_index(standard[-1])
    assert concept is not None and isinstance(found.scorer.context, Context)
    expected = fitted(standard[0], concept, concepts=found.flow.config.k_cpc)
    torch.testing.assert_close(found.scorer.context.surrounded[0].weight, expected.weight, rtol=1e-3, atol=1e-3)


def test_pooled_concepts_are_principal_components_and_stay_through_training() -> None:
    found, images = trained(), features(9, 0)
    standard = found.flow.standardize(images)
    top = standard[-1].mean((2, 3))
    components = found.flow.hierarchy.semantic_mlp
    assert isinstance(components, PrincipalComponents)
    expected = torch.tensor(PCA(8).fit(top.numpy()).components_.T)
    torch.testing.assert_close((components.components.T @ expected).abs(), torch.eye(8), rtol=1e-3, atol=1e-3)
    before = found.flow.hierarchy.concept_index(standard[-1])
    codes = found.flow.hierarchy.cpc.embed.clone()
    optimizer = torch.optim.SGD(found.flow.parameters(), lr=0.1)
    found.flow.train()
    for _ in range(3):
        loss_terms(found.flow(found.flow.keep(images)), 1.0).total.backward()
        optimizer.step()
    found.flow.hierarchy.cpc.reassign()
    assert torch.equal(found.flow.hierarchy.cpc.embed, codes)
    assert float(found.flow.hierarchy.cpc.usage.sum()) == 27
    after = found.flow.hierarchy.concept_index(standard[-1])
    assert before is not None and after is not None and torch.equal(before, after)
    assert torch.equal(found.eval().judge(found.flow.keep(images)).output.concept, before)


def test_constants_of_a_checkpoint_without_a_context_are_read() -> None:
    plain = ScoreRule().plain()
    assert ScoreRule.of(plain) == ScoreRule()
    del plain["context_weights"]
    assert ScoreRule.of(plain).context_weights == ()


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"context": 2, "quantize_enable": True}, "--context"),
        ({"semantics": "pooled", "codebooks": "released"}, "--semantics"),
        ({"context": 17}, "--context"),
    ],
)
def test_settings_that_contradict(options: dict[str, object], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        ModelConfig(**options)  # type: ignore[arg-type]
