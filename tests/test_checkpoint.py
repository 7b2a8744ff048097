"""Checkpoint files and random states: written whole or not at all, read without running code, restored exactly."""

import io
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from default import UsageError
from utils.run.checkpoint import FORMAT, read_checkpoint, write_checkpoint
from utils.run.log import RunLog, read_lines
from utils.run.seed import random_state, restore_random_state, seed_everything

ROOT = Path(__file__).resolve().parents[1]


class Trap:
    """Unpickling it makes a folder named `pwned`."""

    def __reduce__(self) -> tuple:
        return Path.mkdir, (Path("pwned"),)


class Unwritable:
    """Pickling it fails, as a full disk would, after the first tensors have been written."""

    def __reduce__(self) -> tuple:
        raise OSError("no space left")


def test_round_trip(tmp_path: Path) -> None:
    content = {"epoch": 3, "model": {"w": torch.randn(2, 2)}, "best": {"aupro": {"value": 0.5, "epoch": 1}}}
    write_checkpoint(tmp_path / "last.pt", content)
    read = read_checkpoint(tmp_path / "last.pt")
    assert (read["format"], read["epoch"], read["best"]) == (FORMAT, 3, content["best"])
    assert torch.equal(read["model"]["w"], content["model"]["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_full_disk_leaves_the_old_file_and_is_named(tmp_path: Path) -> None:
    """In another process, whose files may have no more than 100,000 bytes: the system's own error."""
    program = """
import resource, sys
from pathlib import Path
import torch
from utils.run.checkpoint import write_checkpoint
from utils.run.writer import write_whole
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for name, write in (("last.pt", lambda path: write_checkpoint(path, {"model": torch.ones(50_000)})),
                    ("scores.csv", lambda path: write_whole(path, b"x" * 200_000))):
    (folder / name).write_text("old")
    try:
        write(folder / name)
    except OSError as error:
        assert error.filename == str(folder / name), error
        print(name, (folder / name).read_text())
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("last.pt old\nscores.csv old\n", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "scores.csv"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    write_checkpoint(path, {"epoch": 1})
    with pytest.raises(OSError, match="no space left"):
        write_checkpoint(path, {"model": torch.ones(1000), "epoch": Unwritable()})
    assert read_checkpoint(path)["epoch"] == 1
    write_checkpoint(path, {"epoch": 2})
    assert read_checkpoint(path)["epoch"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zipped: bool, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Trap()}, "trap.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match=r"--eval_ckpt: cannot read trap.pt: it holds code or objects"):
        read_checkpoint("trap.pt")
    Path("trap.pkl").write_bytes(pickle.dumps({"model": Trap()}))
    with pytest.raises(UsageError, match="code or objects, which are not loaded"):
        read_checkpoint("trap.pkl")
    assert not Path("pwned").exists()
    pickle.loads(Path("trap.pkl").read_bytes())
    assert Path("pwned").exists(), "the trap works"
    assert not recwarn.list


def damaged(count: int = 60) -> list[bytes]:
    """Random bytes, and both of PyTorch's formats cut off and with a few wrong bytes."""
    rng, files = random.Random(0), []
    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"a": torch.ones(3, 3), "b": {"c": 1}}, file, _use_new_zipfile_serialization=zipped)
        whole = file.getvalue()
        files += [whole[: rng.randrange(len(whole) - 1)] for _ in range(count)]
        for _ in range(count):
            flipped = bytearray(whole)
            for _ in range(3):
                flipped[rng.randrange(len(flipped))] = rng.randrange(256)
            files.append(bytes(flipped))
    return files + [rng.randbytes(rng.randrange(200)) for _ in range(2 * count)] + [b"", b"some text\n", b'{"a": 1}']


def test_damaged_files_end_in_one_line(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path, refused = tmp_path / "x.pt", 0
    for content in damaged():
        path.write_bytes(content)
        try:
            read_checkpoint(path)  # a wrong byte inside a tensor is not noticed
        except UsageError as error:
            refused += 1
            assert str(error).startswith(f"--eval_ckpt: cannot read {path}: it ")
            assert "\n" not in str(error)
    assert refused > 250
    assert not recwarn.list


def test_other_things_than_dictionaries_are_named(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match="is not a checkpoint: it holds a list"):
        read_checkpoint(tmp_path / "list.pt")
    with pytest.raises(UsageError, match="--resume: no such file: "):
        read_checkpoint(tmp_path / "none.pt", "--resume")


def draws() -> list[float]:
    return [random.random(), float(np.random.normal()), float(torch.rand(())), float(np.random.rand())]


def test_random_states_round_trip_through_a_file(tmp_path: Path) -> None:
    seed_everything(5)
    np.random.normal()  # leaves a second Gaussian behind, which is part of the state
    write_checkpoint(tmp_path / "s.pt", {"random": random_state()})
    expected = [draws() for _ in range(3)]
    seed_everything(6)
    restore_random_state(read_checkpoint(tmp_path / "s.pt")["random"])
    assert [draws() for _ in range(3)] == expected


def test_a_log_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    """A killed run may leave an entry that no checkpoint covers, or half a line."""
    log = RunLog(tmp_path, kept=0, config={}, tensorboard=False, wandb=False)
    for epoch in (1, 2):
        log.write({"epoch": epoch, "loss": float("nan")})
    with log.path.open("a", encoding="utf-8") as file:
        file.write('{"epoch": 3, "lo')
    log = RunLog(tmp_path, kept=1, config={}, tensorboard=False, wandb=False)
    log.write({"epoch": 2, "loss": 1.5})
    assert read_lines(log.path) == [{"epoch": 1, "loss": None}, {"epoch": 2, "loss": 1.5}]


BAD = [b"", b"{", b"null", b"[1, 2]", b'{"epoch": "1"}', b'{"loss": 1}', b"\xff\xfe\x00", b"[" * 100_000, b"{}"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_bad_line_costs_no_other(tmp_path: Path, bad: bytes, place: int, capsys: pytest.CaptureFixture) -> None:
    path, whole = tmp_path / "metrics.jsonl", [b'{"epoch": %d}' % n for n in (1, 2, 3)]
    path.write_bytes(b"\n".join([*whole[:place], bad, *whole[place:]]) + b"\n")
    assert [entry["epoch"] for entry in read_lines(path)] == [1, 2, 3]
    said = f"warning: {path}: line {place + 1} is damaged and left out\n"
    assert capsys.readouterr().err == (said if bad else "")
    RunLog(tmp_path, kept=2, config={}, tensorboard=False, wandb=False).write({"epoch": 3, "new": 1})
    assert path.read_text(encoding="utf-8") == '{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3, "new": 1}\n'
