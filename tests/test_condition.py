"""Structured and direct conditioning: the same outputs and gradients, for all modes, borders and odd sizes."""

import pytest
import torch

from default import ModelConfig
from models.condition import CodePart, Condition, VectorPart
from models.conditioned import ConditionedConv2d
from models.vqflow import VQFlow
from utils.run.seed import seed_everything

CHANNELS = (4, 6, 8, 10)
MODES = {
    "residual": {"quantize_enable": True, "quantize_type": "residual"},
    "naive": {"quantize_enable": True, "quantize_type": "naive"},
    "concept": {"quantize_enable": True, "pattern_quantize": False},
    "none": {},
}


def build(conditioning: str, mode: str, concat_pos: bool, dtype: torch.dtype, **options: object) -> VQFlow:
    seed_everything(0)
    config = ModelConfig(
        dim_cpc=8, k_cpc=4, k_cspc=6, c_pos_conds=(4,), parallel_blocks=(1, 2, 1), mixed_gaussian=True,
        concat_pos=concat_pos, conditioning=conditioning, **MODES[mode], **options,
    )  # fmt: skip
    return VQFlow(config, CHANNELS).to(dtype).train()


def run(model: VQFlow, side: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    features = [
        torch.randn(3, c, -(-side // s), -(-side // s), dtype=dtype, requires_grad=True)
        for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    ]
    output = model.forward_features(features)
    (output.nll.mean() + output.commitment).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    gradients |= {f"features {i}": f.grad for i, f in enumerate(features)}
    return [*output.latents, output.log_det, output.commitment], gradients


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("concat_pos", [True, False])
@pytest.mark.parametrize("side", [64, 33, 90])
@pytest.mark.parametrize(("dtype", "out", "grad"), [(torch.float32, 1e-5, 1e-4), (torch.float64, 1e-10, 1e-10)])
def test_structured_equals_direct(
    mode: str, concat_pos: bool, side: int, dtype: torch.dtype, out: float, grad: float
) -> None:
    results = [run(build(kind, mode, concat_pos, dtype), side, dtype) for kind in ("structured", "direct")]
    for a, b in zip(results[0][0], results[1][0], strict=True):
        assert (a - b).abs().max() <= out * b.abs().max().clamp(min=1)
    # Biases before a batch norm have no gradient but rounding: compare those on the scale of the others.
    floor = 1e-2 * max(g.abs().max() for g in results[1][1].values())
    for name, b in results[1][1].items():
        a = results[0][1][name]
        assert (a - b).abs().max() <= grad * b.abs().max().clamp(min=floor), name


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (5, 7)])
@pytest.mark.parametrize("codes", [2, 50])
@pytest.mark.parametrize("record", [True, False])
def test_convolution_by_parts_at_all_borders(size: tuple[int, int], codes: int, record: bool) -> None:
    torch.manual_seed(0)
    dtype, b, c = torch.float64, 2, 11
    indices, through = torch.randint(codes, (b, *size)), torch.randn(b, 3, *size, dtype=dtype)
    part = CodePart.make(indices, torch.randn(codes, 5, dtype=dtype), through, placed=True)
    condition = Condition(
        size=size,
        widths=(1, 4, 4, 2),
        codes=part,
        position=torch.randn(4, *size, dtype=dtype),
        position_piece=1,
        vectors=tuple(VectorPart(vector=torch.randn(b, v, dtype=dtype), piece=i) for i, v in ((1, 4), (2, 4), (3, 2))),
    )
    x, conv = torch.randn(b, 3, *size, dtype=dtype), ConditionedConv2d(3 + c, 6).to(dtype)
    with torch.set_grad_enabled(record):
        got = conv(x, condition)
    torch.testing.assert_close(got, conv(x, Condition.of_map(condition.dense())))


@pytest.mark.parametrize("mode", ["residual", "naive"])
def test_evaluation_follows_every_change_of_the_weights(mode: str) -> None:
    """Tables kept by an evaluation never survive a training step or a load."""
    model, reference = (build(kind, mode, True, torch.float32) for kind in ("structured", "direct"))
    torch.manual_seed(2)
    features = [torch.randn(2, c, 64 // s, 64 // s) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        model.forward_features(features).nll.mean().backward()
        optimizer.step()
        model.eval()
        reference.load_state_dict(model.state_dict())
        reference.eval()
        with torch.no_grad():
            for _ in range(2):
                a, b = model.forward_features(features).log_det, reference.forward_features(features).log_det
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
