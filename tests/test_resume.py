"""What --resume and --mode test refuse, what they say of it, and what is written before what."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from datasets import build_datasets, split_holdout
from default import from_dict
from fake_data import METHOD, TINY, make_mvtec
from main import main
from show import pictured
from stage import Stage, load_detector
from test import Ended, evaluate
from utils.run.checkpoint import read_checkpoint

RESULTS = ("json", "csv", "md", "tex")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tree of one class in `data`, and a finished run in `work`."""
    folder = tmp_path_factory.mktemp("resume")
    make_mvtec(folder / "data", classes=("grid",), bad=2)
    assert main(command(folder)) == 0
    return folder


def command(place: Path, *more: str) -> list[str]:
    data = ["--dataset", "mvtec", "--data-path", str(place / "data"), "--class-names", "grid"]
    work = ["--work-dir", str(place / "work"), "--meta-epochs", "2", "--holdout", "0.2", "--no-compare"]
    return [*TINY, *METHOD, *data, *work, *more]


def run_folder(place: Path) -> Path:
    (folder,) = (place / "work").glob("mvtec-*")
    return folder


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    """Of all of it."""
    shutil.copytree(place, tmp_path / "copy")
    return tmp_path / "copy"


def test_other_images_are_refused(copy: Path, capsys: pytest.CaptureFixture) -> None:
    images, last = copy / "data" / "grid" / "train" / "good", run_folder(copy) / "last.pt"
    before = last.read_bytes()
    argv = command(copy, "--resume", "--meta-epochs", "3")
    shutil.copy(images / "000.png", images / "other.png")
    assert main(argv) == 2
    assert f"--data-path: {last} was trained on 6 images of grid, and here are 7; give --resume the same images" in (
        capsys.readouterr().err
    )
    (images / "000.png").unlink()
    assert main(argv) == 2
    assert "was trained on other images of grid than are here (as many, but other names or sizes)" in (
        capsys.readouterr().err
    )
    assert last.read_bytes() == before
    (images / "other.png").rename(images / "000.png")
    shutil.move(copy / "data", copy / "moved")
    assert main([*argv, "--data-path", str(copy / "moved")]) == 0, "the same images elsewhere"


def test_fewer_epochs_are_refused(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(command(place, "--resume", "--meta-epochs", "1")) == 2
    last = run_folder(place) / "last.pt"
    said = f"--meta-epochs: {last} is of meta epoch 2, so expected at least 2 with --resume, but got 1"
    assert capsys.readouterr().err == f"main.py: error: {said}\n"


def test_a_resumed_run_says_where_it_begins(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run_folder(place)
    for file in folder.glob("results.*"):
        file.unlink()
    assert main(command(place, "--resume")) == 0
    assert f"--resume: {folder} has its 2 meta epochs; it is evaluated\n" in capsys.readouterr().out
    assert all((folder / f"results.{suffix}").is_file() for suffix in RESULTS), "written now if they were not"
    argv = command(place, "--resume", "--work-dir", str(tmp_path), "--meta-epochs", "1")
    assert main(argv) == 0
    out = capsys.readouterr().out
    name = folder.name
    assert f"--resume: there is no run {name} in {tmp_path} yet; a new one starts\n" in out
    assert f"--resume: {tmp_path / name} goes on with meta epoch 1 of 1, the first\n" in out


def test_a_folder_of_several_runs_is_no_run(copy: Path, capsys: pytest.CaptureFixture) -> None:
    folder = run_folder(copy)
    asked = ["--mode", "test", "--eval_ckpt", str(copy / "work"), "--work-dir", str(copy / "tested"), "--no-report"]
    assert main(asked) == 0, "one run alone is meant"
    other = folder.with_name("other-seed1")
    (other / "grid").mkdir(parents=True)
    shutil.copy(folder / "config.json", other)
    assert main(asked) == 0, "a run that has no checkpoint yet is not meant"
    shutil.copy(folder / "last.pt", other / "grid")
    capsys.readouterr()
    assert main(asked) == 2
    said = f"--eval_ckpt: {copy / 'work'} holds 2 runs; name one of them: {folder.name}, other-seed1"
    assert capsys.readouterr().err == f"main.py: error: {said}\n"


@pytest.mark.parametrize("obstacle", ["vanished", "no folder", "no report"])
def test_tables_come_before_pictures_which_may_fail(
    obstacle: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content = read_checkpoint(run_folder(copy) / "last.pt")
    saved = from_dict(content["config"])
    saved = replace(saved, data=replace(saved.data, data_path=str(copy / "data")))
    stage = Stage(saved)
    detector = load_detector(content, stage, "last.pt")
    train, test = build_datasets(saved.data, ("grid",), saved.score_size)
    folder = tmp_path / "run"
    folder.mkdir()
    ended = Ended(folder, saved)
    batches = stage.ordered_features(test).epoch(0)
    ended.add(evaluate(detector, batches, ("grid",), saved.eval, wanted=pictured(test, saved.eval)))
    ended.write_tables()
    written = {"scores.csv", *(f"results.{suffix}" for suffix in RESULTS)}
    assert {p.name for p in folder.iterdir()} == written
    victim = next(item.path for item in test.items if item.kind == "broken")
    if obstacle == "vanished":
        victim = victim.rename(victim.with_suffix(".gone")).with_suffix(victim.suffix)
    elif obstacle == "no folder":
        (folder / "pictures").write_text("in the way")
    else:
        (folder / "report.html.part").mkdir()
    capsys.readouterr()
    ended.show(stage, detector, (*split_holdout(train, saved.data.holdout), test), 1)
    ended.report()
    said = capsys.readouterr()
    warnings = said.err.splitlines()
    assert warnings and all(line.startswith("warning: ") and " is left out: " in line for line in warnings)
    pictures = folder / "pictures" / "grid"
    if obstacle == "vanished":
        assert [line for line in warnings if str(pictures / "broken_000.jpg") in line and str(victim) in line]
        assert {p.name for p in pictures.iterdir()} == {"good_000.jpg", "scratch_000.jpg"}
    elif obstacle == "no folder":
        assert len(warnings) == 3 and f"{pictures / 'broken_000.jpg'} is left out" in warnings[0]
        assert (folder / "report.html").is_file()
    else:
        assert re.fullmatch(rf"warning: {folder / 'report.html'} is left out: .*", warnings[0])
        assert not (folder / "report.html").exists() and len(list(pictures.iterdir())) == 3
    assert "\nmean " in said.out and f"run folder: {folder}" in said.out


def test_a_name_that_is_too_long_for_its_picture_costs_nothing_else(copy: Path, capsys: pytest.CaptureFixture) -> None:
    kind, masks = (copy / "data" / "grid" / part / "broken" for part in ("test", "ground_truth"))
    name = "0" * 245  # the first one in order, which is drawn
    (kind / "000.png").rename(kind / f"{name}.png")
    (masks / "000_mask.png").rename(masks / f"{name}_mask.png")
    asked = ["--mode", "test", "--eval_ckpt", str(run_folder(copy)), "--work-dir", str(copy / "tested")]
    assert main([*asked, "--data-path", str(copy / "data")]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and f"broken_{name}.jpg is left out: [Errno" in line
    (folder,) = (copy / "tested").glob("test-*")
    assert (folder / "results.json").is_file() and (folder / "report.html").is_file()
