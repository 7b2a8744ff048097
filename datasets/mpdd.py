"""MPDD, metal parts (Jezek et al., ICUMT 2021), as its archive unpacks."""

from datasets.folder import Counts, DatasetSpec
from datasets.walk import scan_mvtec

COUNTS = {
    "bracket_black": Counts(train=289, good=32, bad=47),
    "bracket_brown": Counts(train=185, good=26, bad=51),
    "bracket_white": Counts(train=110, good=30, bad=30),
    "connector": Counts(train=128, good=30, bad=14),
    "metal_plate": Counts(train=54, good=26, bad=71),
    "tubes": Counts(train=122, good=32, bad=69),
}
SPEC = DatasetSpec(
    title="MPDD",
    classes=tuple(COUNTS),
    places=("data/MPDD",),
    inner=("MPDD",),
    scan=scan_mvtec,
    counts=COUNTS,
    layout="CLASS/train/good, CLASS/test/{good,DEFECT} and CLASS/ground_truth/DEFECT/NAME_mask.png",
    licence="CC BY-NC-SA 4.0",
    citation="Jezek et al., Deep learning-based defect detection of metal parts, ICUMT 2021",
    hint="; unpack MPDD there (https://github.com/stepanje/MPDD)",
)
