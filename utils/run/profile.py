"""A trace of some training steps, to be opened in chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from torch.profiler import profile

Item = TypeVar("Item")


def traced(batches: Iterable[Item], steps: int, path: Path) -> Iterator[Item]:
    """The batches themselves; what is done with the first `steps` of them is recorded and written to `path`."""
    recorder = profile(record_shapes=True, profile_memory=True)
    recorder.start()
    running, count = True, 0
    try:
        for batch in batches:
            yield batch
            count += 1
            if running and count == steps:
                recorder.stop()
                running = False
                export(recorder, path)
    finally:
        if running:
            recorder.stop()
            if count:
                export(recorder, path)


def export(recorder: profile, path: Path) -> None:
    """PyTorch writes to a file by its name: to one beside `path`, which then takes its place."""
    part = path.with_name(f"part-{path.name}")  # the suffix says which format
    recorder.export_chrome_trace(str(part))
    part.replace(path)
