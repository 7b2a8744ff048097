"""MVTec AD 2 (Heckler-Kram et al., 2025), as its archive unpacks.

Evaluated is what is public; the two private test sets have no labels, and `--mode submit` writes their score maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets.folder import Counts, DatasetSpec, Scan
from datasets.walk import scan_mvtec

PRIVATE = ("test_private", "test_private_mixed")
IN_PRIVATE = {
    "can": 321, "fabric": 314, "fruit_jelly": 255, "rice": 277, "sheet_metal": 142, "vial": 276, "wallplugs": 232,
    "walnuts": 228,
}  # fmt: skip
COUNTS = {
    "can": Counts(train=412, held_out=46, good=72, bad=90),
    "fabric": Counts(train=387, held_out=43, good=66, bad=90),
    "fruit_jelly": Counts(train=263, held_out=37, good=20, bad=60),
    "rice": Counts(train=313, held_out=35, good=42, bad=90),
    "sheet_metal": Counts(train=137, held_out=19, good=24, bad=90),
    "vial": Counts(train=291, held_out=41, good=35, bad=105),
    "wallplugs": Counts(train=293, held_out=33, good=60, bad=90),
    "walnuts": Counts(train=432, held_out=48, good=60, bad=90),
}


def scan_ad_2(folder: Path, class_index: int, good_names: Sequence[str]) -> Scan:
    """What a class holds: CLASS/{train,validation}/good, CLASS/test_public/{good,bad,ground_truth/bad}.

    Raises:
        UsageError: images or masks are missing.
    """
    return scan_mvtec(folder, class_index, good_names, test_name="test_public", truth_name="test_public/ground_truth")


SPEC = DatasetSpec(
    title="MVTec AD 2",
    classes=tuple(COUNTS),
    places=("data/mvtec_ad_2",),
    inner=("mvtec_ad_2",),
    scan=scan_ad_2,
    counts=COUNTS,
    layout="CLASS/train/good, CLASS/validation/good, CLASS/test_public/{good,bad} and "
    "CLASS/test_public/ground_truth/bad/NAME_mask.png",
    licence="CC BY-NC-SA 4.0",
    citation="Heckler-Kram et al., The MVTec AD 2 Dataset, arXiv 2503.21622",
    hint="; unpack MVTec AD 2 there (https://www.mvtec.com/company/research/datasets/mvtec-ad-2)",
)
