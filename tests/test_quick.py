"""Extractors in a quicker form give the same features, and stay the same extractors."""

import copy

import pytest
import torch
from torch import nn

from models.extractor import PACKAGED, FrozenExtractor
from models.quick import NORMS, ResponseNorm, fold, quickened

SIZE = 160


def extractor(name: str) -> FrozenExtractor:
    """With norms that are not what they begin with."""
    torch.manual_seed(0)
    made = FrozenExtractor(name, input_size=SIZE, pretrained=False)
    for layer in made.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.3, 0.3)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
        if isinstance(getattr(layer, "weight", None), nn.Parameter) and layer.weight.dim() == 1:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.3, 0.3)
    return made


def norms(net: nn.Module) -> int:
    return sum(type(layer) in NORMS for layer in net.modules())


@pytest.mark.parametrize("name", ["convnextv2_atto", PACKAGED, "test_resnet", "test_vit"])
def test_features_and_fingerprint_stay(name: str) -> None:
    plain = extractor(name)
    quick = copy.deepcopy(plain).quicken(SIZE)
    torch.manual_seed(1)
    image = torch.rand(2, 3, SIZE, SIZE)
    for found, expected in zip(quick(image), plain(image), strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    for normalized in (False, True):
        assert quick.fingerprint(normalized=normalized) == plain.fingerprint(normalized=normalized)


@pytest.mark.parametrize("name", ["convnextv2_atto", PACKAGED, "test_vit"])
def test_weights_kept_in_bfloat16_are_those_that_autocast_would_make(name: str) -> None:
    plain, image = extractor(name), torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    quick, low = (copy.deepcopy(plain).quicken(SIZE, low=kind) for kind in (None, torch.bfloat16))
    assert low.fingerprint() == plain.fingerprint()
    assert any(p.dtype == torch.bfloat16 for p in low.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        for found, expected in zip(low(image), quick(image), strict=True):
            assert torch.equal(found, expected)


def test_response_norm_in_bfloat16() -> None:
    torch.manual_seed(0)
    norm, x = ResponseNorm(64), torch.randn(2, 24, 24, 64)
    for values in (norm.weight, norm.bias):
        nn.init.normal_(values)
    found = norm(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert (found - norm(x)).abs().max() < 0.02 * norm(x).abs().max()


def test_what_is_slow_has_gone() -> None:
    response = [
        layer for layer in extractor("convnextv2_atto").quicken(SIZE).modules() if isinstance(layer, ResponseNorm)
    ]
    assert len(response) == 12
    for name, before, left in ((PACKAGED, 48, 0), ("test_resnet", 15, 1)):  # one follows no convolution of its module
        made = extractor(name)
        assert norms(made.net) == before
        assert norms(made.quicken(SIZE).net) == left
        assert not any(p.requires_grad for p in made.parameters())


class Crossed(nn.Module):
    """A module that computes in another order than it lists its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.norm(self.conv2(self.conv1(x).relu()))]


def test_a_wrong_guess_is_taken_back() -> None:
    torch.manual_seed(0)
    net = Crossed().eval()
    nn.init.uniform_(net.norm.running_mean, 1.0, 2.0)
    assert fold(copy.deepcopy(net)) == 1
    assert quickened(net, torch.rand(1, 3, 8, 8)) is net
    assert norms(net) == 1


@pytest.mark.parametrize("kind", [None, torch.bfloat16])
def test_some_images_at_a_time_give_what_all_at_once_give(
    monkeypatch: pytest.MonkeyPatch, kind: torch.dtype | None
) -> None:
    made, sizes = extractor("convnextv2_atto").quicken(SIZE, low=kind), []
    levels = made._levels
    monkeypatch.setattr(made, "_levels", lambda image: sizes.append(len(image)) or levels(image))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    image = torch.rand(45, 3, SIZE, SIZE)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind is not None):
        found, expected = made(image), levels(image)
    assert sizes == ([20, 20, 5] if kind is None else [40, 5])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=float(0.02 * b.abs().max()) if kind else 1e-4, rtol=1e-4)
