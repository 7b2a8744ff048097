"""What metrics.jsonl tells of a training, as small charts, and as numbers where there is one meta epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from utils.metrics import METRICS
from utils.report.charts import line_chart
from utils.report.tables import COLUMNS, TITLES

CODEBOOKS = {
    "cpc": "concepts", "cspc_0": "patterns, level 1", "cspc_1": "patterns, level 2", "cspc_2": "patterns, level 3",
    "cspc_top": "patterns, top",
}  # fmt: skip

Training = Mapping[str, Sequence[Mapping[str, Any]]]  # model -> entries of its metrics.jsonl


def number(value: float) -> str:
    """Four significant digits, - for NaN."""
    return f"{value:#.4g}".rstrip(".") if value == value else "-"


def panels(
    training: Training, wanted: Sequence[tuple[str, tuple[str, ...]]], factor: float = 1
) -> list[tuple[str, Markup]]:
    """A small chart for each title and path into an entry, with a line per model; those without values are left out.

    Values are multiplied by `factor`. Where no model has two values they stand there as numbers.
    """
    made = []
    for title, path in wanted:
        lines: dict[str, tuple[list[float], list[float]]] = {}
        for model, entries in training.items():
            points = [(e["epoch"], v) for e in entries if (v := lookup(e, path)) is not None]
            if points:
                lines[model] = ([x for x, _ in points], [factor * y for _, y in points])
        if lines:
            made.append((title, panel(lines, list(training))))
    return made


def panel(lines: Mapping[str, tuple[list[float], list[float]]], order: Sequence[str]) -> Markup:
    """A chart over the meta epochs, or numbers."""
    if max(len(y) for _, y in lines.values()) > 1:
        chart = line_chart(lines, order=order, labels=("meta epoch", ""), marks=True, size=(3.5, 1.9))
        return Markup(chart)
    row = Markup('<p class="number"><strong>{}</strong> {}</p>')
    return Markup("").join(row.format(number(y[0]), name if len(order) > 1 else "") for name, (_, y) in lines.items())


def lookup(entry: Any, path: tuple[str, ...]) -> Any:
    """A nested value, None if there is none."""
    for key in path:
        entry = entry.get(key) if isinstance(entry, Mapping) else None
    return entry


def training_panels(training: Training) -> list[tuple[str, Markup]]:
    """Loss, learning rate, likelihood of held-out images and every metric over the meta epochs."""
    wanted = [
        ("Loss, nats per image", ("train", "loss")), ("Learning rate", ("train", "lr")),
        ("Bits per dimension, training images", ("bits_per_dim", "train")),
        ("Bits per dimension, held-out images", ("bits_per_dim", "held_out")),
    ]  # fmt: skip
    metrics = [(TITLES[m], ("test", m)) for m in COLUMNS if m in METRICS]
    return panels(training, wanted) + panels(training, metrics, factor=100)


def codebook_panels(training: Training) -> list[tuple[str, Markup]]:
    """Perplexity of each codebook over the meta epochs."""
    return panels(training, [(title, ("codebooks", key, "perplexity")) for key, title in CODEBOOKS.items()])


def codebook_rows(training: Training) -> list[tuple[str, dict[str, Any]]]:
    """Each model's codebooks after the last meta epoch: `perplexity` and `used`."""
    return [(m, entries[-1]["codebooks"]) for m, entries in training.items() if entries and entries[-1]["codebooks"]]
