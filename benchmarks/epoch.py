"""A whole training epoch of the cpu preset on real images: the released way and ours, in one run.

    python benchmarks/epoch.py --data-path DATA [--limit 20] [--cpu-time]

DATA holds one folder per class, as in MVTec AD. The released way reads and resizes every image, runs the extractor
with gradients on and takes a step of the reconstruction in released.py. Ours is train.py's own epoch, from the cache;
what building the cache costs, once for all runs on the same images, stands beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.released import ReleasedForward
from datasets import build_datasets, resolve_classes
from datasets.folder import ImageFolder
from datasets.loaders import train_loader
from default import Config, make_config
from models.extractor import FrozenExtractor
from models.first_look import first_look
from models.vqflow import VQFlow, pool_features
from stage import Stage
from steps import train_epoch


def released_epoch(stage: Stage, model: VQFlow, dataset: ImageFolder) -> None:
    """Images -> features -> step, batch by batch."""
    config, released = stage.config, ReleasedForward(model)
    extractor = FrozenExtractor(
        config.model.extractor, input_size=config.data.input_size, pretrained=config.model.pretrained
    )
    extractor.requires_grad_(True)
    loader = train_loader(dataset, batch_size=config.train.batch_size, workers=stage.workers, seed=config.run.seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    released.train()
    for batch in loader:
        pooled = pool_features(extractor.net(batch.image), extractor.strides, config.model.pool_type)
        loss = released(model.standardize(pooled))[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
        float(loss.detach())


def run(config: Config, rounds: int, cpu_time: bool) -> None:
    now = time.process_time if cpu_time else time.perf_counter
    dataset = build_datasets(config.data, resolve_classes(config.data))[0]
    stage = Stage(config)
    begin = now()
    source = stage.training_features(dataset)
    built = now() - begin
    detector = stage.build_detector()
    model = detector.flow
    ordered = stage.ordered_features(dataset)
    first_look(
        detector,
        lambda: (batch.features for batch in ordered.epoch(0)),
        images=len(dataset),
        batch_size=config.train.batch_size,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)
    released, ours = [], []
    for number in range(rounds):
        begin = now()
        released_epoch(stage, model.to(memory_format=torch.contiguous_format), dataset)  # type: ignore[call-overload]
        released.append(now() - begin)
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        begin = now()
        train_epoch(model, source.epoch(number), optimizer, config.train, start=0.5, step=0.0)
        ours.append(now() - begin)
    ratio = median(a / b for a, b in zip(released, ours, strict=True))
    print(f"{len(dataset)} images, {len(source)} batches of {config.train.batch_size}, {rounds} rounds")
    print(f"building the cache once: {built:.1f} s")
    print(f"released way {median(released):.1f} s, ours {median(ours):.1f} s an epoch, ratio {ratio:.1f}")
    print(f"two epochs with the cache built first: ratio {2 * median(released) / (built + 2 * median(ours)):.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--limit", type=int, help="images per class")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="one thread and its processor time")
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(
            "cpu", dataset="folder", data_path=args.data_path, limit=args.limit, work_dir=folder, device="cpu"
        )
        run(config, args.rounds, args.cpu_time)


if __name__ == "__main__":
    main()
