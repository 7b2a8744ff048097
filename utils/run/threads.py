"""Many small files at once: decoders of images release Python's lock."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def in_threads(work: Callable[[Given], Made], values: Sequence[Given]) -> list[Made]:
    """`work` of each value, in order; of several errors the first value's is raised."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        return list(pool.map(work, values))
    finally:
        pool.shutdown(cancel_futures=True)
