"""What costs on a GPU, counted without one: waiting for it, memory that backward needs, code compiled again."""

import csv
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.features import FeatureBatch, prefetched
from fake_data import METHOD, TINY, make_mvtec
from main import main, parse
from models.flow import ChannelNorm, normalize
from models.footprint import training_bytes
from models.fusion import averaged
from models.loss import loss_terms
from models.vqflow import pool_features
from stage import Stage
from steps import Ledger, Tally, take_step, training_steps
from tests.test_speed import batch, build, features
from tests.test_stop import CONFIG, spoiled
from tests.test_training import Rows, small_detector
from utils.run.device import autocast, choose_kernels, has_bfloat16

ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default", "is_nonzero")


class Waits(TorchDispatchMode):
    """Counts calls whose tensors lie on several devices, and those whose result has to be read by the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), str(func)
        devices = {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 or any(word in name for word in ASKS):
            self.found[name] += 1
        return out


@pytest.mark.parametrize(("mode", "recompute"), [("residual", False), ("none", True)])
def test_forward_and_backward_neither_copy_nor_ask(mode: str, recompute: bool) -> None:
    """The device "meta" stands for one that is not the host. The first forward brings the position encodings there."""
    model, rows = build(mode, recompute=recompute).to("meta"), [f.to("meta") for f in features()]
    counts = []
    for _ in range(2):
        with Waits() as waits:
            loss_terms(model(rows, noise=0.1), 1.0).total.backward()
        counts.append(waits.found)
    assert counts[0].keys() <= {"aten._to_copy.default"} and counts[0].total() <= 4
    assert counts[1] == {}


@pytest.mark.parametrize(("wait", "questions"), [(False, 0), (True, 1)])
def test_a_step_asks_only_where_waiting_is_free(wait: bool, questions: int) -> None:
    flow = small_detector().flow.train()
    optimizer = torch.optim.AdamW([p for p in flow.parameters() if p.requires_grad], fused=True)
    batches = list(Rows(8)())
    with Waits() as waits:
        take_step(flow, batches, optimizer, CONFIG.train, wait=wait)
    assert waits.found.total() == questions


def test_known_late_or_at_once_it_is_the_same() -> None:
    """Weights, codebooks, the optimizer's state, the tally and the dropped files, bit for bit."""
    batches, original = list(Rows(20)()), small_detector().flow
    fed = [batches[0], spoiled(batches[1], float("nan")), *batches[2:4], spoiled(batches[4], float("inf"))]
    seen = []
    for late in (0, 1):
        flow, tally = deepcopy(original), Tally()
        optimizer = torch.optim.AdamW([p for p in flow.parameters() if p.requires_grad], fused=True)
        ledger, found, counts = Ledger(tally, late), [], []
        torch.manual_seed(2)
        for _ in training_steps(flow, fed, optimizer, CONFIG.train, start=0.0, step=0.1, ledger=ledger):
            found += ledger.known()
            counts.append(len(found))
        found += ledger.known(everything=True)
        assert counts == [n - late for n in (1, 2, 3, 4, 5)]
        assert ledger.known(everything=True) == []
        assert (tally.batches, tally.counted, tally.images) == (5, 3, 12)
        tally.seconds = 0.0
        states = [v for state in optimizer.state.values() for v in state.values()]
        seen.append((found, tally, [*flow.state_dict().values(), *states]))
    (found, tally, tensors), (later, same, others) = seen
    assert found == later == [(), batches[1].path, (), (), batches[4].path]
    assert tally == same
    assert len(tensors) == len(others) and all(map(torch.equal, tensors, others))


# --- memory


def saved_bytes(amp: bool) -> int:
    """Of numbers that a forward in training keeps for backward, beside parameters, buffers and indices."""
    model, seen = build().to(memory_format=torch.channels_last), {}
    own = {v.untyped_storage().data_ptr() for v in [*model.parameters(), *model.buffers()]}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own and x.is_floating_point():
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage()  # alive, so that its place is not used again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, amp):
        loss_terms(model(features(batch=16)), 1.0).total.backward()
    return sum(storage.nbytes() for storage in seen.values())


