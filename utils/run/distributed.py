"""Several processes, one training: what torchrun started, and what its processes tell each other.

Without torchrun there is one process, and every function here gives back what it was given. All processes draw the same
random numbers all the time: what is drawn for the whole batch or data set is the same everywhere, and the same as in a
single process.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from default import UsageError

LONGEST = timedelta(hours=1)  # that one process may wait for another, who may be drawing pictures
Value = TypeVar("Value")


class _State:
    """Where the processes leave notes for each other, and whether this one works by itself for now (see `alone`)."""

    store: Any = None
    alone = False


def launched() -> bool:
    """Whether torchrun, or who does as it does, started more than this process."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Meanwhile the processes are connected, where there are several: over NCCL on GPUs, over Gloo on CPUs. The first
    one alone prints."""
    if not launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank() % torch.cuda.device_count())
    store, number, count = next(dist.rendezvous("env://", timeout=LONGEST))  # type: ignore[no-untyped-call]
    _State.store = unwritten(store, number, count)
    dist.init_process_group(store=_State.store, rank=number, world_size=count, timeout=LONGEST)
    with contextlib.ExitStack() as stack:
        if not is_first():
            silent = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(silent))
            stack.enter_context(contextlib.redirect_stderr(silent))
        yield
    dist.destroy_process_group()  # not after an error: it might wait for those who are gone


def unwritten(store: Any, number: int, count: int) -> Any:
    """A part of a store that no process wrote to before.

    torchrun keeps the store when it starts all processes again, and the addresses and notes of the dead would be taken
    for those of the living. So the first one answers whoever is here under a name that is new, with the part's name.
    """
    name = uuid4().hex
    store.set(f"here {number}", name)
    if number:
        part = store.get(f"answer {name}").decode()
        store.set(f"{part} {number}", "")
        return dist.PrefixStore(part, store)
    missing, end = set(range(1, count)), time.monotonic() + LONGEST.total_seconds()
    while missing and time.monotonic() < end:
        for other in sorted(missing):
            if store.check([f"here {other}"]):  # perhaps a dead one's word: it is read again
                store.set("answer " + store.get(f"here {other}").decode(), name)
        missing = {other for other in missing if not store.check([f"{name} {other}"])}
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Meanwhile this process does its own work: it shares nothing, and waits for nobody."""
    before, _State.alone = _State.alone, True
    try:
        yield
    finally:
        _State.alone = before


def shared() -> bool:
    """Whether this process works together with others."""
    return dist.is_available() and dist.is_initialized() and not _State.alone


def processes() -> int:
    """How many work together."""
    return dist.get_world_size() if shared() else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return dist.get_rank() if shared() else 0


def local_rank() -> int:
    """Its number on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first() -> bool:
    """Whether this is the process that prints, and writes what all have found."""
    return rank() == 0


def share(values: Sequence[Value], size: int) -> list[Value]:
    """Of batches of `size` values every n-th, those of this process among n; `interleaved` puts all together again.

    The batches are those of a single process, so that what is computed of them is the same to the last bit.
    """
    return [value for start in starts(len(values), size) for value in values[start : start + size]]


def starts(count: int, size: int) -> range:
    """Where this process's batches of `size` among `count` values begin."""
    return range(rank() * size, count, processes() * size)


def block(count: int, size: int) -> range:
    """This process's part of `count` consecutive numbers, in whole batches of `size`."""
    batches = -(-count // size)
    first, last = (number * batches // processes() * size for number in (rank(), rank() + 1))
    return range(min(first, count), min(last, count))


# --- what all find out together


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, element by element; gradients flow through it."""
    if not shared():
        return values
    return _Sum.apply(values)


class _Sum(torch.autograd.Function):
    """A sum over all processes; what all of them lose by it is the sum of what each one loses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return _reduced(values, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _reduced(grad, dist.ReduceOp.SUM)


def averaged(values: Tensor) -> Tensor:
    """The mean over all processes."""
    return summed(values) / processes() if shared() else values


def highest(value: int) -> int:
    """The highest of all processes."""
    return int(_reduced(torch.tensor(value), dist.ReduceOp.MAX)) if shared() else value


def _reduced(values: Tensor, how: Any) -> Tensor:
    result = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, how)
    return result


def random_rows(rows: Tensor, count: int) -> Tensor:
    """`count` random rows (count, D) of all processes' `rows` (N, D), as many in each: everywhere the same."""
    picks = torch.randint(len(rows) * processes(), (count,), device=rows.device)
    if not shared():
        return rows[picks]
    own = picks // len(rows) == rank()
    return summed(torch.where(own[:, None], rows[picks % len(rows)], 0))


def normal_like(rows: Tensor) -> Tensor:
    """Standard normal numbers for a process's part (B, ...) of a batch, those that a single process would draw."""
    if not shared():
        return torch.randn_like(rows)
    drawn = torch.randn_like(torch.cat([rows] * processes()))  # in its order in memory, too
    return drawn[rank() * len(rows) : (rank() + 1) * len(rows)]


def interleaved(batches: list[list[Value]]) -> list[Value]:
    """What is known of all images, in order, from what this process found in its batches (see `share`)."""
    parts: list[list[list[Value]]] = [batches] * processes()
    if shared():
        dist.all_gather_object(parts, batches)
    rows = [row for rows in zip_longest(*parts) for row in rows if row is not None]
    return [value for row in rows for value in row]


def joined(values: Sequence[Value]) -> list[Value]:
    """What all processes have, one process after the other."""
    if not shared():
        return list(values)
    parts: list[Sequence[Value]] = [()] * processes()
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def gathered(value: Value) -> list[Value]:
    """In the first process what all have, tensors in memory; nothing in the others."""
    if not shared():
        return [value]
    packed = io.BytesIO()
    torch.save(value, packed)
    parts: list[Any] | None = [None] * processes() if is_first() else None
    dist.gather_object(packed.getvalue(), parts)
    return [torch.load(io.BytesIO(part), map_location="cpu", weights_only=False) for part in parts or []]


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` gives in the first process, where alone it is called.

    Raises:
        UsageError: it raises one there.
    """
    if not shared():
        return make()
    told: list[Any] = [None, None]
    if is_first():
        try:
            told[0] = make()
        except UsageError as error:
            told[1] = error
    dist.broadcast_object_list(told)
    if told[1] is not None:
        raise told[1]
    return told[0]


def queue(name: str, values: Sequence[Value]) -> Iterator[Value]:
    """The next of `values` that no process has taken from the queue of this name yet, until there are no more."""
    while (number := _State.store.add(f"queue {name}", 1) - 1) < len(values):
        yield values[number]


def wait() -> None:
    """Until all processes are here."""
    from_first(lambda: None)


def say(line: str, *, echo: bool = False) -> None:
    """Print a line about how a process ends: once where several end alike, and an `echo` of others' ends only if
    nothing was said before."""
    if _State.store is None:
        print(line, file=sys.stderr)
    elif _is_news(line, echo):
        print(line, file=sys.__stderr__, flush=True)  # whoever is silenced


def _is_news(line: str, echo: bool) -> bool:
    with contextlib.suppress(Exception):  # the notes are gone, too
        first = _State.store.add("said", 1) == 1
        return first if echo else _State.store.add(f"said {line}", 1) == 1
    return True
