"""Flows, fusion and prior: inversion, log-determinants against autograd, the original FrEIA block."""

from dataclasses import replace

import pytest
import torch
from FrEIA.modules import AllInOneBlock
from torch.distributions import Independent, Normal

from models.condition import Condition
from models.flow import CouplingBlock, LevelFlow
from models.fusion import FusionFlow
from models.prior import MixedGaussian

SIZES = [(3, 4), (1, 1), (2, 5)]


def dense(b: int, c: int, h: int, w: int) -> Condition:
    return Condition.of_map(torch.randn(b, c, h, w, dtype=torch.float64))


def shake(module: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that a wrong log-determinant shows."""
    for p in module.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    return module.double()


def slogdet(function, x: torch.Tensor) -> torch.Tensor:
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v.reshape(x.shape)).flatten(), x.flatten())
    return torch.linalg.slogdet(jacobian)[1]


@pytest.mark.parametrize("channels", [2, 5, 6])
@pytest.mark.parametrize("size", SIZES)
def test_level_flow_inverts_and_its_log_det_is_autograds(channels: int, size: tuple[int, int]) -> None:
    torch.manual_seed(channels)
    flow = shake(LevelFlow(channels=channels, condition=3, blocks=3, clamp=1.9))
    x, condition = torch.randn(2, channels, *size, dtype=torch.float64), dense(2, 3, *size)
    z, local = flow(x, condition)
    back, minus = flow.inverse(z, condition)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(minus, -local)
    assert local.shape == (2, *size)
    one = replace(condition, map=condition.map[:1])
    torch.testing.assert_close(local[0].sum(), slogdet(lambda v: flow(v, one)[0], x[:1]))


@pytest.mark.parametrize("sizes", [((4, 4), (2, 2), (2, 2)), ((5, 3), (3, 2), (2, 1))])
def test_fusion_inverts_and_its_log_det_is_autograds(sizes: tuple) -> None:
    torch.manual_seed(0)
    channels = (2, 3, 4)
    fusion = shake(FusionFlow(channels=channels, condition=3, clamp=1.9))
    levels = tuple(torch.randn(2, c, *s, dtype=torch.float64) for c, s in zip(channels, sizes, strict=True))
    condition = dense(2, 3, *sizes[-1])
    out, local = fusion(levels, condition)
    back, minus = fusion.inverse(out, condition)
    for a, b in zip(back, levels, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(minus, local, strict=True):
        torch.testing.assert_close(a, -b)
    one, parts = replace(condition, map=condition.map[:1]), [v[:1].numel() for v in levels]

    def joined(v: torch.Tensor) -> torch.Tensor:
        shaped = tuple(p.reshape(1, *x.shape[1:]) for p, x in zip(v.flatten().split(parts), levels, strict=True))
        return torch.cat([o.flatten() for o in fusion(shaped, one)[0]])

    start = torch.cat([v[:1].flatten() for v in levels])
    torch.testing.assert_close(sum(j[0].sum() for j in local), slogdet(joined, start))


def test_fusion_bounds_its_latents() -> None:
    """As in the released code: a broken image must not give infinite scores."""
    fusion = FusionFlow(channels=(2, 3, 4), condition=3, clamp=1.9).double()
    levels = tuple(1e9 * torch.randn(2, c, 4, 4, dtype=torch.float64) for c in (2, 3, 4))
    out, _ = fusion(levels, dense(2, 3, 4, 4))
    assert all(x.abs().max() == 1e6 for x in out)


def test_block_equals_freias_own() -> None:
    """Same parameters, FrEIA's own forward on the concatenated condition."""
    torch.manual_seed(0)
    block = shake(CouplingBlock(channels=5, condition=4, clamp=1.9))
    x, condition = torch.randn(3, 5, 4, 6, dtype=torch.float64), dense(3, 4, 4, 6)

    class Joined(torch.nn.Module):
        def forward(self, joined: torch.Tensor) -> torch.Tensor:
            net = block.subnet
            hidden = torch.nn.functional.conv2d(joined, net.conv1.weight, net.conv1.bias, padding=1)
            return net.conv2(net.ln(hidden).relu())

    freia = AllInOneBlock(
        [(5, 1, 1)], dims_c=[(4, 1, 1)], affine_clamping=1.9, subnet_constructor=lambda a, b: Joined()
    )
    freia.double().load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("subnet")})
    (expected,), log_det = freia((x,), (condition.dense(),))
    y, local = block(x, condition)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(local.sum((1, 2)), log_det)


def test_prior_against_torch_distributions() -> None:
    torch.manual_seed(0)
    prior = shake(MixedGaussian(dim=6, channels=(3, 4, 5)))
    concept, z = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    shift, scale = prior.parameters_of(1, concept)
    gaussian = Independent(Normal(shift[..., None, None].expand_as(z), scale[..., None, None].expand_as(z)), 3)
    unit = Independent(Normal(torch.zeros_like(z), torch.ones_like(z)), 3)
    u, local = prior(1, z, concept)
    torch.testing.assert_close(unit.log_prob(u) + local.expand(2, 3, 5).sum((1, 2)), gaussian.log_prob(z))
    back, minus = prior.inverse(1, u, concept)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(minus, -local)


def test_prior_starts_near_the_unit_gaussian_and_stays_positive() -> None:
    torch.manual_seed(0)
    prior = MixedGaussian(dim=64, channels=(8,))
    scale = prior.parameters_of(0, torch.randn(4, 64))[1]
    assert (scale - 1).abs().max() < 0.1
    torch.nn.init.normal_(prior.scale[0].weight, std=10)
    assert (prior.parameters_of(0, torch.randn(4, 64))[1] >= 0).all()


def test_released_prior_has_a_scale_above_zero() -> None:
    """The published sqrt(x^2 + 1e-8): where x is 0 there is something to divide by."""
    prior = MixedGaussian(dim=4, channels=(3,), released=True)
    torch.nn.init.zeros_(prior.scale[0].bias)
    torch.testing.assert_close(prior.parameters_of(0, torch.zeros(2, 4))[1], torch.full((2, 3), 1e-4))


def test_released_prior_counts_no_log_det() -> None:
    prior = MixedGaussian(dim=4, channels=(3,), released=True)
    assert prior(0, torch.randn(2, 3, 2, 2), torch.randn(2, 4))[1].abs().sum() == 0
