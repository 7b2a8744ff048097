"""How far a long pass is: a bar in a terminal, a plain line now and then where there is none (in a log file)."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

SECONDS, LONGEST, SHARE = 10.0, 60.0, 0.1  # between two lines: at least, at most, and share of the pass in between

Item = TypeVar("Item")


def progress(items: Iterable[Item], *, total: int, text: str, unit: str = "batches", more: int = 0) -> Iterator[Item]:
    """The items, while the standard error output shows how far they are.

    Args:
        total: of this pass.
        text: what is done with them.
        more: passes as long as this one that are still to come; the time left is that of all of them.
    """
    if sys.stderr.isatty():
        with tqdm(items, total=total, desc=text, unit=f" {unit}", leave=False) as bar:
            began = time.perf_counter()
            for number, item in enumerate(bar):
                yield item
                if more:
                    bar.set_postfix_str(f"{remaining(began, number + 1, total, more)} of the run left", refresh=False)
        return
    yield from with_lines(items, total=total, text=text, unit=unit, more=more)


def with_lines(items: Iterable[Item], *, total: int, text: str, unit: str, more: int) -> Iterator[Item]:
    """The items and plain lines; a pass that is over soon has none."""
    began = last = time.perf_counter()
    shown = 0
    for number, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        late = now - last >= LONGEST or (now - last >= SECONDS and number - shown >= SHARE * total)
        if late and number < total:
            left = remaining(began, number, total, more)
            whose = " of the run" if more else ""
            print(
                f"{text}: {number} of {total} {unit}, {number / (now - began):.3g} {unit}/s, {left}{whose} left",
                file=sys.stderr, flush=True,
            )  # fmt: skip
            last, shown = now, number


def remaining(began: float, number: int, total: int, more: int) -> str:
    """Time for the rest, at the pace of the first `number` items, as 5 s, 3 min or 2.5 h."""
    seconds = (time.perf_counter() - began) / number * (total - number + more * total)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
