"""MVTec LOCO AD (Bergmann et al., IJCV 2022), as its archive unpacks: one mask file a region, and sPRO."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datasets.folder import Counts, DatasetSpec, Scan
from datasets.saturation import CONFIG, SproProtocol, read_config
from datasets.walk import mask_folder, scan_mvtec

COUNTS = {
    "breakfast_box": Counts(train=351, held_out=62, good=102, bad=173),
    "juice_bottle": Counts(train=335, held_out=54, good=94, bad=236),
    "pushpins": Counts(train=372, held_out=69, good=138, bad=172),
    "screw_bag": Counts(train=360, held_out=60, good=122, bad=219),
    "splicing_connectors": Counts(train=360, held_out=60, good=119, bad=193),
}


def scan_loco(folder: Path, class_index: int, good_names: Sequence[str]) -> Scan:
    """What a class holds (see `SPEC.layout`).

    Raises:
        UsageError: images, masks or the saturations are missing.
    """
    scan = scan_mvtec(folder, class_index, good_names, mask_of=mask_folder)
    read_config(folder / CONFIG)
    return scan


SPEC = DatasetSpec(
    title="MVTec LOCO",
    classes=tuple(COUNTS),
    places=("data/mvtec_loco_anomaly_detection", "data/mvtec_loco"),
    inner=("mvtec_loco_anomaly_detection",),
    scan=scan_loco,
    counts=COUNTS,
    trusts_masks=True,  # a missing part may take most of an image
    protocol=SproProtocol.of,
    layout="CLASS/{train,validation}/good, CLASS/test/{good,logical_anomalies,structural_anomalies}, "
    "CLASS/ground_truth/KIND/NAME/000.png and CLASS/defects_config.json",
    licence="CC BY-NC-SA 4.0",
    citation="Bergmann et al., Beyond Dents and Scratches, IJCV 130, 2022",
    hint="; unpack MVTec LOCO there (https://www.mvtec.com/company/research/datasets/mvtec-loco)",
)
