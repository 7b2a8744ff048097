"""Every mistake of the user's ends in one line and status 2, and nothing is lost."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from fake_data import METHOD, TINY, make_mvtec
from main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny tree under `data`, and one finished run under `runs/`."""
    folder = tmp_path_factory.mktemp("cli")
    make_mvtec(folder / "data")
    assert main(command(folder)) == 0
    return folder


def command(folder: Path, *more: str) -> list[str]:
    places = ["--dataset", "mvtec", "--data-path", str(folder / "data"), "--work-dir", str(folder / "runs")]
    return [*TINY, *METHOD, *places, "--class-names", "bottle", "grid", *more]


def trained(folder: Path) -> Path:
    return folder / "runs" / "mvtec-tf_efficientnet_lite0-multi-seed9826"


def state_of(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def refused(capsys: pytest.CaptureFixture[str], argv: list[str], *texts: str, keep: Path | None = None) -> str:
    """The one line in which a command ends; files under `keep` stay as they are."""
    before = state_of(keep) if keep else None
    capsys.readouterr()
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.endswith("\n")
    assert shown.err.count("\n") == 1
    assert shown.err.startswith("main.py: error: ")
    for text in texts:
        assert text in shown.err
    assert keep is None or state_of(keep) == before
    return shown.err


CASES: dict[str, tuple[str, ...]] = {
    "--dataset mvtek": ("--dataset: ", "mvtec, visa, folder, sample", "'mvtek'"),
    "--preset papers": ("--preset: ", "paper-mvtec, paper-visa, released", "'papers'"),
    "--extractor convnextv9_base": ("--extractor: ", "'convnextv9_base'", "convnextv2_base"),
    "--class-names botle": ("--class-names: 'botle'", "bottle, cable"),
    "--class-names all botle": ("--class-names: 'botle'", "bottle, cable"),
    "--batchsize 4": ("--batchsize: no such flag", "--batch-size"),
    "--frobnicate": ("--frobnicate: no such flag", "--help"),
    "--seed 1 x": ("'x'",),
    "--mode tset": ("--mode: ", "train, test", "'tset'"),
    "--pool-type sum": ("--pool-type: ", "avg, max, none", "'sum'"),
    "--quantize-type vector": ("--quantize-type: ", "residual, naive", "'vector'"),
    "--objective exact": ("--objective: ", "likelihood, released", "'exact'"),
    "--schedule poly": ("--schedule: ", "step, cosine, constant, released", "'poly'"),
    "--image-score max": ("--image-score: ", "mul, add, likelihood", "'max'"),
    "--device tpu": ("--device: ", "auto, cuda, cpu, mps", "'tpu'"),
    "--lr abc": ("--lr: ", "'abc'"),
    "--lr nan": ("--lr: ", "finite", "nan"),
    "--lr inf": ("--lr: ", "finite", "inf"),
    "--lr 0": ("--lr: ", "at least", "0.0"),
    "--lr -1e-4": ("--lr: ", "at least", "-0.0001"),
    "--lr": ("--lr: ",),
    "--input-size 384.5": ("--input-size: ", "'384.5'"),
    "--input-size 16": ("--input-size: ", "at least 32", "16"),
    "--batch-size 0": ("--batch-size: ", "at least 1", "0"),
    "--batch-size 13": ("--batch-size: ", "at most 12", "13"),
    "--meta-epochs 0": ("--meta-epochs: ", "at least 1", "0"),
    "--sub-epochs -2": ("--sub-epochs: ", "at least 1", "-2"),
    "--limit 0": ("--limit: ", "at least 1", "0"),
    "--workers -1": ("--workers: ", "at least 0", "-1"),
    "--seed -1": ("--seed: ", "at least 0", "-1"),
    "--top-k 1.5": ("--top-k: ", "at most 1.0", "1.5"),
    "--k-cpc 0": ("--k-cpc: ", "at least 1", "0"),
    "--k-cspc 0": ("--k-cspc: ", "at least 1", "0"),
    "--dim-cpc 0": ("--dim-cpc: ", "at least 1", "0"),
    "--pro-eval-interval 0": ("--pro-eval-interval: ", "at least 1", "0"),
    "--quantize-weight -1": ("--quantize-weight: ", "at least 0", "-1.0"),
    "--parallel-blocks 1 2": ("--parallel-blocks: ", "one value or three", "2"),
    "--parallel-blocks 0": ("--parallel-blocks: ", "at least 1", "0"),
    "--c-conds 1 2 3 4": ("--c-conds: ", "one value or three", "4"),
    "--c-pos-conds 8 8 16": ("--c-pos-conds: ", "must be equal", "8 8 16"),
    "--c-pos-conds 6": ("--c-pos-conds: ", "multiple of 4", "6"),
    "--resume=yes": ("--resume", "'yes'"),
    "--mode test": ("--eval_ckpt: ", "--mode test", "none"),
    "--noise 0.1 --no-standardize": ("--noise: ", "--no-standardize"),
    "--weights none.pth": ("--weights: ", "none.pth"),
}


@pytest.mark.parametrize("words", CASES)
def test_bad_values_end_in_one_line(capsys: pytest.CaptureFixture[str], place: Path, words: str) -> None:
    refused(capsys, command(place, *words.split()), *CASES[words], keep=place)


@pytest.mark.parametrize(
    ("words", "flag", "text"),
    [
        ("--no-quantize-enable", "--quantize-type", "--quantize-enable"),
        ("--no-quantize-enable --quantize-type naive", "--quantize-type", "--quantize-enable"),
        ("--mode test --eval_ckpt a.pt --resume", "--resume", "--mode test"),
        ("--mode test --eval_ckpt a.pt --tensorboard", "--tensorboard", "--mode test"),
        ("--mode test --eval_ckpt a.pt --wandb-enable", "--wandb-enable", "--mode test"),
        ("--eval_ckpt a.pt", "--eval_ckpt", "--mode train"),
        ("--weights a.pth --no-pretrained", "--weights", "--no-pretrained"),
    ],
)
def test_switches_that_would_do_nothing_are_refused(
    capsys: pytest.CaptureFixture[str], place: Path, words: str, flag: str, text: str
) -> None:
    refused(capsys, command(place, *words.split()), f"main.py: error: {flag}: ", text, keep=place)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str], place: Path, device: str) -> None:
    if torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available():
        pytest.skip(f"this machine has {device}")
    refused(capsys, command(place, "--device", device), f"--device: '{device}'", "cpu", keep=place)


