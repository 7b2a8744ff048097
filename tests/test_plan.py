"""--mode plan: what it counts against what is really there, and what it says."""

import json
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from count import Counted, count, filled, trained
from default import GPUS, Config
from main import main, parse
from models.codebook import Codebook
from models.extractor import FrozenExtractor
from models.hierarchy import position_encoding
from models.loss import loss_terms
from models.memory import Memory, View
from models.vqflow import VQFlow, pool_features
from models.work import KINDS, Work, hollow, messages
from plan import Plan, Rates, plan_of, sent, shares, timed
from utils.run.device import exact_products

SMALL = [
    "--mode", "plan", "--preset", "cpu", "--input-size", "64", "--extractor", "test_efficientnet", "--no-pretrained",
    "--dim-cpc", "8", "--k-cspc", "8", "--parallel-blocks", "1", "--images", "200", "--batch-size", "4",
]  # fmt: skip


def settings(*words: str) -> Config:
    return parse([*SMALL, *words])[0]


@pytest.fixture(scope="module")
def counted() -> Counted:
    return count(settings(), 4, 180)


@pytest.fixture(scope="module")
def real() -> tuple[VQFlow, FrozenExtractor, list[torch.Tensor]]:
    """The same model with content, and kept features of four images."""
    config = settings()
    extractor = FrozenExtractor("test_efficientnet", input_size=64, pretrained=False)
    flow = VQFlow(config.model, extractor.channels, extractor.strides)
    kept = pool_features(extractor(torch.rand(4, 3, 64, 64)), extractor.strides, config.model.kept_pool)
    return flow.to(memory_format=torch.channels_last), extractor, kept


def step(flow: VQFlow, kept: list[torch.Tensor]) -> None:
    flow.zero_grad(set_to_none=True)
    loss_terms(flow.train()(kept, noise=0.3), 1.0).total.backward()


# --- what is counted


def test_products_are_those_of_pytorchs_own_counter(counted: Counted, real: tuple) -> None:
    flow, extractor, kept = real
    with FlopCounterMode(display=False) as counter:
        step(flow, kept)
    assert counted.step.flops == counter.get_total_flops() > 0
    with FlopCounterMode(display=False) as counter:
        extractor(torch.rand(4, 3, 64, 64))
    assert counted.extraction.flops == counter.get_total_flops() > 0


def test_memory_is_that_of_a_real_step(counted: Counted, real: tuple) -> None:
    flow, extractor, kept = real
    optimizer = torch.optim.AdamW(flow.parameters(), fused=True)
    step(flow, kept)
    optimizer.step()
    gradients = sum(p.grad.nbytes for p in flow.parameters() if p.grad is not None)
    moments = sum(v.nbytes for state in optimizer.state.values() for v in state.values())
    assert counted.memory["gradients"] == gradients == counted.sums[0]
    assert counted.memory["optimiser"] == moments
    assert counted.memory["extractor"] == sum(v.nbytes for v in [*extractor.parameters(), *extractor.buffers()])
    assert counted.memory["batches"] == 2 * sum(h.nbytes for h in kept)
    assert counted.shapes == tuple((*h.shape[2:], h.shape[1]) for h in kept)
    work, moved = trained(flow, kept, settings())  # with content
    assert moved == moments
    assert counted.step.peak == counted.memory["activations"] + gradients == pytest.approx(work.peak, rel=0.02)
    assert counted.step.flops == work.flops and counted.step.bytes == pytest.approx(work.bytes, rel=0.1)


def test_the_peak_is_of_what_is_there_at_a_time() -> None:
    with Work() as work:
        x = torch.zeros(1000)
        y = x.view(10, 100) + 1  # x and y
        del x
        z = y * 2  # y and z
        torch.cat([y, z])  # and their join
        torch.empty(5)  # nothing moves
    assert work.peak == 4 * 4000
    assert [(flops, moved) for _, flops, moved in work.calls][1:] == [(0, 8000), (0, 8000), (0, 16000)]


def test_a_kind_of_product_has_its_rate() -> None:
    with hollow(), Work() as work:
        a = torch.empty(64, 32)
        a @ a.T
        with torch.autocast("cpu", torch.bfloat16):
            a @ a.T
            with exact_products(a.device):
                a @ a.T
    found = [(kind, flops) for kind, flops, _ in work.calls if flops]
    assert found == [(kind, 2 * 64 * 32 * 64) for kind in ("tf32", "bfloat16", "float32")]
    one = dict.fromkeys(KINDS, 1e30)
    for kind in KINDS:
        assert work.seconds(one | {kind: 1e3}, 1e30) == pytest.approx(2 * 64 * 32 * 64 / 1e3)
    assert work.seconds(one, 10.0) == pytest.approx(work.bytes / 10)


