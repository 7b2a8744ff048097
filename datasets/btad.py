"""BTAD, the beanTech anomaly detection data (Mishra et al., ISIE 2021), as its archive unpacks.

Masks are named like their images (.png of 01 and 02, .bmp of 03), and eleven of them are empty.
"""

from datasets.folder import Counts, DatasetSpec
from datasets.walk import scan_mvtec

COUNTS = {
    "01": Counts(train=400, good=21, bad=49),
    "02": Counts(train=399, good=30, bad=200),
    "03": Counts(train=1000, good=400, bad=41),
}
SPEC = DatasetSpec(
    title="BTAD",
    classes=tuple(COUNTS),
    places=("data/BTech_Dataset_transformed", "data/BTAD"),
    inner=("BTech_Dataset_transformed",),
    scan=scan_mvtec,
    counts=COUNTS,
    trusts_masks=True,
    layout="01/train/ok, 01/test/ok, 01/test/ko and 01/ground_truth/ko, and so for 02 and 03",
    licence="CC BY-NC-SA 4.0",
    citation="Mishra et al., VT-ADL, ISIE 2021, arXiv 2104.10036",
    hint="; unpack BTAD there (https://github.com/pankajmishra000/VT-ADL)",
)
