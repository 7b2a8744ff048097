"""What torchrun starts in test_distributed.py: main.py's commands, one after the other, in the same processes."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

from benchmarks.scaling import fed, settings, stepped  # noqa: E402
from count import TOLD  # noqa: E402
from default import UsageError  # noqa: E402
from main import run  # noqa: E402
from models.work import gradient_bytes, messages  # noqa: E402
from utils.run.distributed import (  # noqa: E402
    block,
    from_first,
    highest,
    interleaved,
    joined,
    processes,
    queue,
    random_rows,
    rank,
    say,
    share,
    summed,
    together,
    wait,
)  # fmt: skip


def check_helpers() -> None:
    """Of what the processes tell each other; an assertion that fails ends all of them."""
    count = processes()
    for images in range(11):
        whole = list(range(images))
        own = share(whole, 2)
        assert interleaved([own[i : i + 2] for i in range(0, len(own), 2)]) == whole
        assert joined(block(images, 2)) == whole
    values = torch.full((2,), float(rank() + 1), requires_grad=True)
    total = summed(values)
    (total * (rank() + 1)).sum().backward()
    expected = count * (count + 1) / 2
    assert total.tolist() == [expected] * 2 and values.grad is not None and values.grad.tolist() == [expected] * 2
    assert highest(rank()) == count - 1
    torch.manual_seed(3)
    picked = random_rows(torch.arange(4.0)[:, None] + 4 * rank(), 300).flatten().tolist()
    torch.manual_seed(3)
    assert picked == torch.randint(4 * count, (300,)).tolist(), "as of all rows in one process"
    assert sorted(joined(list(queue("letters", "abcde")))) == list("abcde")
    wait()
    try:
        from_first(refuse)
    except UsageError as error:
        say(f"error: {error}")
        say("an echo", echo=True)


def check_messages() -> None:
    """A training step sends what --mode plan counts."""
    words = Namespace(small=True, batch=2 * processes(), steps=1)
    flow = fed(settings(words), 2)[1]
    gradients, *others = stepped(words)["sums"]
    assert gradients == gradient_bytes(flow) and sorted(others) == sorted([*messages(flow), *TOLD])


def refuse() -> None:
    raise UsageError("refused by the first one")


if __name__ == "__main__":
    with together():
        for argv in json.loads(sys.argv[1]):
            try:
                run(argv)
            except UsageError as error:
                say(f"error: {error}")
        check_helpers()
        check_messages()
