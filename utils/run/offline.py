"""--offline: from here on this process opens no connection to another machine."""

from __future__ import annotations

import os
import sys
from typing import Any

SWITCHES = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "WANDB_MODE": "offline"}  # of who would like to
HERE = ("", "localhost", "127.0.0.1", "::1")
_done: list[bool] = []


class Offline(OSError):
    """A connection was asked for."""


def go_offline() -> None:
    """Tell the hub's client and Weights & Biases so, and refuse whatever else looks up or calls another machine.

    Best before either is imported, as they look once; it cannot be taken back.
    """
    os.environ.update(SWITCHES)
    if not _done:
        _done.append(True)
        sys.addaudithook(refuse)


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Python's audit hook: raises `Offline` for a name that is looked up, or a connection, outside of this machine."""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host
    if name is not None and name not in HERE:
        raise Offline(f"--offline: {name} was not asked")
