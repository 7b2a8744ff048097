"""Work on a CPU that keeps behind a device: the device computes the next batch while the last one is added up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

Call = Callable[[], None]
MOST = 2  # calls that are not done yet: each holds a batch's maps


@contextmanager
def behind(device: torch.device) -> Iterator[Callable[[Call], None]]:
    """A function that has calls made one after the other: at once on a CPU, which has no time to spare, elsewhere
    by a thread, `MOST` of them behind at most. All are done at the end; an error of one of them is raised here."""
    if device.type == "cpu":
        yield lambda call: call()
        return
    waiting: deque[Future[None]] = deque()

    def later(call: Call) -> None:
        if len(waiting) == MOST:
            waiting.popleft().result()
        waiting.append(pool.submit(call))

    with ThreadPoolExecutor(1, thread_name_prefix="behind") as pool:
        yield later
        while waiting:
            waiting.popleft().result()
