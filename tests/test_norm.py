"""Batch normalisation of single values, and that anything more is PyTorch's own, bit for bit."""

import pytest
import torch
from torch import nn

from models.norm import BatchNorm1d, BatchNorm2d

PAIRS = [
    (BatchNorm1d, nn.BatchNorm1d, ()),
    (BatchNorm2d, nn.BatchNorm2d, (1, 1)),
    (BatchNorm2d, nn.BatchNorm2d, (2, 1)),
]


@pytest.mark.parametrize(("ours", "theirs", "size"), PAIRS)
@pytest.mark.parametrize("training", [True, False])
def test_more_than_one_value_is_pytorchs_own(ours: type, theirs: type, size: tuple[int, ...], training: bool) -> None:
    torch.manual_seed(0)
    mine, reference = ours(5).train(training), theirs(5).train(training)
    assert list(mine.state_dict()) == list(reference.state_dict())
    batch = 1 if size == (2, 1) else 2
    for _ in range(3):
        x = 3 + 2 * torch.randn(batch, 5, *size)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        out, expected = mine(a), reference(b)
        grad = torch.randn_like(out)
        out.backward(grad)
        expected.backward(grad)
        assert torch.equal(out, expected)
        assert torch.equal(a.grad, b.grad)
        for name, value in reference.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value), name


@pytest.mark.parametrize(("norm", "size"), [(BatchNorm1d, ()), (BatchNorm2d, (1, 1))])
def test_single_values_by_hand(norm: type, size: tuple[int, ...]) -> None:
    layer = norm(1).double()
    layer.weight.data.fill_(3.0)
    layer.bias.data.fill_(0.5)
    x = torch.tensor([[5.0]], dtype=torch.float64).reshape(1, 1, *size).requires_grad_()
    out = layer(x)
    mean, var = 0.1 * 5, 0.9 * 1 + 0.1 * 5**2
    assert layer.running_mean.item() == pytest.approx(mean)
    assert layer.running_var.item() == pytest.approx(var)
    assert layer.num_batches_tracked.item() == 1
    assert out.item() == pytest.approx(3 * (5 - mean) / (var + 1e-5) ** 0.5 + 0.5)
    out.sum().backward()
    assert x.grad.item() == pytest.approx(3 / (var + 1e-5) ** 0.5)
    assert layer.weight.grad.item() == pytest.approx((5 - mean) / (var + 1e-5) ** 0.5)
    assert layer.bias.grad.item() == 1
    second = layer(torch.full_like(x, 2.0))
    assert layer.running_var.item() == pytest.approx(0.9 * var + 0.1 * (2 - mean) ** 2)
    assert layer.running_mean.item() == pytest.approx(mean + 0.1 * (2 - mean))
    assert second.isfinite().all()
    assert torch.equal(layer.eval()(torch.full_like(x, 2.0)), second)  # evaluation says the same


def test_a_stream_of_single_values_is_learnt_and_never_explodes() -> None:
    torch.manual_seed(0)
    layer = BatchNorm1d(64)
    outs = torch.cat([layer(500 + 20 * torch.randn(1, 64)) for _ in range(300)])
    assert outs.abs().max() <= 10**0.5
    assert (layer.running_mean - 500).abs().mean() < 10
    assert layer.running_var.mean().item() == pytest.approx(400, rel=0.15)
    assert outs[100:].std().item() == pytest.approx(0.9, abs=0.15)


def test_a_single_value_under_bfloat16() -> None:
    layer = BatchNorm1d(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(torch.ones(1, 4, dtype=torch.bfloat16))
    assert out.isfinite().all()
    assert layer.running_mean.dtype == torch.float32


def test_several_single_values_before_a_backward_pass() -> None:
    """Accumulated losses: each value is differentiated by the statistics that normalized it."""
    torch.manual_seed(0)
    together, alone = BatchNorm1d(3), BatchNorm1d(3)
    values = torch.randn(2, 1, 3)
    (together(values[0]) + together(values[1])).sum().backward()
    for value in values:
        alone(value).sum().backward()
    torch.testing.assert_close(together.weight.grad, alone.weight.grad)
