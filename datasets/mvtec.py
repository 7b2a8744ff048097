"""MVTec AD (Bergmann et al., CVPR 2019), as its archive unpacks."""

from datasets.folder import DatasetSpec
from datasets.walk import scan_mvtec
from default import MVTEC_CLASSES

SPEC = DatasetSpec(
    title="MVTec AD",
    classes=MVTEC_CLASSES,
    places=("data/MVTec", "data/mvtec_anomaly_detection"),
    scan=scan_mvtec,
    hint="; unpack MVTec AD there (https://www.mvtec.com/company/research/datasets/mvtec-ad)",
)
