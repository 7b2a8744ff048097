"""AutoVI, parts of cars from a production line (Carvalho et al., 2024): masks in folders as in MVTec LOCO."""

from functools import partial

from datasets.folder import Counts, DatasetSpec
from datasets.saturation import SproProtocol
from datasets.walk import mask_folder, scan_mvtec

COUNTS = {
    "engine_wiring": Counts(train=285, good=285, bad=322),
    "pipe_clip": Counts(train=195, good=195, bad=142),
    "pipe_staple": Counts(train=191, good=188, bad=117),
    "tank_screw": Counts(train=318, good=318, bad=95),
    "underbody_pipes": Counts(train=161, good=161, bad=184),
    "underbody_screw": Counts(train=373, good=374, bad=18),
}
SPEC = DatasetSpec(
    title="AutoVI",
    classes=tuple(COUNTS),
    places=("data/AutoVI", "data/autovi"),
    scan=partial(scan_mvtec, mask_of=mask_folder),
    counts=COUNTS,
    trusts_masks=True,
    protocol=SproProtocol.of,
    layout="CLASS/train/good, CLASS/test/{good,DEFECT} and CLASS/ground_truth/DEFECT/NAME/0000.png",
    licence="CC BY-NC-SA 4.0",
    citation="Carvalho et al., The Automotive Visual Inspection Dataset (AutoVI), 2024",
    hint="; unpack the classes of AutoVI there (https://autovi.utc.fr)",
)
