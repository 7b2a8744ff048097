"""What the fields of a checkpoint are: each is looked at before anything is made of it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from default import UsageError
from utils.run.upgrade import FORMAT, OLD

Rule = Callable[[Any], bool]
MOST_CODES = 1 << 20  # concepts that a model may have


def whole(value: Any, low: int = 0, high: int = (1 << 63) - 1) -> bool:
    return type(value) is int and low <= value <= high


def number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def text(value: Any) -> bool:
    return isinstance(value, str)


def class_name(value: Any) -> bool:
    """The name of one folder: files are looked for, and written, under it."""
    return text(value) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


def tensor(value: Any) -> bool:
    """Real numbers or truths."""
    return isinstance(value, torch.Tensor) and not (value.is_quantized or value.is_complex())


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def optional(of: Rule) -> Rule:
    return lambda value: value is None or of(value)


def several(of: Rule, low: int = 0, high: float = math.inf) -> Rule:
    """A list of such values, `low` to `high` of them."""
    return lambda v: isinstance(v, (list, tuple)) and low <= len(v) <= high and all(map(of, v))


def named(of: Rule, name: Rule = text) -> Rule:
    """A dictionary of such values."""
    return lambda v: isinstance(v, dict) and all(name(key) and of(inner) for key, inner in v.items())


def having(**parts: Rule) -> Rule:
    """A dictionary with these parts, perhaps among others."""
    return lambda v: isinstance(v, dict) and all(name in v and of(v[name]) for name, of in parts.items())


def holding(**parts: Rule) -> Rule:
    """A dictionary with some of these parts and no others."""
    return lambda v: isinstance(v, dict) and all(name in parts and parts[name](inner) for name, inner in v.items())


def exactly(**parts: Rule) -> Rule:
    """A dictionary with these parts and no others."""
    return lambda v: having(**parts)(v) and holding(**parts)(v)


def span(value: Any) -> bool:
    return several(number, 2, 2)(value) and value[0] < value[1]


def share(value: Any) -> bool:
    return number(value) and 0 < value <= 1


def spread(value: Any) -> bool:
    """Standard deviations of three channels."""
    return several(number, 3, 3)(value) and all(v > 0 for v in value)


def normalization(value: Any) -> bool:
    return several(several(number, 3, 3), 2, 2)(value) and spread(value[1])


def decision(value: Any) -> bool:
    """As many scores as peaks and concepts."""
    return lists_of_decision(value) and len({len(value[n]) for n in ("scores", "peaks", "concepts")}) == 1


def random_states(value: Any) -> bool:
    """Tried out on generators of their own."""
    if not isinstance(value, dict):
        return False
    try:
        version, words, position = value["python"]
        random.Random().setstate((version, tuple(words), position))
        kind, keys, index, has_gauss, gauss = value["numpy"]
        np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), index, has_gauss, gauss))
        torch.Generator().set_state(value["torch"])
        return several(tensor)(value["cuda"])
    except (LookupError, TypeError, ValueError, RuntimeError, OverflowError, AttributeError):
        return False


def optimizer_state(value: Any) -> bool:
    """AdamW's: numbers by which it steps, and for each parameter what it keeps of it."""
    return having(state=named(named(tensor), whole), param_groups=several(group, 1))(value)


lists_of_decision = having(
    scores=several(number, 1), peaks=several(number, 1), concepts=several(lambda c: whole(c, -1, MOST_CODES), 1),
    scoring=named(lambda v: text(v) or number(v)), unseen=flag,
)  # fmt: skip
group = having(
    lr=number, betas=several(number, 2, 2), eps=number, weight_decay=number, params=several(whole), amsgrad=flag,
    maximize=flag, foreach=optional(flag), capturable=flag, differentiable=flag, fused=optional(flag),
)  # fmt: skip
view = having(levels=several(lambda v: whole(v, 0, 3), 2, 2), places=lambda v: whole(v, 1), weight=number)
rule = holding(
    views=several(view, 1), nearest=lambda v: whole(v, 1), search=several(lambda v: whole(v, 1), 1), flow_weight=number,
    level_share=share, level_weight=number, level_limit=number, context_weights=several(number),
)  # fmt: skip
tally = exactly(batches=whole, counted=whole, images=whole, sums=several(number, 4, 4), seconds=number)
place = exactly(sub=whole, tally=tally, closing=flag, dropped=several(several(text)), streak=whole)
reading = holding(
    integers=optional(span), floats=optional(span), coarse=flag,
    background=lambda v: v is None or (text(v) and v in ("white", "black")),
)  # fmt: skip

JUDGED: dict[str, Rule] = {  # of any checkpoint
    "classes": several(class_name, 1), "normalization": normalization, "readings": named(reading),
    "decision": optional(decision),
}  # fmt: skip
OURS: dict[str, Rule] = JUDGED | {
    "config": named(named(lambda _: True)), "model": named(tensor), "extractor": text,
    "scorer": having(rule=rule, state=named(tensor)), "epoch": whole, "channels": several(whole),
    "images": named(having(count=whole, digest=text)), "place": place, "usage": named(tensor),
    "best_on_test": named(having(value=number, epoch=whole)), "optimizer": optimizer_state, "random": random_states,
}  # fmt: skip


def check_fields(content: Mapping[str, Any], what: str) -> None:
    """Look at the fields that a checkpoint has; which it must have is the matter of who reads it.

    Raises:
        UsageError: one of them is not what it should be; `what` starts the line.
    """
    ours = content.get("format") in (OLD, FORMAT)
    for name, fits in (OURS if ours else JUDGED).items():
        if name in content and not fits(content[name]):
            raise UsageError(f"{what}: its field {name!r} is not what a checkpoint has there")