def test_bfloat16_is_counted_as_such_and_nothing_stays_behind(counted: Counted) -> None:
    def share(work: Work) -> float:
        return sum(flops for kind, flops, _ in work.calls if kind == "bfloat16") / work.flops

    before, was = position_encoding(4, 3, 3), torch.backends.cuda.matmul.allow_tf32
    assert share(counted.step) == 0.0 and share(count(settings("--amp-enable"), 2, 9).step) > 0.9
    assert torch.backends.cuda.matmul.allow_tf32 == was
    assert torch.equal(position_encoding(4, 3, 3), before)


def test_a_memory_takes_what_its_images_take() -> None:
    memory = Memory(channels=(2, 3, 4, 5), views=[View(levels=(0, 1), places=9, weight=1.0)], search=(3,))
    kept = [torch.empty(1, c, side, side) for c, side in zip((2, 3, 4, 5), (4, 2, 1, 1), strict=True)]
    assert filled(memory, kept, 7) == 7 * 2 * (5 + 9 * (2 + 3))
    assert filled(memory, [h[:, :, :2, :2] for h in kept], 7) == 7 * 2 * (5 + 4 * (2 + 3)), (
        "fewer places than asked for"
    )
    assert filled(None, kept, 7) == 0


def test_a_codebook_sends_what_it_needs() -> None:
    sizes = {}
    for words in ((), ("--codebooks", "released", "--semantics", "learned", "--context", "0")):
        flow = VQFlow(settings(*words).model, (24, 40, 112, 320))
        books = [m for m in flow.modules() if isinstance(m, Codebook)]
        sizes[words] = sum(messages(flow)) - sum(4 * b.codes * (1 + b.dim) for b in books)
        moved = sum(0 if b.fixed or b.released else 4 * b.codes * b.dim for b in books)
        norms = sum(16 * m.num_features for m in flow.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
        assert sizes[words] == moved + norms > 0


# --- what follows


def test_rates_are_the_tables_or_those_given() -> None:
    found = Rates.of(settings("--gpu", "h100").plan, 8)
    assert (found.memory, found.bandwidth) == (80e9, 3350e9)
    assert list(found.products.values()) == [1e12 * rate for rate in GPUS["h100"][2:]]
    given = Rates.of(settings("--tflops", "2", "--bandwidth", "5", "--reading", "3").plan, 4)
    assert (given.bandwidth, given.reading) == (5e9, 12.0)
    assert given.products == dict.fromkeys(KINDS, 2e12)
    assert all(len(row) == 2 + len(KINDS) for row in GPUS.values())
    assert found.summing([10**9, 100], 1) == 0.0
    assert found.summing([10**9, 100], 4) == pytest.approx(2 * 50e-6 + 1.5 * (10**9 + 100) / 25e9)
    assert sent(300, 3) == pytest.approx(400)


def plan(counted: Counted, *words: str) -> Plan:
    """Of what was counted with a batch of four."""
    return timed(settings(*words), counted, shares(settings(*words)))


FAST = ("--interconnect", "1e9", "--latency", "0", "--storage", "1e9", "--reading", "1e9")


def test_more_gpus_take_less_time_each(counted: Counted) -> None:
    one, many = plan(counted, *FAST), plan_of(settings(*FAST, "--gpus", "4"))
    assert many.images == {"trained_on": 180, "held_out": 20, "tested": 20, "of_a_step_in_each": 1}
    assert (one.steps, many.steps) == (2 * 2 * (180 // 4), 2 * 2 * (180 // 4))
    for part in ("extraction", "evaluation"):
        assert many.hours[part] == pytest.approx(one.hours[part] / 4)
    least = one.hours["training"] / 4
    assert least < many.hours["training"] < 4 * least, "a smaller batch reads weights more often"
    assert many.sums["sent_by_each"] == pytest.approx(1.5 * sum(counted.sums))
    assert one.sums["sent_by_each"] == one.step["seconds_of_sums"] == 0.0


def test_sums_are_waited_for(counted: Counted) -> None:
    four = ("--gpus", "4", "--batch-size", "16")
    none, late = (plan(counted, *FAST, *four, "--latency", value) for value in ("0", "1000"))
    waited = (late.hours["training"] - none.hours["training"]) * 3600
    assert waited == pytest.approx(late.steps * len(counted.sums) * 1e-3)
    slow = plan(counted, *FAST, *four, "--interconnect", "1e-3")
    assert slow.step["seconds_of_sums"] == pytest.approx(slow.sums["sent_by_each"] / 1e6)
    grouped = plan(counted, *FAST, *four, "--interconnect", "1e-3", "--accumulate", "100")
    once = 4 * sent(counted.sums[0], 4)  # in each of two sub epochs of two meta epochs, which end a group
    assert grouped.step["seconds_of_sums"] == pytest.approx(
        sent(sum(counted.sums[1:]), 4) / 1e6 + once / 1e6 / late.steps
    )


def test_time_goes_with_the_slowest(counted: Counted) -> None:
    plain, half = plan(counted, *FAST), plan(counted, *FAST, "--efficiency", "0.2")
    assert half.hours["training"] == pytest.approx(2 * plain.hours["training"])
    read = plan(counted, "--storage", "1e-4")
    assert read.hours["first_look"] * 3600 == pytest.approx(2 * read.disk["features_of_all"] * 180 / 220 / 1e5)
    slow = plan(counted, "--storage", "1e9", "--reading", "1", "--workers", "2")
    assert slow.hours["extraction"] * 3600 == pytest.approx(220 / 2)
    fresh = plan(counted, "--cache", "none", "--reading", "1", "--workers", "2")
    assert fresh.hours["extraction"] == 0.0 and fresh.disk["features_of_all"] == 0
    assert fresh.hours["training"] * 3600 == pytest.approx(fresh.steps * 4 / 2)
    assert fresh.hours["evaluation"] * 3600 == pytest.approx((2 * 20 + 1 * 20) / 2)


def test_features_lie_where_they_are_kept(counted: Counted) -> None:
    disk, device = (plan(counted, "--cache", place) for place in ("disk", "device"))
    assert device.memory["features_of_all"] == disk.disk["features_of_all"] and not device.disk["features_of_all"]
    ram = plan(counted, "--cache", "ram")
    assert ram.host["features_of_all"] == disk.disk["features_of_all"] > ram.disk["features_of_all"] == 0
    bank, outside = disk.memory["memory_bank"], plan(counted, "--memory-place", "host")
    assert outside.host["memory_bank"] == bank == disk.total - outside.total > 0
    assert "fits into 80" in device.text()
    large = plan(counted, "--cache", "device", "--images", "20000000", "--gpu", "v100")
    assert "does NOT fit into 32" in large.text() and large.plain()["fits"] is False
    assert device.total - disk.total == disk.disk["features_of_all"]
    shapes = sum(2 * h * w * c for h, w, c in counted.shapes)
    assert disk.disk["features_of_all"] == 220 * (shapes + 64 * 64 // 8)


def test_text_and_json_say_the_same(counted: Counted, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--json"]) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told == json.loads(json.dumps(plan(counted).plain()))
    assert told["total_memory"] == sum(told["memory"].values()) and told["fits"] is True
    assert told["total_hours"] == pytest.approx(sum(told["hours"].values()))
    text = plan(counted).text() + "\n"
    for name, value in told["memory"].items():
        assert f"{name.replace('_', ' ')} " in text and f" {value / 1e9:.3f}\n" in text
    assert "180 trained on, 20 held out, 20 tested, 4 of a step in each; 180 steps" in text
    assert "fits into 80" in text and "--tflops float32 19.5, tf32 156, bfloat16 312" in text


@pytest.mark.parametrize(("words", "line"), [
    (["--batch-size", "3", "--gpus", "4"], "--batch-size: expected at least one image for each of 4 GPUs, but got 3"),
    (["--gpus", "2", "--no-multi-class"], "--gpus: without --multi-class each of 2 processes trains models of its own"),
    (["--tflops", "1", "2"], "--tflops: expected one value or three, but got 2"),
    (["--gpu", "abacus"], "--gpu: expected one of v100, "),
    (["--mode", "train"], "--images: does nothing without --mode plan; add that, or leave it out"),
])  # fmt: skip
def test_mistakes_are_said_in_a_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *words]) == 2
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_images_must_be_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mode", "plan"]) == 2
    assert "--images: expected how many images are trained on in --mode plan, but got none" in capsys.readouterr().err
