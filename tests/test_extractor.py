"""Extractors: levels and names, weights from files and the package, errors, frozen for ever."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from skimage import data as pictures

from datasets.transforms import MEAN, STD
from default import UsageError
from models.extractor import FrozenExtractor, packaged_weights


@pytest.mark.parametrize(
    ("name", "strides"),
    [("resnet18", (4, 8, 16, 32)), ("convnextv2_atto", (4, 8, 16, 32)), ("vit_tiny_patch16_224", (16, 16, 16, 16))],
)
@pytest.mark.parametrize("size", [64, 96])
def test_levels_come_from_timm(name: str, strides: tuple, size: int) -> None:
    extractor = FrozenExtractor(name, input_size=size, pretrained=False)
    maps = extractor(torch.randn(2, 3, size, size))
    assert extractor.strides == strides
    assert [m.shape for m in maps] == [
        (2, c, size // s, size // s) for c, s in zip(extractor.channels, strides, strict=True)
    ]


def test_names_of_the_released_code() -> None:
    with torch.device("meta"):
        for name in ("resnet34", "resnext50_32x4d", "wide_resnet50_2"):
            levels, _ = FrozenExtractor._probe(name, 256)
            assert levels == (1, 2, 3, 4)
    tag = timm.get_pretrained_cfg("convnextv2_base").tag
    assert tag == "fcmae_ft_in22k_in1k"


def test_frozen_for_ever() -> None:
    extractor = FrozenExtractor("resnet18", input_size=64, pretrained=False).train()
    assert not extractor.training and not extractor.net.training
    maps = extractor(torch.randn(1, 3, 64, 64, requires_grad=True))
    assert not any(m.requires_grad for m in maps)
    assert not any(p.requires_grad for p in extractor.parameters())


def test_packaged_weights_know_a_cat() -> None:
    """tabby, tiger cat, Persian, Siamese or Egyptian cat."""
    net = timm.create_model("tf_efficientnet_lite0").eval()
    net.load_state_dict(packaged_weights())
    image = np.asarray(Image.fromarray(pictures.chelsea()).resize((224, 224))) / 255.0
    batch = torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1)[None].float()
    assert int(net(batch).argmax()) in range(281, 286)
    extractor = FrozenExtractor("tf_efficientnet_lite0", input_size=64)
    torch.testing.assert_close(extractor.net.state_dict()["conv_stem.weight"], net.state_dict()["conv_stem.weight"])


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_weights_from_a_file(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    state = timm.create_model("resnet18").state_dict()
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    extractor = FrozenExtractor("resnet18", input_size=64, weights=str(path))
    torch.testing.assert_close(extractor.net.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_unfitting_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(UsageError, match="--weights: no such file"):
        FrozenExtractor("resnet18", input_size=64, weights=str(path))
    path.write_text("no")
    with pytest.raises(UsageError, match="--weights: cannot read"):
        FrozenExtractor("resnet18", input_size=64, weights=str(path))
    torch.save(timm.create_model("resnet34").state_dict(), path)
    with pytest.raises(UsageError, match="does not fit --extractor resnet50: "):
        FrozenExtractor("resnet50", input_size=64, weights=str(path))


def test_no_network_and_no_weights_names_three_ways(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://nowhere.invalid")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        FrozenExtractor("convnextv2_atto", input_size=64)
    for way in ("--weights FILE", "tf_efficientnet_lite0", "network"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_names_and_sizes() -> None:
    with pytest.raises(UsageError, match="--extractor: 'resnet0' is no timm model with feature maps; choose"):
        FrozenExtractor("resnet0", input_size=64)
    with pytest.raises(UsageError, match="--input-size: expected a multiple of 16"):
        FrozenExtractor("vit_tiny_patch16_224", input_size=65, pretrained=False)
