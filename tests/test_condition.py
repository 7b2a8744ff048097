"""Structured and direct conditioning: the same outputs and gradients, for all modes, borders and odd sizes."""

import copy
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    output = model(model.keep(features))
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


def example(
    size: tuple[int, int] = (5, 7), codes: int = 6, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, Condition]:
    """Something to condition, and a condition of 11 channels of every kind of part; gradients go to all but codes."""
    torch.manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype)

    through = random(batch, 3, *size).requires_grad_()
    part = CodePart.make(torch.randint(codes, (batch, *size)), random(codes, 5), through, placed=True)
    vectors = [(1, random(batch, 4)), (2, random(batch, 4).requires_grad_()), (3, random(batch, 2).requires_grad_())]
    condition = Condition(
        size=size, widths=(1, 4, 4, 2), codes=part, position=random(4, *size), position_piece=1,
        vectors=tuple(VectorPart(vector=vector, piece=piece) for piece, vector in vectors),
    )  # fmt: skip
    return random(batch, 3, *size).requires_grad_(), condition


def convolution(dtype: torch.dtype = torch.float64) -> ConditionedConv2d:
    torch.manual_seed(9)
    return ConditionedConv2d(3 + 11, 6).to(dtype)


def directly(conv: ConditionedConv2d, x: torch.Tensor, condition: Condition) -> torch.Tensor:
    """PyTorch's convolution of the dense map, with the weights as they are now."""
    joined = torch.cat([x, condition.dense()], 1)
    return torch.nn.functional.conv2d(joined, conv.weight, conv.bias, padding=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 3), (5, 7)])
@pytest.mark.parametrize("codes", [2, 50])
def test_convolution_by_parts_at_all_borders(size: tuple[int, int], codes: int) -> None:
    (x, condition), conv = example(size, codes), convolution()
    assert condition.codes is not None
    sources = [x, conv.weight, conv.bias, condition.codes.through, *(v.vector for v in condition.vectors[1:])]
    got, expected = conv(x, condition), directly(conv, x, condition)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(out, sources, grad) for out in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(conv(x, condition), expected)
        torch.testing.assert_close(conv.eval()(x, condition), expected)


