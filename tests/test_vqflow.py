"""The whole model: shapes, gradients, modes, log-determinant, golden losses, parity with the released code."""

from pathlib import Path

import pytest
import torch

from default import ModelConfig, UsageError
from models.hierarchy import position_encoding
from models.loss import loss_terms
from models.official import load_official
from models.scorer import ScoreMaps, image_scores
from models.vqflow import ChannelStatistics, VQFlow, quantization_of
from utils.run.seed import seed_everything

CHANNELS = (4, 6, 8, 10)
SMALL = {"dim_cpc": 8, "k_cpc": 4, "k_cspc": 6, "c_pos_conds": (4,), "parallel_blocks": (1, 2, 1)}
MODES = {
    "residual": {"quantize_enable": True, "quantize_type": "residual"},
    "naive": {"quantize_enable": True, "quantize_type": "naive"},
    "concept": {"quantize_enable": True, "pattern_quantize": False},
    "none": {},
}


def build(mode: str = "residual", **options: object) -> VQFlow:
    seed_everything(0)
    return VQFlow(ModelConfig(**(SMALL | MODES[mode] | options)), CHANNELS)  # type: ignore[arg-type]


def features(side: int = 64, batch: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(batch, c, -(-side // s), -(-side // s)) for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("concat_pos", [True, False])
@pytest.mark.parametrize("mixed", [True, False])
def test_every_mode_trains_and_reaches_every_parameter(mode: str, concat_pos: bool, mixed: bool) -> None:
    model = build(mode, concat_pos=concat_pos, mixed_gaussian=mixed).train()
    assert quantization_of(model.config).kind == mode
    output = model(model.keep(features()))
    loss_terms(output, 1.0).total.backward()
    without = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.abs().sum() > 0)
    ]
    assert not without
    assert [z.shape for z in output.latents] == [(3, 4, 8, 8), (3, 6, 4, 4), (3, 8, 2, 2)]
    assert (output.concept is None) == (mode == "none")
    assert len(output.patterns) == (4 if mode in ("residual", "naive") else 0)


@pytest.mark.parametrize("side", [33, 50, 95])
@pytest.mark.parametrize("pool", ["avg", "max", "none"])
def test_odd_sizes_and_pools(side: int, pool: str) -> None:
    model = build(pool_type=pool, concat_pos=True, mixed_gaussian=True).eval()
    maps = ScoreMaps(model(model.keep(features(side))).latents, side)
    assert maps.mul.shape == (3, side, side)
    assert torch.isfinite(maps.likelihood).all()


def test_default_condition_has_1088_channels() -> None:
    with torch.device("meta"):
        model = VQFlow(ModelConfig(quantize_enable=True, concat_pos=True, mixed_gaussian=True), (128, 256, 512, 1024))
    assert model.hierarchy.condition_channels == (1088,) * 4
    assert [len(f.blocks) for f in model.level_flows] == [2, 5, 8]
    assert model.level_flows[0].blocks[0].subnet.conv1.weight.shape == (1152, 1152, 3, 3)


def test_projected_condition() -> None:
    model = build(concat_pos=True, c_conds=(5, 6, 7))
    assert model.hierarchy.condition_channels == (5, 6, 7, 7)
    assert model(model.keep(features())).log_det.shape == (3,)


def counted(batches: list[list[torch.Tensor]]) -> ChannelStatistics:
    statistics = ChannelStatistics(len(CHANNELS))
    for batch in batches:
        statistics.add(batch)
    return statistics


@pytest.mark.parametrize("standardize", [True, False])
def test_log_det_is_that_of_autograd(standardize: bool) -> None:
    """With the conditions held fixed, log_det is that of the map from pooled features to latents."""
    model = build("residual", concat_pos=True, mixed_gaussian=True).double().eval()
    pooled = [h.double() for h in model.keep(features(32, 1))]
    if standardize:
        model.set_statistics(counted([[h.repeat(2, 1, 2, 2) * torch.rand_like(h.repeat(2, 1, 2, 2)) for h in pooled]]))
    fixed = model.hierarchy(model.standardize(pooled))
    model.hierarchy.forward = lambda _: fixed  # type: ignore[method-assign]
    parts = [h.numel() for h in pooled[:3]]

    def latents(v: torch.Tensor) -> torch.Tensor:
        levels = [p.reshape(h.shape) for p, h in zip(v.split(parts), pooled, strict=False)]
        return torch.cat([z.flatten() for z in model([*levels, pooled[3]]).latents])

    start = torch.cat([h.flatten() for h in pooled[:3]])
    expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(latents, start))[1]
    output = model(pooled)
    torch.testing.assert_close(output.log_det[0], expected)
    torch.testing.assert_close(sum(j.sum((1, 2)) for j in output.local_log_det), output.log_det)


