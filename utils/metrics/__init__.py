"""How good scores are: the seven metrics, their intervals, and the figures of others to stand beside them."""

from utils.metrics.seven import (
    METRICS,
    NAN,
    ClassAccumulator,
    ClassResult,
    Curve,
    evaluate_maps,
    mean_results,
    nanmean,
)

__all__ = [
    "METRICS",
    "NAN",
    "ClassAccumulator",
    "ClassResult",
    "Curve",
    "evaluate_maps",
    "mean_results",
    "nanmean",
]
