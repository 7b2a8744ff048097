"""The feature cache: all places agree with computed features, stale and half-written caches are never used."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from datasets import build_datasets
from datasets.cache import FeatureSize, cache_key, check_space, make_store
from datasets.features import CachedFeatures, LiveFeatures, prefetched
from datasets.folder import ImageFolder
from datasets.loaders import ordered_loader
from default import DataConfig, UsageError
from fake_data import METHOD, TINY, make_mvtec
from main import main, parse
from stage import Stage

CPU = torch.device("cpu")


def extract(image: torch.Tensor) -> list[torch.Tensor]:
    """Four levels of made-up features; the first one goes beyond the range of half precision."""
    small = [torch.nn.functional.avg_pool2d(image, s).repeat(1, 2, 1, 1) for s in (8, 16, 32, 32)]
    return [small[0] * 1e5, *small[1:]]


def dataset(root: Path) -> ImageFolder:
    return build_datasets(DataConfig(data_path=str(root), class_names=("bottle",), input_size=64), ("bottle",))[1]


def store(place: str, folder: Path, images: ImageFolder, count: list[int] | None = None) -> CachedFeatures:
    def counted(image: torch.Tensor) -> list[torch.Tensor]:
        if count is not None:
            count.append(len(image))
        return extract(image)

    loader = ordered_loader(images, batch_size=4, workers=0)
    made = make_store(place, folder, loader, counted, device=CPU, progress=lambda batches, _: iter(batches))
    return CachedFeatures(loader, made, CPU)


@pytest.mark.parametrize("place", ["disk", "ram", "device"])
def test_every_place_agrees_with_computed_features(place: str, tmp_path: Path) -> None:
    images = dataset(make_mvtec(tmp_path / "data", classes=("bottle",)))
    live = LiveFeatures(ordered_loader(images, batch_size=4, workers=0), extract, CPU)
    cached = store(place, tmp_path / "cache" / "key", images)
    assert len(cached) == len(live) == 3
    for a, b in zip(cached.epoch(0), live.epoch(0), strict=True):
        assert a.path == b.path
        assert torch.equal(a.mask, b.mask)
        assert torch.equal(a.label, b.label)
        for x, y in zip(a.features, b.features, strict=True):
            assert x.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(x, y.clamp(-65504, 65504), rtol=2**-11, atol=2**-24)
    assert (tmp_path / "cache" / "key").is_dir() == (place == "disk")
    read = cached.read([2, 0])
    assert read.path == (str(images.items[2].path), str(images.items[0].path))


def test_a_whole_cache_is_read_again_and_memory_is_filled_from_it(tmp_path: Path) -> None:
    images, folder, calls = dataset(make_mvtec(tmp_path / "data", classes=("bottle",))), tmp_path / "c" / "k", []
    first = store("disk", folder, images, calls)
    assert calls == [1, 4, 4, 1]  # one black image for the size, then all
    for place in ("disk", "ram"):
        again = store(place, folder, images, calls)
        assert sum(calls) <= 12  # one more image each time
        assert all(torch.equal(a, b) for a, b in zip(first.levels, again.levels, strict=True))


def test_the_key_follows_files_and_settings(tmp_path: Path) -> None:
    images = dataset(make_mvtec(tmp_path, classes=("bottle",)))
    keys = {cache_key(images, size=64), cache_key(images, size=32)}
    os.utime(images.items[0].path, (1, 1))
    keys.add(cache_key(images, size=64))
    assert len(keys) == 3


def test_a_broken_off_build_leaves_nothing_and_old_remains_are_swept(tmp_path: Path) -> None:
    images = dataset(make_mvtec(tmp_path / "data", classes=("bottle",)))
    old, young = tmp_path / "c" / "x.1.part", tmp_path / "c" / "x.2.part"
    for folder in (old, young):
        folder.mkdir(parents=True)
    os.utime(old, (1, 1))

    def broken(batches: object, _: str) -> object:
        yield next(iter(batches))  # type: ignore[call-overload]
        raise KeyboardInterrupt

    loader = ordered_loader(images, batch_size=4, workers=0)
    with pytest.raises(KeyboardInterrupt):
        make_store("disk", tmp_path / "c" / "k", loader, extract, device=CPU, progress=broken)  # type: ignore[arg-type]
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["x.2.part"]


def build_slowly(root: str, wait: float) -> None:
    """What one of two processes does: the same cache, slowly enough that both are at it."""
    images = dataset(Path(root) / "data")

    def slow(batches: object, _: str) -> object:
        for batch in batches:  # type: ignore[attr-defined]
            time.sleep(wait)
            yield batch

    loader = ordered_loader(images, batch_size=4, workers=0)
    folder = Path(root) / "c" / "k"
    made = make_store("disk", folder, loader, extract, device=CPU, progress=slow)  # type: ignore[arg-type]
    assert all(torch.isfinite(level.float()).all() for level in made.levels)
    assert all(bool((level.float().abs().amax((1, 2, 3)) > 0).all()) for level in made.levels)


def test_two_processes_that_build_at_once_both_end_well(tmp_path: Path) -> None:
    make_mvtec(tmp_path / "data", classes=("bottle",))
    context = multiprocessing.get_context("spawn")
    both = [context.Process(target=build_slowly, args=(str(tmp_path), wait)) for wait in (0.5, 0.6)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["k"]


@pytest.mark.parametrize("place", ["disk", "ram"])
def test_too_little_space(place: str, tmp_path: Path) -> None:
    size = FeatureSize(count=1 << 30, shapes=((64, 64, 256),), mask=8)
    assert "do not fit" in str(check_space(size, place, tmp_path / "new", CPU))
    assert check_space(FeatureSize(count=1, shapes=((2, 2, 2),), mask=8), place, tmp_path, CPU) is None


def test_prefetching_on_the_cpu_changes_nothing() -> None:
    assert list(prefetched(iter([1, 2, 3]), CPU)) == [1, 2, 3]  # type: ignore[list-item]


def test_auto_goes_without_where_pre_extract_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_mvtec(tmp_path / "data", classes=("bottle",))
    monkeypatch.setattr("datasets.cache.SHARE", 0.0)  # as if the disk were full
    argv = [*TINY, *METHOD, "--dataset", "folder", "--data-path", str(tmp_path / "data"), "--work-dir", str(tmp_path)]
    config = parse(argv)[0]
    images = build_datasets(config.data, ("bottle",))[0]
    assert isinstance(Stage(config).training_features(images), LiveFeatures)
    for extra in (["--pre-extract"], ["--cache", "disk"], ["--cache", "ram"]):
        with pytest.raises(UsageError, match="do not fit"):
            Stage(parse([*argv, *extra])[0]).training_features(images)
    monkeypatch.undo()
    assert isinstance(Stage(config).training_features(images), CachedFeatures)
    assert isinstance(Stage(parse([*argv, "--cache", "none"])[0]).training_features(images), LiveFeatures)


def test_contradicting_flags() -> None:
    assert main(["--cache", "none", "--pre-extract", "--dry-run"]) == 2


def cache_names(root: Path, *flags: str) -> tuple[str, list[torch.Tensor]]:
    """Which cache a configuration uses, and what it would hold of one image."""
    config = parse([*TINY, *METHOD, "--dataset", "mvtec", "--data-path", str(root), "--work-dir", str(root), *flags])[0]
    images = build_datasets(config.data, ("bottle",), config.score_size)[1]
    stage = Stage(config)
    return stage.cache_folder(images).name, stage.extract(images[0].image[None])


@pytest.mark.parametrize(
    "flags",
    [
        ("--pool-type", "max"), ("--pool-type", "none"), ("--memory", "5"), ("--amp-enable",), ("--eval-size", "32"),
        ("--input-size", "96"), ("--extractor", "test_resnet", "--no-pretrained"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_cache_is_never_used_for_other_features(tmp_path: Path, flags: tuple[str, ...]) -> None:
    root = make_mvtec(tmp_path / "data", classes=("bottle",), train=1, good=1, bad=1)
    (plain, features), (other, changed) = cache_names(root), cache_names(root, *flags)
    same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(features, changed, strict=True))
    if flags != ("--eval-size", "32"):
        assert (plain == other) == same, "one cache for what is equal, another one for what is not"
    else:
        assert plain != other, "it holds the masks, too"
    assert same == (flags == ("--eval-size", "32")) or flags == ("--amp-enable",)
    assert cache_names(root)[0] == plain