def test_a_logger_that_is_not_installed(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        refused(capsys, command(place, "--wandb-enable"), "--wandb-enable: ", "pip install", keep=place)
    else:
        pytest.skip("wandb is installed")


def spoil(root: Path, case: str) -> str:
    """Damage a tree in MVTec layout; what the error line must name."""
    bottle = root / "bottle"
    if case == "missing":
        shutil.rmtree(root)
        return str(root)
    if case == "empty":
        shutil.rmtree(root)
        root.mkdir()
        return f"{root} is empty"
    if case == "a file":
        shutil.rmtree(root)
        root.write_text("not a folder")
        return str(root)
    if case == "no class":
        shutil.rmtree(bottle)
        return "'bottle'"
    if case == "no mask":
        (bottle / "ground_truth" / "broken" / "001_mask.png").unlink()
        return str(bottle / "test" / "broken" / "001.png")
    gone = {"no train": "train", "no train/good": "train/good", "no test": "test"}[case]
    shutil.rmtree(bottle / gone)
    return "train/good" if "train" in gone else "lacks images in test"


@pytest.mark.parametrize(
    "case", ["missing", "empty", "a file", "no class", "no mask", "no train", "no train/good", "no test"]
)
def test_bad_data_folders(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, case: str) -> None:
    named = spoil(make_mvtec(tmp_path / "data"), case)
    line = refused(capsys, command(place, "--data-path", str(tmp_path / "data")), named, keep=place)
    assert "--data-path: " in line or "no mask at" in line


def test_a_damaged_image_is_named(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    image = make_mvtec(tmp_path / "data") / "grid" / "train" / "good" / "003.png"
    image.write_bytes(image.read_bytes()[:100])
    before = state_of(place)
    assert main(command(place, "--data-path", str(tmp_path / "data"), "--work-dir", str(tmp_path / "runs"))) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"main.py: error: {image}: cannot be read as an image" in line
    assert state_of(place) == before


@pytest.mark.parametrize("inside", [False, True])
def test_a_work_folder_that_cannot_be_written(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, inside: bool
) -> None:
    """A file in the way, because an administrator may write everywhere."""
    (tmp_path / "file").write_text("in the way")
    work = tmp_path / "file" / "runs" if inside else tmp_path / "file"
    refused(capsys, command(place, "--work-dir", str(work)), "--work-dir: cannot write in ", str(work), keep=place)
    assert (tmp_path / "file").read_text() == "in the way"


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def bad_checkpoint(place: Path, path: Path, case: str) -> None:
    """Write a file that --eval_ckpt has to refuse."""
    good = trained(place) / "last.pt"
    content = torch.load(good, weights_only=True)
    if case == "truncated":
        path.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif case == "text":
        path.write_text("a checkpoint")
    elif case == "empty":
        path.touch()
    elif case == "list":
        torch.save([1, 2, 3], path)
    elif case == "other dictionary":
        torch.save({"state_dict": content["model"]}, path)
    elif case == "code":
        torch.save(content | {"model": Trap(path.with_suffix(".pwned"))}, path)
    elif case == "code in a bare pickle":
        path.write_bytes(pickle.dumps(Trap(path.with_suffix(".pwned")), protocol=2))
    elif case == "unknown settings":
        torch.save(content | {"config": {"data": {"colour": 3}}}, path)
    elif case == "no settings":
        torch.save(content | {"config": 3}, path)
    elif case == "half an official one":
        torch.save({"epoch": 1, "parallel_flows": [], "fusion_flow": {}}, path)
    elif case == "one tensor of another size":
        torch.save(content | {"model": content["model"] | {"hierarchy.cpc.embed": torch.zeros(3, 8)}}, path)
    elif case == "one tensor missing":
        torch.save(content | {"model": {k: v for k, v in content["model"].items() if k != "mean_0"}}, path)


BAD_CHECKPOINTS = {
    "missing": "no such file", "truncated": "truncated or not a checkpoint", "text": "not a checkpoint",
    "empty": "not a checkpoint", "list": "it holds a list", "other dictionary": "is not a checkpoint of this program",
    "code": "it holds code or objects, which are not loaded",
    "code in a bare pickle": "code or objects, which are not loaded",
    "unknown settings": "settings that this version does not know",
    "no settings": "settings that this version does not know",
    "half an official one": "not a whole checkpoint of the released code",
    "one tensor of another size": "made with other options than asked for: hierarchy.cpc.embed is (3, 8)",
    "one tensor missing": "it lacks mean_0",
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoints(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, case: str) -> None:
    path = tmp_path / "some.pt"
    bad_checkpoint(place, path, case)
    argv = command(place, "--mode", "test", "--eval_ckpt", str(path))
    refused(capsys, argv, str(path), BAD_CHECKPOINTS[case], keep=place)
    assert not path.with_suffix(".pwned").exists(), "code in a checkpoint does not run"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--k-cpc 5", "--k-cpc = 4, not with 5"),
        ("--dim-cpc 16", "--dim-cpc = 8, not with 16"),
        ("--parallel-blocks 1 2 1", "--parallel-blocks = (1,), not with (1, 2, 1)"),
        ("--quantize-type naive", "--quantize-type = 'residual', not with 'naive'"),
        ("--no-concat-pos", "--concat-pos = True, not with False"),
        ("--extractor resnet18", "--extractor = 'tf_efficientnet_lite0', not with 'resnet18'"),
        ("--no-pretrained", "other weights of tf_efficientnet_lite0"),
    ],
)
def test_checkpoints_of_other_settings(capsys: pytest.CaptureFixture[str], place: Path, words: str, text: str) -> None:
    path = str(trained(place) / "last.pt")
    refused(capsys, command(place, "--mode", "test", "--eval_ckpt", path, *words.split()), path, text, keep=place)


def test_a_folder_without_checkpoints(capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path) -> None:
    argv = command(place, "--mode", "test", "--eval_ckpt", str(tmp_path))
    refused(capsys, argv, "--eval_ckpt: ", "last.pt", str(tmp_path), keep=place)


def test_resuming_refuses_what_it_cannot_go_on_from(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place, tmp_path / "copy")
    copy, argv = tmp_path / "copy", command(tmp_path / "copy", "--resume")
    path = trained(copy) / "last.pt"
    refused(capsys, [*argv, "--lr", "0.5"], "--resume: ", "lr = 0.0001, not 0.5", keep=copy)
    refused(capsys, [*argv, "--no-pretrained"], "--resume: ", "pretrained", keep=copy)
    content = torch.load(path, weights_only=True)
    path.write_bytes(path.read_bytes()[:5000])
    refused(capsys, argv, f"--resume: cannot read {path}: it is truncated", keep=copy)
    torch.save(content["model"], path)
    refused(capsys, argv, f"--resume: {path} is not a checkpoint that training can go on from", keep=copy)
    torch.save(content | {"extractor": "of other weights"}, path)
    refused(capsys, argv, f"--resume: {path} is of another run: its extractor differs", keep=copy)
    torch.save(content, path)
    assert main(argv) == 0
