"""Commands that nobody should type, and files as a bad disk leaves them."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout

from main import build_parser, main

BUG = 70  # the status that main.py leaves with if it is to blame
VALUES = (
    "", "0", "1", "-1", "3", "1e9", "nan", "inf", "-inf", "0.5", "1e-400", "99999999999999999999", "all", "none",
    "auto", "cpu", "cuda:7", "a b", "/", "..", "~", "-", "--", "é", "\udcff", "\n", "{}", "train", "test", "predict",
    "table", "export", "sample", "folder", "mvtec", "likelihood", "surprise", "float32", "x" * 300,
)  # fmt: skip


def mistyped(rng: random.Random) -> list[str]:
    """A command of real and broken flags with real and broken values."""
    actions = [a for a in build_parser()._actions if a.dest not in ("help", "version")]
    words: list[str] = []
    for action in rng.sample(actions, rng.randint(0, 5)):
        flag = rng.choice(action.option_strings or [""])
        if rng.random() < 0.05:
            flag = flag[: rng.randrange(len(flag) + 1)] + rng.choice("xé-=_ ") + flag[rng.randrange(len(flag) + 1) :]
        sure = [str(v) for v in (action.choices or str(action.metavar or "").strip("{}").split(",")) if v]
        count = rng.choice((0, 1, 1, 1, 2, 3))
        words += [flag, *(rng.choice(sure if sure and rng.random() < 0.5 else VALUES) for _ in range(count))]
    return [*words, "--dry-run"]


def quietly(argv: Sequence[str]) -> tuple[int, str]:
    """The status of `main` and what it printed, in this process."""
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        try:
            return main(argv), said.getvalue()
        except BaseException as error:  # of any kind: it did not become a status
            return BUG, f"{said.getvalue()}\nTraceback: {type(error).__name__}: {error}"


def damaged(data: bytes, rng: random.Random) -> bytes:
    """A file's bytes cut off, changed, repeated, or with another value where there was one."""
    how, place = rng.randrange(5), rng.randrange(max(len(data), 1))
    if how == 0:
        return data[:place]
    if how == 1:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if how == 2:
        return data[:place] + data[max(place - 50, 0) :]
    words = [b"null", b"[]", b"{}", b"-1", b'"x"', b"1e999", b"true", b"[[1]]"]
    starts = [n for n in range(len(data) - 1) if data[n : n + 2] in (b": ", b", ")][:5000]
    if not starts or how == 3:
        return b"".join(rng.sample(data.splitlines(keepends=True), len(data.splitlines())))
    start = rng.choice(starts) + 2
    end = min((e for e in (data.find(c, start) for c in (b",", b"}", b"\n")) if e > 0), default=len(data))
    return data[:start] + rng.choice(words) + data[end:]