def test_bfloat16_keeps_less() -> None:
    assert saved_bytes(True) < 0.75 * saved_bytes(False)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_norms_take_their_statistics_in_single_precision(kind: torch.dtype) -> None:
    """Of channels whose mean is far from zero, where bfloat16 would lose the deviation."""
    torch.manual_seed(0)
    x, norm = (100 + torch.randn(2, 64, 3, 3)).to(kind), ChannelNorm(64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
        norm.bias.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        found = normalize(x, norm.weight, norm.bias, norm.eps)
        assert torch.equal(found, norm(x))
    assert found.dtype == kind
    far = x.double() - x.double().mean(1, keepdim=True)
    scaled = far / (far.square().mean(1, keepdim=True) + norm.eps).sqrt()
    expected = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert (found - expected).abs().max() < (0.02 if kind == torch.bfloat16 else 1e-4)


def test_what_training_takes_is_known_beforehand() -> None:
    """Found out on a device without content, it is what the same steps keep here."""
    shapes = [level.shape[1:] for level in features()]
    model, needs = build(), {n: training_bytes(build().to("meta"), shapes, n) for n in (8, 16)}
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert needs[16] - 4 * weights >= 2 * saved_bytes(False)
    assert needs[16] - needs[8] > 0.9 * (needs[8] - 4 * weights), "it grows with the batch"
    less = training_bytes(build(recompute=True).to("meta"), shapes, 16)
    assert 4 * weights < less < 0.9 * needs[16]


# --- order


class Streams:
    """Stands in for CUDA's streams, which this machine may not have, and notes who waits for whom and when."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.names = {"side": self.stream("side"), "main": self.stream("main")}
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.names["side"])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.names["main"])
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=name, wait_stream=lambda other: self.told.append(f"{name} waits for {other.name}"))


def test_reading_ahead_waits_for_what_was_asked_before(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams(monkeypatch)

    def reading() -> Iterator[FeatureBatch]:
        for _ in range(2):
            streams.told.append("read")
            yield batch(features())

    for _ in prefetched(reading(), torch.device("cuda")):
        streams.told.append("work")
    before, after = "side waits for main", "main waits for side"
    assert streams.told == [before, "read", after, before, "read", "work", after, before, "work"]


def test_kernels_that_add_in_the_same_order() -> None:
    torch.manual_seed(0)
    x, found = torch.randn(2, 3, 8, 12, dtype=torch.float64, requires_grad=True), []
    try:
        for deterministic in (False, True):
            choose_kernels(deterministic)
            assert torch.backends.cudnn.benchmark is not deterministic
            assert torch.backends.cudnn.deterministic is deterministic is torch.are_deterministic_algorithms_enabled()
            outs = [averaged(x, size) for size in ((4, 4), (3, 5))]
            found.append([*outs, *torch.autograd.grad(outs[0].square().sum(), x)])
            assert ("Adaptive" not in str(outs[0].grad_fn)) is deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
    finally:
        choose_kernels(False)
        torch.backends.cudnn.benchmark = False
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# --- compiled code


def test_no_batch_compiles_again_and_none_runs_uncompiled() -> None:
    """Training and evaluation with full and smaller batches; one image alone is a case of its own to PyTorch."""
    import torch._dynamo as compiler
    from torch._dynamo.testing import CompileCounter

    compiler.reset()
    counter, model = CompileCounter(), build().to(memory_format=torch.channels_last)
    model.compile_flows(backend=counter)

    def run(training: bool, batch: int) -> int:
        """New variants that it takes."""
        before, pooled = counter.frame_count, [f.to(memory_format=torch.channels_last) for f in features(batch)]
        with torch.set_grad_enabled(training):
            loss = loss_terms(model.train(training)(pooled), 1.0).total
        if training:
            loss.backward()
        return counter.frame_count - before

    levels = 3
    with compiler.config.patch(fail_on_recompile_limit_hit=True):
        first = [run(True, 8), run(False, 8), run(False, 1)]
        assert first == [2 * levels + 1, 2 * levels, 2 * levels]
        assert [run(training, batch) for training in (True, False) for batch in (8, 5, 3)] == [0] * 6
        assert [run(*work) for work in [(False, 1), (False, 6), (True, 2)]] == [0] * 3
    compiler.reset()


# --- precision


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this machine computes no bfloat16")
def test_features_are_pooled_in_single_precision(tmp_path: Path) -> None:
    words = "--amp-enable --pool-type avg --extractor test_efficientnet --no-pretrained --device cpu --dataset mvtec"
    stage = Stage(parse([*TINY, *METHOD, *words.split(), "--work-dir", str(tmp_path)])[0])
    side = stage.config.data.input_size
    image = torch.rand(2, 3, side, side).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), autocast(stage.device, True):
        levels = stage.extractor(image)
    assert levels[0].dtype == torch.bfloat16
    strides = stage.extractor.strides
    exact = pool_features([level.float() for level in levels], strides, "avg")
    rounded = pool_features(levels, strides, "avg")
    for found, expected in zip(stage.extract(image), exact, strict=True):
        assert torch.equal(found, expected.half().float())
    assert not torch.equal(rounded[0].float(), exact[0])


@pytest.mark.skipif(not has_bfloat16(torch.device("cpu")), reason="this machine computes no bfloat16")
def test_a_model_trained_in_bfloat16_judges_alike_in_both_precisions(tmp_path: Path) -> None:
    """With all opinions: flow, context and memory."""
    make_mvtec(tmp_path / "data")
    opinions = "--memory 6 --context 1 --semantics pooled --holdout 0.3 --image-score surprise --amp-enable"
    place = ["--dataset", "mvtec", "--data-path", str(tmp_path / "data"), "--class-names", "bottle", "grid"]
    assert main([*TINY, *METHOD, *place, *opinions.split(), "--work-dir", str(tmp_path / "run")]) == 0
    (folder,) = (p for p in (tmp_path / "run").iterdir() if p.name != "cache")
    judged = []
    for flag in ("--amp-enable", "--no-amp-enable"):
        work = tmp_path / flag
        assert main(["--mode", "test", "--eval_ckpt", str(folder), "--work-dir", str(work), flag]) == 0
        (table,) = work.rglob("scores.csv")
        with table.open(encoding="utf-8", newline="") as file:
            judged.append(torch.tensor([float(row["score"]) for row in csv.DictReader(file)]))
    assert not torch.equal(*judged)
    assert (judged[0] - judged[1]).abs().max() < 0.05 * judged[1].abs().max()
