"""The frozen extractor: levels of any timm model, weights from files and from the package, clear errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import skimage.data
import timm
import torch
from huggingface_hub import constants
from PIL import Image

from default import UsageError
from fake_data import load_image
from models.extractor import IMAGENET, PACKAGED, FrozenExtractor, packaged_weights

SMALL = "test_resnet"  # timm's own miniature for tests


def random(name: str, size: int = 64) -> FrozenExtractor:
    return FrozenExtractor(name, input_size=size, pretrained=False)


def full(name: str = SMALL, **options: object) -> dict[str, torch.Tensor]:
    """Random weights of the whole timm model, classifier included."""
    torch.manual_seed(3)
    return timm.create_model(name, pretrained=False, **options).state_dict()


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("convnextv2_atto", (40, 80, 160, 320)),
        ("resnet18", (64, 128, 256, 512)),
        ("resnet34", (64, 128, 256, 512)),
        ("resnext50_32x4d", (256, 512, 1024, 2048)),
        ("wide_resnet50_2", (256, 512, 1024, 2048)),
        (PACKAGED, (24, 40, 112, 320)),
        ("test_convnext", (24, 32, 48, 64)),
    ],
)
def test_convolutional_nets_give_strides_4_to_32(name: str, channels: tuple[int, ...]) -> None:
    extractor = random(name)
    assert (extractor.channels, extractor.strides) == (channels, (4, 8, 16, 32))
    maps = extractor(torch.randn(1, 3, 64, 64))
    assert [m.shape for m in maps] == [(1, c, 64 // s, 64 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]


def test_channels_last_models_are_turned() -> None:
    maps = random("swin_tiny_patch4_window7_224")(torch.randn(1, 3, 64, 64))
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 16, 16), (192, 8, 8), (384, 4, 4), (768, 2, 2)]


@pytest.mark.parametrize("size", [48, 80, 112])
def test_vision_transformer_levels_share_one_stride(size: int) -> None:
    extractor = random("test_vit", size)
    assert extractor.strides == (16,) * 4
    maps = extractor(torch.randn(2, 3, size, size))
    assert [m.shape for m in maps] == [(2, 64, size // 16, size // 16)] * 4
    assert not torch.equal(maps[0], maps[3]), "four different blocks"


def test_vision_transformer_levels_are_four_blocks_at_equal_distances() -> None:
    extractor, image = random("vit_tiny_patch16_224", 224), torch.rand(1, 3, 224, 224)
    full: Any = timm.create_model("vit_tiny_patch16_224", pretrained=False).eval()
    full.load_state_dict({k.removeprefix("model."): v for k, v in extractor.net.state_dict().items()}, strict=False)
    with torch.no_grad():
        blocks = full.forward_intermediates(image * 2 - 1, intermediates_only=True)  # all twelve
    for ours, number in zip(extractor(image), (2, 5, 8, 11), strict=True):
        torch.testing.assert_close(ours, blocks[number], rtol=1e-4, atol=1e-4)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(UsageError, match="--input-size: expected a multiple of 16 for 'test_vit', but got 50"):
        random("test_vit", 50)
    with pytest.raises(UsageError, match="--input-size: expected at least 32 for 'test_resnet', but got 31"):
        random(SMALL, 31)


def test_old_names_are_mapped_and_the_bare_name_means_what_the_released_code_means() -> None:
    with pytest.warns(UserWarning, match="deprecated model name"):
        assert random("vit_tiny_patch16_224_in21k").channels == (192,) * 4
    assert timm.get_pretrained_cfg("convnextv2_base").tag == "fcmae_ft_in22k_in1k"


@pytest.mark.parametrize("name", ["nope", "", "resnet18.nope", "a/b", "local-dir:/nowhere", "tf_efficientnet_lite9"])
def test_unknown_models_are_named_with_choices(name: str) -> None:
    with pytest.raises(UsageError, match=rf"--extractor: '{name}' is no timm model .* choose one such as \w+, \w+"):
        random(name)


def test_frozen_for_ever() -> None:
    extractor = random(SMALL).train()
    assert not any(module.training for module in extractor.modules())
    assert not any(p.requires_grad for p in extractor.parameters())
    before = {k: v.clone() for k, v in extractor.state_dict().items()}
    maps = extractor(torch.randn(2, 3, 64, 64, requires_grad=True))
    assert not any(m.requires_grad for m in maps)
    assert all(torch.equal(v, before[k]) for k, v in extractor.state_dict().items()), "batch statistics stay too"


def test_packaged_weights_are_imagenets(tmp_path: Path) -> None:
    """The classifier with the package's weights knows scikit-image's cat, and the extractor carries the same ones."""
    Image.fromarray(np.asarray(skimage.data.chelsea())).save(tmp_path / "cat.png")
    image = load_image(tmp_path / "cat.png", 224)[None]
    state = packaged_weights()
    assert state is not None
    classifier = timm.create_model(PACKAGED, pretrained=False).eval()
    classifier.load_state_dict(state)
    with torch.no_grad():
        assert int(classifier(2 * image - 1).argmax()) in (281, 282, 285), "tabby, tiger cat or Egyptian cat"
        expected = classifier.forward_intermediates(2 * image - 1, intermediates_only=True)[-4:]
    for ours, theirs in zip(FrozenExtractor(PACKAGED, input_size=224)(image), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["resnet18", PACKAGED, "test_vit", "convnextv2_atto"])
def test_normalization_is_the_models_own(name: str) -> None:
    own = timm.data.resolve_data_config({}, model=timm.create_model(name, pretrained=False))
    extractor = random(name)
    assert extractor.normalization == (own["mean"], own["std"])
    image = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(own[k])[None, :, None, None] for k in ("mean", "std"))
    for ours, theirs in zip(extractor(image), extractor.net((image - mean) / std), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_fingerprint_covers_the_normalization() -> None:
    torch.manual_seed(0)
    own = random(PACKAGED)
    torch.manual_seed(0)
    old = FrozenExtractor(PACKAGED, input_size=64, pretrained=False, normalization=IMAGENET)
    assert own.fingerprint(normalized=False) == old.fingerprint(normalized=False)
    assert own.fingerprint() != old.fingerprint()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize("wrap", ["bare", "state_dict", "without classifier", "other classes"])
def test_weights_from_files(tmp_path: Path, suffix: str, wrap: str) -> None:
    state = full(num_classes=7) if wrap == "other classes" else full()
    if wrap == "without classifier":
        state = {k: v for k, v in state.items() if not k.startswith("fc.")}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in state.items()}} if wrap == "state_dict" else state, path
        )
    own = FrozenExtractor(SMALL, input_size=64, weights=str(path)).net.state_dict()
    assert own
    assert all(torch.equal(value, state[key]) for key, value in own.items())


@pytest.mark.parametrize("name", ["test_convnext", "test_vit", "test_efficientnet"])
def test_a_missing_classifier_does_not_matter(tmp_path: Path, name: str) -> None:
    heads = timm.get_pretrained_cfg(name).classifier
    state = {k: v for k, v in full(name).items() if not k.startswith(heads)}
    torch.save(state, tmp_path / "w.pth")
    extractor = FrozenExtractor(name, input_size=64, weights=str(tmp_path / "w.pth"))
    stem = next(iter(extractor.net.state_dict().values()))
    assert any(torch.equal(stem, value) for value in state.values())


def bad_weights(folder: Path, case: str) -> Path:
    """A file that --weights has to refuse."""
    path, state = folder / "w.pth", full()
    if case == "missing":
        return path
    if case == "damaged safetensors":
        path = folder / "w.safetensors"
        safetensors.torch.save_file(state, path)
    elif case == "shape":
        state["conv1.0.weight"] = torch.zeros(1, 3, 3, 3)
    elif case == "lacks":
        del state["layer1.0.conv1.weight"]
    if path.suffix == ".pth":
        torch.save([1, 2] if case == "no dictionary" else {"epoch": 3} if case == "no tensors" else state, path)
    if case.startswith(("truncated", "damaged")):
        path.write_bytes(path.read_bytes()[:1000])
    if case == "text":
        path.write_text("weights")
    return path


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("missing", "no such file"),
        ("truncated", "cannot read .*truncated"),
        ("damaged safetensors", "cannot read"),
        ("text", "cannot read"),
        ("no dictionary", "holds no state dictionary"),
        ("no tensors", "holds no state dictionary"),
        ("lacks", "does not fit --extractor test_resnet: it lacks layer1.0.conv1.weight"),
        ("shape", r"does not fit --extractor test_resnet: conv1.0.weight is \(1, 3, 3, 3\), not \("),
    ],
)
def test_bad_weight_files_are_named(tmp_path: Path, case: str, text: str) -> None:
    path = bad_weights(tmp_path, case)
    with pytest.raises(UsageError, match=text) as caught:
        FrozenExtractor(SMALL, input_size=64, weights=str(path))
    assert str(caught.value).startswith("--weights: ")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_network_and_no_weights_names_the_three_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://nowhere.invalid")  # a name that never resolves (RFC 2606)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UsageError, match="--extractor: no weights for 'resnet18'") as caught:
        FrozenExtractor("resnet18", input_size=64)
    for way in ("--weights FILE (.safetensors, .pth, .bin)", "--extractor tf_efficientnet_lite0", "network"):
        assert way in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fingerprints_tell_weights_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first, second = random(SMALL).fingerprint(), random(SMALL).fingerprint()
    assert first != second
    torch.manual_seed(0)
    assert random(SMALL).fingerprint() == first
