"""MVTec AD (Bergmann et al., CVPR 2019), as its archive unpacks."""

from datasets.folder import Counts, DatasetSpec
from datasets.walk import scan_mvtec
from default import MVTEC_CLASSES

COUNTS = {
    "carpet": Counts(train=280, good=28, bad=89), "grid": Counts(train=264, good=21, bad=57),
    "leather": Counts(train=245, good=32, bad=92), "tile": Counts(train=230, good=33, bad=84),
    "wood": Counts(train=247, good=19, bad=60), "bottle": Counts(train=209, good=20, bad=63),
    "cable": Counts(train=224, good=58, bad=92), "capsule": Counts(train=219, good=23, bad=109),
    "hazelnut": Counts(train=391, good=40, bad=70), "metal_nut": Counts(train=220, good=22, bad=93),
    "pill": Counts(train=267, good=26, bad=141), "screw": Counts(train=320, good=41, bad=119),
    "toothbrush": Counts(train=60, good=12, bad=30), "transistor": Counts(train=213, good=60, bad=40),
    "zipper": Counts(train=240, good=32, bad=119),
}  # fmt: skip
SPEC = DatasetSpec(
    title="MVTec AD",
    classes=MVTEC_CLASSES,
    places=("data/MVTec", "data/mvtec_anomaly_detection"),
    scan=scan_mvtec,
    counts=COUNTS,
    layout="CLASS/train/good, CLASS/test/{good,DEFECT} and CLASS/ground_truth/DEFECT/NAME_mask.png",
    licence="CC BY-NC-SA 4.0",
    citation="Bergmann et al., The MVTec Anomaly Detection Dataset, IJCV 129, 2021",
    hint="; unpack MVTec AD there (https://www.mvtec.com/company/research/datasets/mvtec-ad)",
)
