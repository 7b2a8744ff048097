"""What others published, to stand beside our results; all figures, sources and protocols lie in published.json."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

Row = tuple[str, Mapping[str, float], str]  # method, metric -> fraction, note


@functools.cache
def _methods() -> list[dict[str, Any]]:
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))["methods"]


def _fractions(percents: Mapping[str, float]) -> dict[str, float]:
    return {metric: round(value / 100, 6) for metric, value in percents.items()}


def comparison_rows(dataset: str) -> list[Row]:
    """Each method's means over all classes of a data set, none for a data set without published figures.

    The note says setting, protocol and source.
    """
    return [
        (
            m["name"],
            _fractions(m["means"][dataset]),
            "; ".join(filter(None, (m["setting"], m["protocol"], m["source"]))),
        )
        for m in _methods()
        if dataset in m["means"]
    ]


def class_rows(dataset: str, class_names: Collection[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Method -> class -> metric -> fraction, where published per class; all classes, or those of `class_names`."""
    return {
        m["name"]: {
            name: _fractions(figures)
            for name, figures in m["classes"][dataset].items()
            if class_names is None or name in class_names
        }
        for m in _methods()
        if dataset in m.get("classes", {})
    }
