"""Ways to save time and memory change no result: accumulation, recomputation, layouts, compiled code, precision."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from datasets.features import FeatureBatch
from default import ModelConfig, TrainConfig, UsageError
from fake_data import METHOD, TINY, make_mvtec
from main import main
from models.codebook import Codebook
from models.flow import Permutation
from models.loss import loss_terms
from models.vqflow import VQFlow
from steps import Ledger, Tally, train_epoch, training_steps
from utils.run.device import autocast, check_compiler, exact_products, has_bfloat16
from utils.run.profile import traced
from utils.run.seed import seed_everything

CHANNELS = (4, 6, 8, 10)
CPU = torch.device("cpu")
METHODS = {
    "residual": {"quantize_enable": True, "concat_pos": True, "mixed_gaussian": True},
    "none": {"concat_pos": True, "mixed_gaussian": True},
}


def build(mode: str = "residual", dtype: torch.dtype = torch.float32, **options: object) -> VQFlow:
    seed_everything(0)
    config = ModelConfig(dim_cpc=8, k_cpc=4, k_cspc=6, c_pos_conds=(4,), parallel_blocks=(1, 2, 1), **METHODS[mode])
    return VQFlow(config, CHANNELS, **options).to(dtype).train()  # type: ignore[arg-type]


def features(batch: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(batch, c, s, s, dtype=dtype) for c, s in zip(CHANNELS, (8, 4, 2, 2), strict=True)]


def outcome(model: VQFlow, pooled: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, latents and all gradients of one step."""
    output = model(pooled)
    loss = loss_terms(output, 1.0).total
    loss.backward()
    values = {f"latent {i}": z.detach() for i, z in enumerate(output.latents)} | {"loss": loss.detach()}
    return values | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], relative: float) -> None:
    assert a.keys() == b.keys()
    floor = 1e-2 * max(float(v.abs().max()) for v in b.values())
    for name, value in b.items():
        assert (a[name] - value).abs().max() <= relative * value.abs().max().clamp(min=floor), name


@pytest.mark.parametrize("mode", METHODS)
def test_recomputed_equals_kept(mode: str) -> None:
    plain, again = build(mode), build(mode, recompute=True)
    assert_same(outcome(again, features()), outcome(plain, features()), 1e-6)
    for (name, a), b in zip(plain.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b), name  # the codebooks moved once


def test_backward_frees_the_largest_maps_first() -> None:
    """Before gradients of the wide coarse levels are there: that is less at the peak."""
    model, order = build(), list[int]()
    for level, flow in enumerate(model.level_flows):
        flow.blocks[0].subnet.conv1.weight.register_hook(lambda _, level=level: order.append(level))
    outcome(model, features())
    assert order == [0, 1, 2]


def test_recomputing_keeps_less() -> None:
    kept: list[int] = []
    for recompute in (False, True):
        sizes: list[int] = []

        def pack(x: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model = build(recompute=recompute)
            model.level_flows[1](features(batch=64)[1], condition_of(model), recompute=recompute)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def condition_of(model: VQFlow):
    with torch.no_grad():
        return model.hierarchy(model.standardize(features(batch=64))).maps[1]


def test_channels_last_agrees() -> None:
    plain, last = build(), build().to(memory_format=torch.channels_last)
    pooled = [f.contiguous(memory_format=torch.channels_last) for f in features()]
    assert_same(outcome(last, pooled), outcome(plain, features()), 1e-5)
    block = last.level_flows[1].blocks[0]
    z, _ = block(pooled[1], condition_of_three(last))
    assert z.is_contiguous(memory_format=torch.channels_last)
    grad = block.subnet.conv1.weight.grad
    assert grad.is_contiguous(memory_format=torch.channels_last)


def condition_of_three(model: VQFlow):
    with torch.no_grad():
        return model.hierarchy(model.standardize(features())).maps[1]


def test_checkpoints_do_not_depend_on_the_layout(tmp_path: Path) -> None:
    last = build().to(memory_format=torch.channels_last)
    torch.save(last.state_dict(), tmp_path / "m.pt")
    plain = build()
    plain.load_state_dict(torch.load(tmp_path / "m.pt", weights_only=True))
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)


def test_permutation_and_its_gradient() -> None:
    order = torch.tensor([2, 0, 3, 4, 1])  # not its own inverse
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(Permutation.apply(x, order), x[:, order])
    assert torch.autograd.gradcheck(lambda v: Permutation.apply(v, order), x)


def batch(pooled: list[torch.Tensor]) -> FeatureBatch:
    count = len(pooled[0])
    zeros = torch.zeros(count, dtype=torch.long)
    return FeatureBatch(features=pooled, mask=zeros, label=zeros, class_index=zeros, path=("",) * count)


