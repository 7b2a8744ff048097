"""The same image more than once: equal bytes, and perceptual hashes that differ in a few bits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

NEAR = 2  # of the 64 bits of two hashes that may differ
BLOCK = 512  # hashes that are compared with all others together


def equal(keys: Sequence[Hashable]) -> list[list[int]]:
    """Numbers of keys that are the same, for each that there is more than once."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        found[key].append(number)
    return [group for group in found.values() if len(group) > 1]


def near(hashes: Sequence[int]) -> list[list[int]]:
    """Numbers of hashes of 64 bits that chains of at most `NEAR` different bits join."""
    owner = list(range(len(hashes)))

    def first(number: int) -> int:
        while owner[number] != number:
            owner[number] = number = owner[owner[number]]
        return number

    values = np.array(hashes, np.uint64)
    for start in range(0, len(values), BLOCK):
        part = values[start : start + BLOCK, None]
        for row, column in np.argwhere(np.bitwise_count(part ^ values[None]) <= NEAR).tolist():
            one, other = first(start + row), first(column)
            owner[max(one, other)] = min(one, other)
    return equal([first(number) for number in range(len(hashes))])
