"""Which device computes, and in which precision."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from default import UsageError
from utils.run.distributed import launched, local_rank


def resolve_device(name: str, *, deterministic: bool = False) -> torch.device:
    """The device for `--device`; auto prefers CUDA, then MPS, then the CPU. cuda:1 becomes CUDA's current device.

    Of several processes on a machine each has a GPU of its own. CUDA gets its fast products and `choose_kernels`.

    Raises:
        UsageError: the device that was asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, present in there.items() if present)
    if name == "cuda" and launched():
        name = f"cuda:{local_rank()}"
    device, cards = torch.device(name), torch.cuda.device_count()
    if not there[device.type] or (device.index or 0) >= max(cards, 1):
        names = [kind for kind, present in there.items() if present] + [f"cuda:{n}" for n in range(cards)]
        raise UsageError(f"--device: {name!r} was asked for, but it is not here; choose from auto, {', '.join(names)}")
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        choose_kernels(deterministic)
        if device.index is not None:
            torch.cuda.set_device(device)
    return device


def choose_kernels(deterministic: bool) -> None:
    """Have CUDA take the kernels that are fastest for each size, which it tries out, or the same ones in each run.

    Then sums are added in the same order; PyTorch warns where it has no kernel that does so.
    """
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16: elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        abilities: dict = getattr(torch.cpu, "get_capabilities", dict)()  # newer versions of PyTorch tell
        return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def autocast(device: torch.device, enabled: bool) -> AbstractContextManager:
    """bfloat16 mixed precision where `enabled` and the device has units for it; elsewhere nothing changes."""
    if not enabled or not has_bfloat16(device):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


@contextlib.contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Full single precision: neither bfloat16 nor TensorFloat-32 has the bits to tell which vector is nearest."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with full_precision(device):
            yield
    finally:
        matmul.allow_tf32 = before


def check_compiler(device: torch.device) -> None:
    """Raise `UsageError` if PyTorch cannot compile for the device, found out with a tiny function."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:
        reason = "a C++ compiler (on PATH, or named by CXX)" if device.type == "cpu" else "a working Triton"
        line = next((row for row in str(error).splitlines() if row.strip()), type(error).__name__)
        raise UsageError(f"--compile: needs {reason}, but failed here: {line[:120]}; leave --compile out") from error


def full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast on a device, if there is such a thing on it (there is none on "meta")."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else contextlib.nullcontext()


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """What autocast wants products with `weight` to be computed in."""
    kind = weight.device.type
    known = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if known else weight.dtype
