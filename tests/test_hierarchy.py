"""Concepts and patterns: placed in the data, a batch of one, nothing copied to the device."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from default import ModelConfig
from models.hierarchy import position_encoding
from models.loss import loss_terms
from models.vqflow import VQFlow
from utils.run.seed import seed_everything

CHANNELS = (4, 6, 8, 10)
MODES = {
    "residual": {"quantize_enable": True, "quantize_type": "residual"},
    "naive": {"quantize_enable": True, "quantize_type": "naive"},
    "concept": {"quantize_enable": True, "pattern_quantize": False},
    "none": {},
}


def build(mode: str = "residual", **options: Any) -> VQFlow:
    seed_everything(0)
    config: dict[str, Any] = {
        "dim_cpc": 8, "k_cpc": 3, "k_cspc": 12, "c_pos_conds": (4,), "parallel_blocks": (1, 2, 1), "concat_pos": True,
        "mixed_gaussian": True,
    }  # fmt: skip
    return VQFlow(ModelConfig(**(config | MODES[mode] | options)), CHANNELS)


def features(batch: int, side: int = 64, seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(batch, c, -(-side // s), -(-side // s)) for c, s in zip(CHANNELS, (8, 16, 32, 32), strict=True)]


def gap(rows: torch.Tensor, codes: torch.Tensor) -> float:
    """Mean squared distance of each row to its nearest code, by brute force."""
    return float(torch.stack([(codes - row).square().sum(1).min() for row in rows]).mean())


@torch.no_grad()
def gaps(model: VQFlow, batches: list[list[torch.Tensor]]) -> dict[str, float]:
    """How far concepts and patterns are from their codes, worked out from the embeddings."""
    hierarchy, found = model.hierarchy, {}
    semantics = torch.cat([hierarchy.semantics(f[-1]) for f in batches])
    assert hierarchy.cpc is not None
    codes = hierarchy.cpc.embed
    found["cpc"] = gap(semantics, codes)
    concepts = torch.stack(
        [min(codes, key=lambda code, row=row: float((code - row).square().sum())) for row in semantics]
    )
    embedded = [torch.cat(level) for level in zip(*(hierarchy.embeddings(f) for f in batches), strict=True)]
    for level, book in enumerate(hierarchy.cspc):
        b, _, h, w = embedded[level].shape
        encoding = position_encoding(4, h, w).expand(b, -1, h, w)
        if hierarchy.quantize == "residual":
            spread = concepts[:, :, None, None].expand(-1, -1, h, w)
            wanted = embedded[level] - torch.cat([encoding, spread], 1)
        else:
            wanted = torch.cat([embedded[level], encoding], 1)
        found[f"cspc {level}"] = gap(wanted.permute(0, 2, 3, 1).reshape(b * h * w, -1), book.embed)
    return found


@pytest.mark.parametrize("mode", ["residual", "naive"])
def test_seeding_places_concepts_and_patterns_in_the_data(mode: str) -> None:
    """Three kinds of images, each the same everywhere but for its encoding: as many concepts, and few patterns."""
    model = build(mode, k_cspc=24).eval()
    kinds = [[3 * f.mean((2, 3), keepdim=True).expand_as(f) * 10 for f in features(1, seed=s)] for s in range(3)]
    batches = [[torch.cat(pair) for pair in zip(kinds[a], kinds[b], strict=True)] for a, b in ((0, 1), (2, 0))]
    before = gaps(model, batches)
    model.hierarchy.seed(batches)
    after = gaps(model, batches)
    assert before.keys() == after.keys() == {"cpc", *(f"cspc {level}" for level in range(4))}
    assert after["cpc"] < 1e-6
    for name, value in after.items():
        assert value < 0.2 * before[name], name


def test_seeding_takes_at_most_so_many_samples() -> None:
    """One place of each of two batches for two codes: both codes are places; means of more would not be."""
    model, batches = build("naive", k_cspc=2).eval(), [features(4), features(4, seed=2)]
    model.hierarchy.seed(batches, samples=2)
    for level, book in enumerate(model.hierarchy.cspc):
        embedded = torch.cat([model.hierarchy.embeddings(f)[level] for f in batches]).detach()
        places = model.hierarchy.pattern_input(embedded, torch.zeros(8, 8)).permute(0, 2, 3, 1).flatten(0, 2)
        assert gap(book.embed, places) < 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("amp", [False, True])
def test_a_batch_of_one_trains_and_is_evaluated(mode: str, side: int, amp: bool) -> None:
    """One concept, and one value per channel of the top level at 32 pixels."""
    model = build(mode).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
            loss = loss_terms(model(features(1, side)), 1.0).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert model.eval()(features(1, side)).log_det.isfinite().all()


class Crossings(TorchDispatchMode):
    """Counts operations that bring something from one device to another, which a GPU would wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        if len({x.device for x in tensors if x.ndim or x.device.type != "cpu"}) > 1:
            self.found.append(str(function))
        return out


@pytest.mark.parametrize("conditioning", ["structured", "direct"])
def test_a_training_step_copies_nothing_to_the_device(conditioning: str) -> None:
    """On a device without memory, where reading a value back is an error: only the first step brings encodings."""
    model = build(conditioning=conditioning).to("meta").train()
    pooled = [f.to("meta") for f in features(3)]
    position_encoding.cache_clear()
    counts = []
    for _ in range(2):
        with Crossings() as crossings:
            loss_terms(model(pooled), 1.0).total.backward()
        counts.append(len(crossings.found))
    assert counts == [3, 0]  # three sizes among the four levels


@pytest.mark.parametrize("mode", MODES)
def test_the_direct_form_is_handed_out_as_maps(mode: str) -> None:
    """The same conditions: by their parts, or as one map each."""
    sets = [build(mode, conditioning=form).eval().hierarchy(features(2)) for form in ("structured", "direct")]
    for parts, dense in zip(*(s.maps for s in sets), strict=True):
        assert dense.is_map and not parts.is_map
        torch.testing.assert_close(dense.map, parts.dense())


def test_encodings_are_the_same_objects_everywhere() -> None:
    model = build()
    with torch.inference_mode():
        position_encoding.cache_clear()
        first = model.hierarchy.encoding(torch.zeros(1, 4, 5, 6))
    assert model.hierarchy.encoding(torch.ones(2, 9, 5, 6)) is first
    assert not first.is_inference()
    assert first.shape == (4, 5, 6)
    assert model.hierarchy.encoding(torch.zeros(1, 4, 6, 5)).shape == (4, 6, 5)
    assert model.hierarchy.encoding(torch.zeros(1, 4, 5, 6, dtype=torch.float64)).dtype == torch.float64
    half = model.hierarchy.encoding(torch.zeros(1, 4, 5, 6, dtype=torch.bfloat16))
    assert half is first  # never less than single precision
