"""The quick 3x3 convolution is the plain one, and so are its gradients; large models give the same either way."""

import pytest
import torch
from torch.nn import functional as F

from default import ModelConfig
from models import winograd
from models.loss import loss_terms
from models.vqflow import VQFlow
from models.winograd import Conv3x3, Winograd, worthwhile
from utils.run.seed import seed_everything

SHAPES = [(1, 4, 4), (3, 7, 10), (4, 8, 5), (2, 1, 13)]  # whole windows, parts of them, less than one


def both(batch: int, height: int, width: int) -> list[tuple[torch.Tensor, ...]]:
    """Output and gradients of the plain convolution and of the quick one, in double precision."""
    torch.manual_seed(0)
    shapes = (batch, 5, height, width), (6, 5, 3, 3), (6,)
    found = []
    for way in (lambda *a: F.conv2d(*a, padding=1), Winograd.apply):
        torch.manual_seed(1)
        inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
        out = way(*inputs)
        out.backward(torch.randn(batch, 6, height, width, dtype=torch.float64))
        found.append((out, *(v.grad for v in inputs)))
    return found


@pytest.mark.parametrize(("batch", "height", "width"), SHAPES)
def test_equals_the_plain_convolution_and_its_gradients(batch: int, height: int, width: int) -> None:
    for expected, found in zip(*both(batch, height, width), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_in_parts_of_a_batch_too(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = both(6, 8, 8)[1]
    for windows in (1, 9):  # four windows an image: one image at once, and two
        monkeypatch.setattr(winograd, "AT_ONCE", windows)
        for expected, found in zip(whole, both(6, 8, 8)[1], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_rounding_is_that_of_single_precision() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 600, 16, 16).relu(), torch.randn(80, 600, 3, 3) / 70
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    found = Winograd.apply(x, weight, None)
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_only_where_it_pays() -> None:
    large, small = Conv3x3(96, 96), Conv3x3(20, 96)
    with torch.no_grad():
        assert worthwhile(torch.zeros(1, 96, 24, 24), large.weight)
        assert not worthwhile(torch.zeros(99, 96, 16, 16), large.weight)  # whatever the batch: it judges images
    assert worthwhile(torch.zeros(8, 96, 16, 16), large.weight)
    assert not worthwhile(torch.zeros(1, 96, 24, 24), large.weight)
    assert not worthwhile(torch.zeros(8, 20, 16, 16), small.weight)
    assert not worthwhile(torch.zeros(8, 96, 16, 16).double(), large.weight.double())
    assert not worthwhile(torch.zeros(8, 96, 16, 16, device="meta"), large.weight.to("meta"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not worthwhile(torch.zeros(8, 96, 16, 16), large.weight)


def test_a_traced_graph_has_plain_convolutions() -> None:
    layer = Conv3x3(96, 96).eval().requires_grad_(False)
    graph = torch.export.export(layer, (torch.zeros(1, 96, 24, 24),)).graph
    assert [n.name for n in graph.nodes if n.op == "call_function"] == ["conv2d"]


def step(*, direct: bool = False) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a model whose first level is large enough."""
    seed_everything(0)
    config = ModelConfig(
        dim_cpc=64, k_cpc=4, k_cspc=12, c_pos_conds=(8,), parallel_blocks=(1, 1, 1), quantize_enable=True,
        concat_pos=True, mixed_gaussian=True, conditioning="direct" if direct else "structured",
    )  # fmt: skip
    model = VQFlow(config, (96, 24, 16, 16)).train()
    torch.manual_seed(1)
    pooled = [torch.randn(4, c, s, s) for c, s in zip((96, 24, 16, 16), (24, 8, 4, 4), strict=True)]
    loss = loss_terms(model(pooled), 1.0).total
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("direct", [False, True])
def test_a_training_step_is_the_same(monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    used: list[int] = []
    multiplied = winograd.multiplied
    monkeypatch.setattr(winograd, "multiplied", lambda *a: used.append(1) or multiplied(*a))
    loss, gradients = step(direct=direct)
    assert used
    monkeypatch.setattr(winograd, "PLACES", 10**9)
    expected, plain = step(direct=direct)
    assert loss == pytest.approx(expected, rel=1e-6)
    floor = 1e-3 * max(float(value.norm()) for value in plain.values())  # a bias before a batch norm has none
    for name, value in plain.items():
        assert (gradients[name] - value).norm() <= 1e-4 * value.norm().clamp(min=floor), name
