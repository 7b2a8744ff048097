"""How well the concepts, found without labels, agree with the product classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import mutual_info_score
from sklearn.metrics.cluster import contingency_matrix


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """`used`: concepts that some image chose; `purity` in (0, 1]: share of images whose class is the most frequent one
    of their concept; `mutual_information` of concept and class and the `entropy` of the classes, its bound, in bits."""

    used: int
    purity: float
    mutual_information: float
    entropy: float


def agreement(concepts: Sequence[int], classes: Sequence[str]) -> Agreement:
    """Of each image's concept with its class (Manning et al., Introduction to Information Retrieval, section 16.3)."""
    table = contingency_matrix(classes, concepts)
    return Agreement(
        used=table.shape[1],
        purity=float(table.max(0).sum() / table.sum()),
        mutual_information=float(mutual_info_score(classes, concepts) / np.log(2)),
        entropy=float(mutual_info_score(classes, classes) / np.log(2)),
    )