class Calls(TorchDispatchMode):
    """Notes every operation by name, with the types of the tensors that it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, set[torch.dtype]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        self.found.append((function.overloadpacket.__name__, {x.dtype for x in tensors}))
        return function(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(found == name for found, _ in self.found)


def tables_made(conv: ConditionedConv2d, x: torch.Tensor, condition: Condition) -> int:
    """How many tables a forward makes; its result is checked."""
    with torch.no_grad():
        with Calls() as calls:
            got = conv(x, condition)
        torch.testing.assert_close(got, directly(conv, x, condition))
    return calls.count("baddbmm") - 1  # one of them adds the vectors


def test_a_table_is_kept_from_eval_to_train() -> None:
    (x, condition), conv = example(), convolution()
    assert [tables_made(conv, x, condition) for _ in range(2)] == [1, 1]
    conv.eval()
    assert [tables_made(conv, x, condition) for _ in range(3)] == [1, 0, 0]
    conv.eval()
    assert tables_made(conv, x, condition) == 0
    conv.train().eval()
    assert [tables_made(conv, x, condition) for _ in range(2)] == [1, 0]
    conv(x, condition)  # a step may follow
    assert [tables_made(conv, x, condition) for _ in range(2)] == [1, 1]


CHANGES = {
    "a step": lambda conv, _: torch.optim.AdamW([conv.weight], lr=0.1, fused=True).step(),
    "in place": lambda conv, _: conv.weight.mul_(1.5),
    "a load": lambda conv, _: conv.load_state_dict({k: 2 * v for k, v in conv.state_dict().items()}),
    "an assigning load": lambda conv, _: conv.load_state_dict(
        {k: 2 * v for k, v in conv.state_dict().items()}, assign=True
    ),
    "another precision and back": lambda conv, _: conv.bfloat16().double(),
    "other memory": lambda conv, _: setattr(conv.weight, "data", 2 * conv.weight.data),
    "an average": lambda conv, _: torch._foreach_lerp_([conv.weight], [torch.ones_like(conv.weight)], 0.1),
    "codes": lambda _, condition: condition.codes.codes.lerp_(torch.ones(6, 5, dtype=torch.float64), 0.5),
    "the encoding": lambda _, condition: condition.position.add_(1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_table_is_never_stale(change: str) -> None:
    (x, condition), conv = example(), convolution().eval()
    if change == "a step":
        conv(x, condition).sum().backward()
        conv.train().eval()
    assert tables_made(conv, x, condition) == 1
    if change == "a step":
        conv(x, condition)
    with torch.no_grad():
        CHANGES[change](conv, condition)
    assert tables_made(conv, x, condition) == 1


def test_other_codes_and_encodings_have_their_own_table() -> None:
    conv = convolution().eval()
    for size, seed in (((5, 7), 0), ((5, 7), 1), ((7, 5), 0), ((5, 7), 0)):
        assert tables_made(conv, *example(size, seed=seed)) == 1


def test_copies_and_pickles_begin_without_a_table() -> None:
    """One that was out of date would pass for new, as versions begin at zero again."""
    (x, condition), conv = example(), convolution().eval()
    assert tables_made(conv, x, condition) == 1
    with torch.no_grad():
        conv.weight.mul_(3)
    stored = io.BytesIO()
    torch.save(conv, stored)
    stored.seek(0)
    bare = io.BytesIO()
    torch.save(convolution().eval(), bare)
    assert len(stored.getvalue()) == len(bare.getvalue())
    for other in (copy.deepcopy(conv), torch.load(stored, weights_only=False)):
        assert [tables_made(other, x, condition) for _ in range(2)] == [1, 0]


def test_inference_tensors_are_served_without_keeping() -> None:
    """They have no version that would tell of a change."""
    with torch.inference_mode():
        (x, condition), conv = example(), convolution().eval()
        for _ in range(2):
            torch.testing.assert_close(conv(x, condition), directly(conv, x, condition))
            conv.weight.mul_(2)


def test_threads_with_different_codes_do_not_get_each_others_table() -> None:
    conv = convolution().eval()
    jobs = [example((4, 4), codes=3, seed=seed) for seed in range(4)]
    expected = [directly(conv, *job).detach() for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(number: int) -> bool:
        with torch.no_grad():
            return all(torch.allclose(conv(*jobs[number]), expected[number]) for _ in range(100))

    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_thousands_of_hits_add_up_under_bfloat16() -> None:
    """Every position has the same code, and gradients do not cancel: sums in bfloat16 stop at 256 of them."""
    torch.manual_seed(0)
    size, batch = (40, 40), 4
    found = []
    for enabled in (False, True):
        x, condition = example(size, codes=2, batch=batch, dtype=torch.float32)
        assert condition.codes is not None
        codes = CodePart.make(torch.zeros(batch, *size, dtype=torch.long), condition.codes.codes, x, placed=True)
        conv = convolution(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = conv(x, replace(condition, codes=codes))
        assert out.dtype == torch.float32
        torch.manual_seed(1)
        out.backward(1 + 0.1 * torch.rand_like(out))
        assert conv.weight.grad is not None and x.grad is not None
        vectors = [part.vector.grad for part in condition.vectors[1:]]
        found.append([out.detach(), conv.weight.grad, x.grad, *vectors])
    for got, expected in zip(found[1], found[0], strict=True):
        assert (got - expected).norm() < 0.01 * expected.norm()
        assert (got - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("codes", [6, 500])
@pytest.mark.parametrize("direct", [False, True])
def test_autocast_convolves_in_bfloat16(codes: int, direct: bool) -> None:
    """Forward and backward, the straight-through gradient and the table's products too; only sums are in float32."""
    x, condition = example(codes=codes, dtype=torch.float32)
    conv = convolution(torch.float32)
    with Calls() as forward, torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv(x, Condition.of_map(condition.dense()) if direct else condition)
    assert out.dtype == (torch.bfloat16 if direct else torch.float32)
    with Calls() as backward:
        out.sum().backward()
    found = forward.found + backward.found
    convolutions = [types for name, types in found if name.startswith("convolution")]
    assert len(convolutions) >= 2
    assert all(types == {torch.bfloat16} for types in convolutions)
    assert all(types == {torch.bfloat16} for name, types in forward.found if name == "bmm")
    bags = [types for name, types in found if "embedding_bag" in name]
    assert len(bags) == (2 if codes == 6 and not direct else 0)
    assert all(types <= {torch.float32, torch.int64} for types in bags)


def test_evaluation_rounds_no_weights_for_a_few_vectors() -> None:
    (x, condition), conv = example(dtype=torch.float32), convolution(torch.float32).eval()
    with torch.no_grad(), Calls() as calls, torch.autocast("cpu", dtype=torch.bfloat16):
        conv(x, condition)
    products = [types for name, types in calls.found if name == "bmm"]
    assert products and all(types == {torch.float32} for types in products)


def test_a_kept_table_does_not_remember_autocast() -> None:
    (x, condition), conv = example(dtype=torch.float32), convolution(torch.float32).eval()
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            conv(x, condition)
        torch.testing.assert_close(conv(x, condition), directly(conv, x, condition))


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
        model(model.keep(features)).nll.mean().backward()
        optimizer.step()
        model.eval()
        reference.load_state_dict(model.state_dict())
        reference.eval()
        with torch.no_grad():
            for _ in range(2):
                a, b = model(model.keep(features)).log_det, reference(reference.keep(features)).log_det
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
