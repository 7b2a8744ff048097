"""How much a model computes, moves and holds meanwhile, counted from the sizes of tensors alone."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models.codebook import Codebook
from models.hierarchy import position_encoding
from models.norm import BatchNorm1d, BatchNorm2d
from models.vqflow import VQFlow

KINDS = ("float32", "tf32", "bfloat16")  # what a GPU computes products in, each at a rate of its own
FLOAT = 4  # bytes


class Work(TorchDispatchMode):
    """Counts what PyTorch computes meanwhile, on tensors with or without content.

    Attributes:
        calls: of each operation that computes tensors its kind (`KINDS`), FLOPs, and bytes read and written; views and
            what takes memory without writing to it are none.
        peak: most bytes that what was made meanwhile took at a time, and `known` tensors, which were there before.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []
        self.peak = self._alive = 0
        self._known: set[int] = set()
        for tensor in known:
            self._note(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if made and not func.is_view and "empty" not in func._schema.name:
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.calls.append((kind_of(made), flops, sum(x.numel() * x.element_size() for x in [*read, *made])))
        for x in made:
            self._note(x.untyped_storage())
        return out

    def _note(self, storage: UntypedStorage) -> None:
        """Memory is taken, until nobody holds it any more."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._alive += size
            self.peak = max(self.peak, self._alive)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._alive -= size

    @property
    def flops(self) -> int:
        """Of all products."""
        return sum(flops for _, flops, _ in self.calls)

    @property
    def bytes(self) -> int:
        """Read and written, as if nothing stayed in a device's cache."""
        return sum(moved for _, _, moved in self.calls)

    def seconds(self, rates: Mapping[str, float], bandwidth: float) -> float:
        """By the roofline: each operation takes as long as its FLOPs at the rate of its kind, or as its bytes.

        Args:
            rates: FLOP/s of each of `KINDS`.
            bandwidth: bytes/s of the device's memory.
        """
        return sum(max(flops / rates[kind], moved / bandwidth) for kind, flops, moved in self.calls)


def kind_of(made: Sequence[Tensor]) -> str:
    """What a device would compute an operation in whose results are `made`."""
    if any(x.dtype == torch.bfloat16 for x in made):
        return "bfloat16"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "float32"  # see `exact_products`


@contextlib.contextmanager
def hollow(*modules: nn.Module) -> Iterator[None]:
    """Meanwhile tensors have sizes and no content, those of `modules` on "meta", too, and lie on the CPU by name.

    Unlike those on "meta" they can be computed with in bfloat16.
    """
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in (part for whole in modules for part in whole.modules()):
                for name, value in module.named_parameters(recurse=False):
                    setattr(module, name, nn.Parameter(empty_like(value), requires_grad=value.requires_grad))
                for name, buffer in module.named_buffers(recurse=False):
                    setattr(module, name, empty_like(buffer))
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
        position_encoding.cache_clear()  # it remembers what has no content


def empty_like(value: Tensor) -> Tensor:
    """Of the same shape, type and order in memory."""
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)


def state_bytes(module: nn.Module) -> int:
    """Of parameters and buffers."""
    return sum(v.numel() * v.element_size() for v in [*module.parameters(), *module.buffers()])


def gradient_bytes(flow: VQFlow) -> int:
    """Of the gradients of a step, which all processes average."""
    return sum(p.numel() * p.element_size() for p in flow.parameters() if p.requires_grad)


def messages(flow: VQFlow) -> list[int]:
    """Bytes of each sum over all processes in a forward and a backward pass, beside the gradients.

    A codebook's counts and sums, and the rows that its dead codes move to (`Codebook.update`); mean and variance of a
    batch norm, and their gradients.
    """
    sizes: list[int] = []
    for module in flow.modules():
        if isinstance(module, Codebook):
            whole = FLOAT * module.codes * module.dim
            revived = not (module.fixed or module.released)
            sizes += [FLOAT * module.codes, whole, *([whole] if revived else [])]
        if isinstance(module, (BatchNorm1d, BatchNorm2d)):
            sizes += [FLOAT * module.num_features] * 4
    return sizes