def trained(parts: list[list[torch.Tensor]], accumulate: int) -> tuple[VQFlow, float, int]:
    model = build("none", torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    config = TrainConfig(accumulate=accumulate, schedule="constant", warmup=0.0, lr=1e-3)
    stats = train_epoch(model, map(batch, parts), optimizer, config, start=0.0, step=1.0 / len(parts))
    return model, stats.loss, stats.images


def test_an_epoch_takes_the_time_of_its_steps() -> None:
    """Without what passes between them: a checkpoint may be written there."""
    model, tally, part = build("none"), Tally(), batch(features(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    began, waited = time.perf_counter(), 0.0
    steps = training_steps(model, [part] * 2, optimizer, TrainConfig(), start=0.0, step=0.5, ledger=Ledger(tally))
    for _ in steps:
        before = time.perf_counter()
        time.sleep(0.2)
        waited += time.perf_counter() - before
    assert 0 < tally.seconds <= time.perf_counter() - began - waited


def test_accumulated_batches_equal_the_big_one() -> None:
    """Where the batch norms see the same statistics: two equal parts, and the batch that holds both."""
    part = features(4, dtype=torch.float64)
    joined = [torch.cat([f, f]) for f in part]
    (small, loss, count), (big, expected, total) = trained([part, part], 2), trained([joined], 1)
    assert loss == pytest.approx(expected, rel=1e-10)
    assert count == total == 8
    for (name, a), b in zip(small.named_parameters(), big.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=name)


def test_a_last_smaller_group_is_a_step_of_its_own_mean() -> None:
    part = features(4, dtype=torch.float64)
    three, (plain, _, _) = trained([part, part, part], 2)[0], trained([part, part], 1)
    for a, b in zip(three.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_bfloat16_keeps_sums_and_determinants_in_float32() -> None:
    model, exact = build(), build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(features())
    assert {z.dtype for z in output.latents} == {torch.float32}
    assert {output.log_det.dtype, output.commitment.dtype, output.nll.dtype} == {torch.float32}
    assert {j.dtype for j in output.local_log_det} == {torch.float32}
    loss_terms(output, 1.0).total.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    torch.testing.assert_close(output.nll, exact(features()).nll, rtol=0.05, atol=1.0)


def test_autocast_only_where_it_is_native() -> None:
    with autocast(CPU, True):
        native = torch.is_autocast_enabled("cpu")
    assert native == has_bfloat16(CPU)


def compiler() -> bool:
    try:
        check_compiler(CPU)
    except UsageError:
        return False
    return True


def test_compiled_equals_eager() -> None:
    if not compiler():
        pytest.skip("PyTorch finds no C++ compiler on this machine")
    plain, compiled = build(), build()
    compiled.compile_flows()
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert_same(outcome(compiled, features()), outcome(plain, features()), 1e-5)


def test_without_a_compiler_the_error_is_one_line(tmp_path: Path) -> None:
    make_mvtec(tmp_path / "data", classes=("bottle",))
    argv = [*TINY, *METHOD, "--dataset", "folder", "--data-path", str(tmp_path / "data"), "--work-dir", str(tmp_path)]
    environment = os.environ | {
        "CXX": "no-such-compiler", "PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
    }  # fmt: skip
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "main.py", *argv, "--compile"], cwd=root, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--compile: needs a C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr


def test_traces_as_many_steps_as_there_are(tmp_path: Path) -> None:
    seen = [torch.ones(2).add(b) for b in traced([1, 2, 3], 2, tmp_path / "a.json")]
    assert len(seen) == 3
    assert list(traced([1], 5, tmp_path / "b.json")) == [1]
    for name in ("a.json", "b.json"):
        assert json.loads((tmp_path / name).read_text(encoding="utf-8"))["traceEvents"]


def test_all_at_once_on_the_command_line(tmp_path: Path) -> None:
    make_mvtec(tmp_path / "data", classes=("bottle",), train=8)
    argv = [*TINY, *METHOD, "--dataset", "folder", "--data-path", str(tmp_path / "data"), "--work-dir", str(tmp_path)]
    extra = ["--profile", "1", "--accumulate", "2", "--checkpoint-activations", "--amp-enable", "--cache", "ram"]
    assert main([*argv, *extra, *(["--compile"] if shutil.which("g++") else [])]) == 0
    assert len(list(tmp_path.glob("folder-*/trace.json"))) == 1


def test_what_is_nearest_is_sought_in_full_precision() -> None:
    """Neither TensorFloat-32 nor bfloat16: both have too few bits to tell distances apart."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with exact_products(torch.device("cuda")):
            assert not matmul.allow_tf32
        assert matmul.allow_tf32
        with pytest.raises(ZeroDivisionError), exact_products(torch.device("cuda")):
            raise ZeroDivisionError
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
    torch.manual_seed(0)
    book, inputs = Codebook(codes=300, dim=64), torch.randn(500, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(book.nearest(inputs), torch.cdist(inputs.double(), book.embed.double()).argmin(1))
