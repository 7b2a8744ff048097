"""Every mistake of the user's ends in one clear line and status 2, and nothing is lost."""

import pickle
from pathlib import Path

import pytest
import torch

from fake_data import METHOD, TINY, make_mvtec
from main import main


def fails(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line of a mistake."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("main.py: error: ")
    return lines[0]


MISTAKES = {
    "data set": (["--dataset", "mvtek"], "--dataset: expected one of mvtec, visa, folder, sample, "),
    "preset": (["--preset", "fast"], "--preset: expected one of paper-mvtec"),
    "flag": (["--colour"], "--colour: no such flag"),
    "number": (["--lr", "high"], "--lr: invalid float value: 'high'"),
    "lr": (["--lr", "-1"], "--lr: expected at least"),
    "nan": (["--lr", "nan"], "--lr: expected a finite number"),
    "batch": (["--batch-size", "0"], "--batch-size: expected at least 1, but got 0"),
    "size": (["--input-size", "8"], "--input-size: expected at least 32, but got 8"),
    "void switch": (["--quantize-type", "naive"], "--quantize-type: does nothing without --quantize-enable; add that"),
    "quantize type": (["--quantize-type", "x"], "--quantize-type: expected one of residual, naive, but got 'x'"),
    "blocks": (["--parallel-blocks", "1", "2"], "--parallel-blocks: expected one value or three"),
    "position": (["--c-pos-conds", "6"], "--c-pos-conds: expected a multiple of 4"),
    "positions": (["--c-pos-conds", "4", "8", "4"], "--c-pos-conds: the levels share one semantic embedding"),
    "top k": (["--top-k", "2"], "--top-k: expected at most 1.0, but got 2.0"),
    "no checkpoint": (["--mode", "test"], "--eval_ckpt: expected a checkpoint file in --mode test, but got none"),
    "two sizes": (["--input-size", "64", "96"], "--input-size: expected one value, but got 64 96"),
    "two values with a sign": (["--input_size=64", "--lr=1", "-2"], "--lr: expected one value, but got 1 -2"),
    "two presets": (["--preset", "cpu", "fast"], "--preset: expected one value, but got cpu fast"),
    "switch with a value": (["--multi-class", "yes"], "--multi-class: expected no value, but got yes"),
    "surplus before a flag": (["--limit", "3", "4", "--lr", "1"], "--limit: expected one value, but got 3 4"),
    "lonely word": (["bottle"], "PATH: paths are for --mode table and predict alone, but got 'bottle'"),
    "device": (["--device", "tpu"], "--device: expected one of auto, cuda, cuda:N, cpu, mps, but got 'tpu'"),
    "index": (["--device", "cpu:1"], "--device: expected one of auto, cuda, cuda:N, cpu, mps, but got 'cpu:1'"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_on_the_command_line(case: str, capsys: pytest.CaptureFixture) -> None:
    argv, message = MISTAKES[case]
    assert message in fails(capsys, *argv)


@pytest.fixture
def tree(tmp_path: Path) -> list[str]:
    """Flags of a tiny run on two classes."""
    root = make_mvtec(tmp_path / "data")
    return ["--dataset", "mvtec", "--data-path", str(root), "--class-names", "bottle", "grid", *METHOD, *TINY,
            "--work-dir", str(tmp_path / "runs")]  # fmt: skip


def test_mistakes_about_the_data(tree: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "--class-names: 'botle' is not an MVTec AD class; choose from all, carpet" in fails(
        capsys, *tree, "--class-names", "botle"
    )
    assert "--data-path: no such folder" in fails(capsys, *tree, "--data-path", str(tmp_path / "none"))
    assert "--extractor: 'resnet0' is no timm model" in fails(capsys, *tree, "--extractor", "resnet0")
    (tmp_path / "file").write_text("")
    assert "--work-dir: cannot write in" in fails(capsys, *tree, "--work-dir", str(tmp_path / "file"))
    (tmp_path / "data" / "grid" / "ground_truth" / "broken" / "001_mask.png").unlink()
    assert "001.png: no mask at" in fails(capsys, *tree)
    assert not list((tmp_path / "runs").glob("mvtec*")), "a mistake leaves no run folder behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda(tree: list[str], capsys: pytest.CaptureFixture) -> None:
    for device in ("cuda", "cuda:1"):
        expected = f"--device: {device!r} was asked for, but it is not here; choose from auto, "
        assert expected in fails(capsys, *tree, "--device", device)


class Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (Path(self.path),)


def test_mistakes_about_the_checkpoint(tree: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "c.pt"

    def tested() -> str:
        return fails(capsys, *tree, "--mode", "test", "--eval_ckpt", str(path))

    assert "--eval_ckpt: no such file" in tested()
    path.write_bytes(b"")
    assert "truncated or not a checkpoint" in tested()
    path.write_text("hello")
    assert f"--eval_ckpt: cannot read {path}" in tested()
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:900])
    assert f"--eval_ckpt: cannot read {path}" in tested()
    torch.save({"a": 1}, path)
    assert "is not a checkpoint of this program or of the released code" in tested()
    torch.save([1], path)
    assert "it holds a list" in tested()
    for dump in (lambda: path.write_bytes(pickle.dumps(Evil(str(tmp_path / "ran")))), lambda: torch.save(Evil(str(tmp_path / "ran")), path)):  # fmt: skip  # noqa: E501
        dump()
        assert f"--eval_ckpt: cannot read {path}" in tested()
        assert not (tmp_path / "ran").exists()
