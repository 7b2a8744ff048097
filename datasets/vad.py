"""VAD, the Valeo anomaly data (Baitieva et al., 2024): one product, labels of whole images only.

Defective training images are not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets.folder import Counts, DatasetSpec, Scan
from datasets.walk import scan_mvtec
from default import UsageError


def found(root: Path) -> tuple[str, ...]:
    """The product, if it is there."""
    return ("vad",) if (root / "train" / "good").is_dir() else ()


def scan_vad(folder: Path, class_index: int, good_names: Sequence[str]) -> Scan:
    """What {train,test}/{good,bad} and test/bad_unseen_defects beside the class's would-be folder hold.

    Raises:
        UsageError: images are missing.
    """
    scan = scan_mvtec(folder.parent, class_index, good_names, masks_optional=True)
    if {item.label for item in scan.test} != {0, 1}:
        raise UsageError(f"--data-path: {folder.parent} lacks images in test/good or test/bad")
    return scan


SPEC = DatasetSpec(
    title="VAD",
    classes=("vad",),
    places=("data/vad",),
    inner=("vad",),
    scan=scan_vad,
    found=found,
    counts={"vad": Counts(train=2000, good=1000, bad=1000)},
    layout="train/{good,bad} and test/{good,bad,bad_unseen_defects}",
    licence="see its source",
    citation="Baitieva et al., Supervised Anomaly Detection for Complex Industrial Images, CVPR 2024, arXiv 2405.04953",
    hint="; unpack VAD there (https://github.com/abc-125/vad)",
)