def test_statistics_standardize_the_features() -> None:
    model = build()
    pooled = [[h * 3 + 5 for h in model.keep(features())] for _ in range(3)]
    model.set_statistics(counted(pooled))
    for h in model.standardize(pooled[0]):
        torch.testing.assert_close(h.mean((0, 2, 3)), torch.zeros(h.shape[1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(h.var((0, 2, 3), unbiased=False), torch.ones(h.shape[1]), atol=1e-4, rtol=0)


def test_position_encoding_by_hand() -> None:
    encoding = position_encoding(8, 3, 5)
    frequency = [1.0, torch.tensor(1e4).pow(-0.5).item()]
    for row in range(3):
        for column in range(5):
            for i, f in enumerate(frequency):
                expected = [torch.tensor(p * f) for p in (column, row)]
                got = encoding[[2 * i, 2 * i + 1, 4 + 2 * i, 5 + 2 * i], row, column]
                want = torch.stack([expected[0].sin(), expected[0].cos(), expected[1].sin(), expected[1].cos()])
                torch.testing.assert_close(got, want)


def test_save_and_load_strictly(tmp_path: Path) -> None:
    model = build(concat_pos=True).eval()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    seed_everything(7)
    other = VQFlow(model.config, CHANNELS).eval()
    other.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    assert torch.equal(other(other.keep(features())).log_det, model(model.keep(features())).log_det)


def steps(model: VQFlow, count: int = 5) -> list[float]:
    """Losses of the first optimisation steps on fixed features."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(count):
        terms = loss_terms(model(model.keep(features())), 1.0)
        optimizer.zero_grad()
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        losses.append(terms.total.item())
    return losses


def test_same_seed_same_losses_bitwise() -> None:
    first, second = (steps(build(concat_pos=True, mixed_gaussian=True).train()) for _ in range(2))
    assert first == second
    assert first[-1] < first[0]


def test_golden_losses() -> None:
    """Guards refactorings: a change of these five numbers is a change of the method."""
    losses = steps(build(concat_pos=True, mixed_gaussian=True).train())
    assert losses == pytest.approx(GOLDEN, rel=1e-4)


GOLDEN = [50.7517, 36.7628, 25.0225, 14.7009, 5.22733]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", ["residual", "naive"])
def test_parity_with_the_released_model(name: str, parity: Path) -> None:
    record = torch.load(parity / f"{name}.pt", weights_only=True)
    model = load_official(record["checkpoint"], record["config"], record["channels"])
    with torch.no_grad():
        output = model(model.keep(record["features"]))
    maps, expected = ScoreMaps(output.latents, record["config"]["input_size"]), record["eval"]
    pairs = [*zip(output.latents, expected["z"], strict=True), (output.log_det, expected["log_det"])]
    pairs += [(output.commitment, expected["commitment"]), (output.nll, expected["nll_per_image"])]
    pairs += [(maps.add, expected["map_add"]), (maps.mul, expected["map_mul"])]
    pairs += [(image_scores(maps.mul, record["config"]["top_k"]), expected["score_mul"])]
    assert max(relative(a, b) for a, b in pairs) < 1e-4
    assert torch.bincount(output.concept, minlength=4).tolist() == expected["cpc_histogram"].tolist()

    model = load_official(record["checkpoint"], record["config"], record["channels"]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    for loss, tolerance in zip(record["train"]["losses"], (1e-4, 1e-2, 1e-2), strict=True):
        terms = loss_terms(model(model.keep(record["features"])), record["config"]["quantize_weight"])
        assert terms.total.item() == pytest.approx(loss, rel=tolerance)
        optimizer.zero_grad()
        terms.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    assert model.hierarchy.cpc is not None
    assert relative(model.hierarchy.cpc.embed.T, record["train"]["cpc_embed"]) < 1e-2


def test_official_checkpoint_of_other_sizes_is_refused(parity: Path) -> None:
    record = torch.load(parity / "residual.pt", weights_only=True)
    with pytest.raises(UsageError, match="made with other options"):
        load_official(record["checkpoint"], record["config"] | {"k_cspc": 17}, record["channels"])
    with pytest.raises(UsageError, match="not a checkpoint of the released code"):
        load_official({"epoch": 1}, record["config"], record["channels"])
