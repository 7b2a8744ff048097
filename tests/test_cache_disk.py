"""The feature cache on disk: damage, full disks, other users, dead writers, and what --mode cache does."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cache import CPU, dataset, store

from datasets.cache import (
    FeatureSize,
    NoRoom,
    allocate,
    check_space,
    disk_store,
    free_space,
    lock_of,
    open_store,
    sweep,
)
from datasets.features import CachedFeatures
from datasets.folder import ImageFolder
from fake_data import METHOD, TINY, make_mvtec
from main import main, parse
from stage import Stage
from utils.run.lock import seized


def counted_store(folder: Path, images: ImageFolder) -> tuple[CachedFeatures, int]:
    """A store on disk, and how many images were computed for it."""
    calls: list[int] = []
    return store("disk", folder, images, calls), sum(calls)


DAMAGES = {
    "a file is gone": lambda folder: (folder / "level_1.npy").unlink(),
    "masks are gone": lambda folder: (folder / "masks.npy").unlink(),
    "all is gone": lambda folder: [path.unlink() for path in folder.iterdir()],
    "cut off": lambda folder: os.truncate(folder / "level_0.npy", 300),
    "empty": lambda folder: os.truncate(folder / "masks.npy", 0),
    "text": lambda folder: (folder / "level_2.npy").write_text("not an array"),
    "other shape": lambda folder: np.save(folder / "level_3.npy", np.zeros((10, 2, 2, 5), np.float16)),
    "other type": lambda folder: np.save(folder / "level_3.npy", np.load(folder / "level_3.npy").astype(np.float32)),
    "fewer images": lambda folder: np.save(folder / "level_3.npy", np.load(folder / "level_3.npy")[1:]),
    "objects": lambda folder: np.save(folder / "level_3.npy", np.array([{}, {}], object), allow_pickle=True),
    "another level": lambda folder: np.save(folder / "level_4.npy", np.zeros(3)),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_cache_is_made_anew(tmp_path: Path, case: str, capsys: pytest.CaptureFixture) -> None:
    images, folder = dataset(make_mvtec(tmp_path / "data", ("bottle",), train=2, good=1, bad=1)), tmp_path / "c" / "k"
    first, count = counted_store(folder, images)
    whole = [level.clone() for level in first.levels]
    del first
    DAMAGES[case](folder)
    again, repeated = counted_store(folder, images)
    assert repeated == count == 4
    assert capsys.readouterr().err == f"{folder} is damaged: it is made anew\n"
    assert all(torch.equal(a, b) for a, b in zip(whole, again.levels, strict=True))
    assert counted_store(folder, images)[1] == 1, "one image for the size, and no other"


@pytest.mark.skipif(
    not hasattr(os, "posix_fallocate"), reason="limits of file sizes are tested where they are enforced"
)
def test_a_full_disk_ends_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    import resource
    import signal

    images, folder = dataset(make_mvtec(tmp_path / "data", ("bottle",))), tmp_path / "c" / "k"
    before, heeded = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
    try:
        with pytest.raises(
            NoRoom, match=r"--cache disk: cannot keep the features of 9 images .* in .*c: File too large$"
        ):
            store("disk", folder, images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heeded)
    assert list((tmp_path / "c").iterdir()) == []
    assert len(store("disk", folder, images).levels) == 4


def test_space_is_taken_before_it_is_used(tmp_path: Path) -> None:
    size = FeatureSize(count=100, shapes=((8, 8, 64),), mask=512)
    disk_store(size, tmp_path)
    sparse = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    allocate(tmp_path)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) >= size.total > sparse
    assert open_store(tmp_path).levels[0].shape == (100, 8, 8, 64)


def test_room_is_kept_for_checkpoints(tmp_path: Path) -> None:
    size, free = FeatureSize(count=1, shapes=((2, 2, 2),), mask=8), int(free_space("disk", tmp_path, CPU))
    assert check_space(size, "disk", tmp_path, CPU, keep=free // 2) is None
    assert "GB are free and" in str(check_space(size, "disk", tmp_path, CPU, keep=2 * free))
    assert "are kept for training" in str(check_space(size, "device", tmp_path, CPU, keep=1 << 60))
    config = parse([*TINY, *METHOD, "--dataset", "mvtec", "--work-dir", str(tmp_path)])[0]
    stage = Stage(config)
    flow = stage.build_flow()
    assert stage.room() == 12 * sum(v.numel() * v.element_size() for v in flow.state_dict().values()) > 1e5
    weights = sum(p.numel() * p.element_size() for p in flow.parameters())
    assert stage.room("device") > 5 * weights and stage.room("ram") == 0
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    stage.room()
    stage.room("device")
    assert torch.equal(torch.rand(2), expected), "it draws nothing"


@pytest.mark.skipif(os.name != "posix", reason="file modes")
def test_other_users_may_read_a_cache(tmp_path: Path) -> None:
    images, folder = dataset(make_mvtec(tmp_path / "data", ("bottle",), train=2, good=1, bad=1)), tmp_path / "c" / "k"
    before = os.umask(0o022)
    try:
        store("disk", folder, images)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}
    assert modes == {0o755, 0o644}


def hold_part(folder: str, ready: Any, done: Any) -> None:
    with seized(lock_of(Path(folder))):
        ready.set()
        done.wait(60)


def test_parts_go_at_once_where_their_writer_is_dead(tmp_path: Path) -> None:
    parts = [tmp_path / name for name in ("alive.part", "dead.part", "unknown.part")]
    for part in parts:
        part.mkdir()
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    alive = context.Process(target=hold_part, args=(str(parts[0]), ready, done))
    dead = context.Process(target=hold_part, args=(str(parts[1]), context.Event(), context.Event()))
    alive.start()
    dead.start()
    ready.wait(60)
    while not lock_of(parts[1]).is_file():
        time.sleep(0.01)
    dead.kill()
    dead.join()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alive.part", "alive.part.lock", "unknown.part"]
    done.set()
    alive.join()


def test_caches_are_listed_and_cleared(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    images = dataset(make_mvtec(tmp_path / "data", ("bottle",), train=2, good=1, bad=1))
    root = tmp_path / "w" / "cache"
    for name in ("old", "new"):
        store("disk", root / name, images)
    (root / "not ours").mkdir()
    os.utime(root / "old", (time.time() - 40 * 86400,) * 2)
    capsys.readouterr()
    listing = ["--mode", "cache", "--work-dir", str(tmp_path / "w")]
    assert main(listing) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and shown[-1].startswith(f"2 caches under {root}, 0.00 GB")
    assert any(line.startswith(f"{root / 'old'}: 0.00 GB, last used 40.0 days ago") for line in shown)
    assert main([*listing, "--clear", "30"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("GB; 1 removed")
    assert sorted(path.name for path in root.iterdir()) == ["new", "not ours"]
    assert main([*listing, "--clear", "0"]) == 0
    assert [path.name for path in root.iterdir()] == ["not ours"]
    assert main(["--mode", "cache", "--work-dir", str(tmp_path / "none")]) == 0
    assert main(["--clear", "0"]) == 2
    assert "--clear: does nothing without --mode cache" in capsys.readouterr().err


def test_using_a_cache_keeps_it_from_being_cleared(tmp_path: Path) -> None:
    images, folder = dataset(make_mvtec(tmp_path / "data", ("bottle",), train=2, good=1, bad=1)), tmp_path / "c" / "k"
    store("disk", folder, images)
    os.utime(folder, (1, 1))
    store("disk", folder, images)
    assert time.time() - folder.stat().st_mtime < 600
