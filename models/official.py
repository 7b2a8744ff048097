"""Reads checkpoints of the released code (method section 7) into a `VQFlow`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from default import ModelConfig, UsageError
from models.vqflow import VQFlow
from utils.run.checkpoint import first_broken, read_checkpoint

PARTS = (
    "parallel_flows", "fusion_flow", "semantic_encoder", "semantic_mlp", "upsamplers", "feature_mlps",
    "cspc_quantizers", "cpc_quantizer", "sigma_mu_generators",
)  # fmt: skip


def is_official(checkpoint: object) -> bool:
    """Whether a loaded file is a checkpoint of the released code."""
    return isinstance(checkpoint, Mapping) and "parallel_flows" in checkpoint and "fusion_flow" in checkpoint


def official_config(options: Mapping[str, Any]) -> ModelConfig:
    """Our configuration for the released code's options, with the released objective and codebooks.

    `c_conds` is not read: the released code overwrites it with the condition's full size.
    """
    known = {
        name: options[name]
        for name in (
            "pool_type",
            "quantize_enable",
            "quantize_type",
            "concat_pos",
            "mixed_gaussian",
            "k_cpc",
            "k_cspc",
            "dim_cpc",
        )
        if name in options
    }
    for name in ("c_pos_conds", "parallel_blocks"):
        if name in options:
            value = options[name]
            known[name] = (value,) if isinstance(value, int) else tuple(value)
    if "clamp_alpha" in options:
        known["clamp"] = float(options["clamp_alpha"])
    return ModelConfig(
        **known, pattern_quantize=not options.get("no_pattern_quantize", False),
        objective="released", codebooks="released", standardize=False,
    )  # fmt: skip


def load_official(
    checkpoint: Mapping[str, Any] | str | Path,
    config: Mapping[str, Any] | ModelConfig,
    channels: Sequence[int],
    *,
    name: str = "the checkpoint",
) -> VQFlow:
    """The `VQFlow` of an official checkpoint, in eval mode, bare of an extractor, with the released objective.

    Args:
        checkpoint: the loaded dictionary, or its file.
        config: the options it was trained with, as the released code names them (or a `ModelConfig`).
        channels: the extractor's four levels of channels.
        name: what errors call a loaded dictionary.

    Raises:
        UsageError: not an official checkpoint, or one of other sizes than `config` and `channels` say.
    """
    if isinstance(checkpoint, (str, Path)):
        name, checkpoint = str(checkpoint), read_checkpoint(checkpoint)
    if not is_official(checkpoint):
        raise UsageError(f"{name}: not a checkpoint of the released code (expected the parts {', '.join(PARTS)})")
    model = VQFlow(config if isinstance(config, ModelConfig) else official_config(config), channels)
    try:
        state = converted(checkpoint, channels)
    except (KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"{name}: not a whole checkpoint of the released code (expected the parts {', '.join(PARTS)})"
        ) from error
    if model.prior is None:  # the released code saves the generators of the mixture whether it uses them or not
        state = {k: v for k, v in state.items() if not k.startswith("prior.")}
    load_strictly(model, state, name)
    return model.eval()


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load `state`; names and shapes must all agree, and values be finite.

    Raises:
        UsageError: naming the first tensor that is missing, left over or of another shape, or holds NaN or infinity.
    """
    refuse_misfit(model.state_dict(), state, name)
    broken = first_broken(state)
    if broken is not None:
        raise UsageError(f"{name}: {broken} holds NaN or infinity: the training that wrote it had diverged")
    model.load_state_dict(state)


def refuse_misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> None:
    """Raise `UsageError`, naming the tensor, unless `state` has the names and shapes of `own`."""
    for key in [*own, *state]:
        if key not in state or key not in own:
            where = "lacks" if key not in state else "has, but the model does not have,"
            raise UsageError(f"{name}: made with other options than asked for: it {where} {key}")
        if state[key].shape != own[key].shape:
            raise UsageError(
                f"{name}: made with other options than asked for: {key} is {tuple(state[key].shape)}, "
                f"expected {tuple(own[key].shape)}"
            )


def converted(checkpoint: Mapping[str, Any], channels: Sequence[int]) -> dict[str, Tensor]:
    """The official parts under our names."""
    state: dict[str, Tensor] = {}
    for part in ("semantic_encoder", "semantic_mlp", "feature_mlps"):
        state |= {f"hierarchy.{part}.{k}": v for k, v in _flat(checkpoint[part]).items()}
    for key, value in _flat(checkpoint["upsamplers"]).items():
        level, _, name = key.split(".")
        state[f"hierarchy.upsamplers.{level}.{name}"] = value
    for key, value in _flat(checkpoint["parallel_flows"]).items():
        state["level_flows." + key.replace("module_list", "blocks")] = value
    state |= _fusion(_flat(checkpoint["fusion_flow"]), channels)
    state |= {f"hierarchy.cpc.{k}": v for k, v in _codebook(_flat(checkpoint.get("cpc_quantizer"))).items()}
    state |= {f"hierarchy.cspc.{k}": v for k, v in _codebook(_flat(checkpoint.get("cspc_quantizers"))).items()}
    swapped = {"sigma": "shift", "mu": "scale"}  # the released names are swapped
    for key, value in _flat(checkpoint.get("sigma_mu_generators")).items():
        level, kind, name = key.split(".")
        state[f"prior.{swapped[kind]}.{level}.{name}"] = value
    for number, c in enumerate(channels):
        state |= {f"mean_{number}": torch.zeros(c), f"std_{number}": torch.ones(c)}
    return state


def _flat(part: Any) -> dict[str, Tensor]:
    """A state dictionary, or a list or dictionary of them, with dotted names."""
    if part is None or isinstance(part, Tensor):
        return {}
    pairs = part.items() if isinstance(part, Mapping) else enumerate(part)
    flat: dict[str, Tensor] = {}
    for key, value in pairs:
        flat |= {str(key): value} if isinstance(value, Tensor) else {f"{key}.{k}": v for k, v in _flat(value).items()}
    return flat


def _codebook(part: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official codes are columns, ours are rows."""
    return {k: v.T.contiguous() if k.split(".")[-1] in ("embed", "embed_avg") else v for k, v in part.items()}


def _fusion(part: dict[str, Tensor], channels: Sequence[int]) -> dict[str, Tensor]:
    """The coupling's nets, and the permutations by their length: their index varies from run to run."""
    state: dict[str, Tensor] = {}
    for key, value in part.items():
        name = key.split(".", 2)[2]
        if name.startswith("subnet"):
            state["fusion." + name.replace("cross_convs.", "")] = value
        elif name == "perm" and len(value) in channels[:3]:
            state[f"fusion.perm_{list(channels).index(len(value))}"] = value
    return state
