"""The command line: its surface, what wins over what, and one clear line for every mistake."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from default import PRESETS, DataConfig, ModelConfig, make_config
from fake_data import METHOD, TINY, make_mvtec
from main import build_parser, main, parse

ROOT = Path(__file__).resolve().parents[1]
RELEASED = [
    "--dataset",
    "--input-size",
    "--pre-extract",
    "--mode",
    "--multi-class",
    "--amp-enable",
    "--wandb-enable",
    "--resume",
    "--eval_ckpt",
    "--class-names",
    "--lr",
    "--batch-size",
    "--meta-epochs",
    "--sub-epochs",
    "--extractor",
    "--pool-type",
    "--parallel-blocks",
    "--c-conds",
    "--loc-eval",
    "--pro-eval",
    "--pro-eval-interval",
    "--quantize-enable",
    "--quantize-type",
    "--no-pattern-quantize",
    "--concat-pos",
    "--reassign-quantize",
    "--quantize-weight",
    "--dim-cpc",
    "--c-pos-conds",
    "--k-cspc",
    "--k-cpc",
    "--mixed-gaussian",
]
NEW = [
    "--data-path",
    "--work-dir",
    "--device",
    "--seed",
    "--workers",
    "--weights",
    "--no-pretrained",
    "--preset",
    "--dry-run",
    "--limit",
]


def flags() -> set[str]:
    return {s for action in build_parser()._actions for s in action.option_strings}


def test_released_and_new_flags_are_there() -> None:
    assert {*RELEASED, *NEW, "--version", "--help"} <= flags()


def resolved(capsys: pytest.CaptureFixture, *argv: str) -> dict:
    assert main([*argv, "--dry-run"]) == 0
    return json.loads(capsys.readouterr().out)


TYPED = [
    (["--dataset", "visa"], "data", "dataset", "visa"),
    (["--input_size", "256"], "data", "input_size", 256),
    (["--pre_extract"], "data", "pre_extract", True),
    (["--class_names", "bottle", "grid"], "data", "class_names", ["bottle", "grid"]),
    (["--multi_class"], "data", "multi_class", True),
    (["--limit=3"], "data", "limit", 3),
    (["--workers", "2"], "data", "workers", 2),
    (["--data_path", "a_b"], "data", "data_path", "a_b"),
    (["--amp_enable"], "train", "amp_enable", True),
    (["--wandb_enable"], "train", "wandb_enable", True),
    (["--resume"], "train", "resume", True),
    (["--lr", "3e-4"], "train", "lr", 3e-4),
    (["--batch_size=4"], "train", "batch_size", 4),
    (["--meta_epochs", "7"], "train", "meta_epochs", 7),
    (["--sub_epochs", "3"], "train", "sub_epochs", 3),
    (["--quantize_enable", "--reassign_quantize"], "train", "reassign_quantize", True),
    (["--quantize_weight", "0.5"], "train", "quantize_weight", 0.5),
    (["--extractor", "resnet18"], "model", "extractor", "resnet18"),
    (["--pool_type", "max"], "model", "pool_type", "max"),
    (["--parallel_blocks", "1", "2", "3"], "model", "parallel_blocks", [1, 2, 3]),
    (["--c_conds", "64", "64", "64"], "model", "c_conds", [64, 64, 64]),
    (["--quantize_enable"], "model", "quantize_enable", True),
    (["--quantize_enable", "--quantize_type", "naive"], "model", "quantize_type", "naive"),
    (["--no_pattern_quantize"], "model", "pattern_quantize", False),
    (["--concat_pos"], "model", "concat_pos", True),
    (["--dim_cpc", "64"], "model", "dim_cpc", 64),
    (["--c_pos_conds", "32"], "model", "c_pos_conds", [32]),
    (["--k_cspc", "128"], "model", "k_cspc", 128),
    (["--k_cpc", "16"], "model", "k_cpc", 16),
    (["--mixed_gaussian"], "model", "mixed_gaussian", True),
    (["--weights", "w.pth"], "model", "weights", "w.pth"),
    (["--no_pretrained"], "model", "pretrained", False),
    (["--loc_eval"], "eval", "loc_eval", True),
    (["--pro_eval"], "eval", "pro_eval", True),
    (["--pro_eval_interval", "2"], "eval", "pro_eval_interval", 2),
    (["--mode", "test", "--eval_ckpt", "x_y.pt"], "eval", "eval_ckpt", "x_y.pt"),
    (["--mode", "test", "--eval-ckpt", "x_y.pt"], "run", "mode", "test"),
    (["--work_dir", "runs_1"], "run", "work_dir", "runs_1"),
    (["--device", "cpu"], "run", "device", "cpu"),
    (["--seed", "1"], "run", "seed", 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("argv", "part", "name", "value"), TYPED, ids=lambda v: str(v) if isinstance(v, list) else None
)
def test_flags_with_underscores_or_hyphens_reach_the_configuration(
    argv: list[str], part: str, name: str, value: object, capsys: pytest.CaptureFixture
) -> None:
    assert resolved(capsys, *argv)[part][name] == value
    hyphens = [w.replace("_", "-") if w.startswith("--") and w != "--eval_ckpt" else w for w in argv]
    assert resolved(capsys, *hyphens)[part][name] == value


def test_typed_wins_over_preset_and_preset_over_default(capsys: pytest.CaptureFixture) -> None:
    assert resolved(capsys)["model"]["dim_cpc"] == ModelConfig().dim_cpc
    assert resolved(capsys, "--preset", "cpu")["model"]["dim_cpc"] == PRESETS["cpu"]["dim_cpc"]
    assert resolved(capsys, "--preset", "cpu", "--dim-cpc", "8")["model"]["dim_cpc"] == 8


def test_presets_are_what_they_say() -> None:
    for name in ("paper-mvtec", "paper-visa"):
        config = make_config(name)
        assert (config.model.extractor, config.data.input_size, config.train.lr) == ("convnextv2_base", 384, 1e-4)
        assert (config.train.meta_epochs, config.train.sub_epochs, config.train.batch_size) == (30, 2, 16)
        assert (config.model.objective, config.model.codebooks) == ("likelihood", "seeded")
        assert config.model.mixed_gaussian and config.model.concat_pos and config.data.multi_class
    released = make_config("released")
    assert (released.model.objective, released.model.codebooks) == ("released", "released")
    assert (released.train.schedule, released.eval.image_score, released.eval.pixel_score) == ("released", "mul", "add")


def test_help_shows_the_defaults_of_the_dataclass() -> None:
    text = " ".join(build_parser().format_help().split())
    assert f"images are resized (default: {DataConfig().input_size})" in text


def test_help_and_version_run_as_a_program() -> None:
    for flag in ("--help", "--version"):
        done = subprocess.run([sys.executable, "main.py", flag], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0
        assert "VQ-Flow" in done.stdout


def fails(capsys: pytest.CaptureFixture, *argv: str) -> str:
    """The one line of a mistake."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("main.py: error: ")
    return lines[0]


MISTAKES = {
    "data set": (["--dataset", "mvtek"], "--dataset: expected one of mvtec, visa, folder, sample, but got 'mvtek'"),
    "preset": (["--preset", "fast"], "--preset: expected one of paper-mvtec"),
    "flag": (["--colour"], "--colour: no such flag"),
    "number": (["--lr", "high"], "--lr: invalid float value: 'high'"),
    "lr": (["--lr", "-1"], "--lr: expected at least"),
    "nan": (["--lr", "nan"], "--lr: expected a finite number"),
    "batch": (["--batch-size", "0"], "--batch-size: expected at least 1, but got 0"),
    "size": (["--input-size", "8"], "--input-size: expected at least 32, but got 8"),
    "void switch": (["--quantize-type", "naive"], "--quantize-type: works with --quantize-enable; add that, or leave"),
    "quantize type": (["--quantize-type", "x"], "--quantize-type: expected one of residual, naive, but got 'x'"),
    "blocks": (["--parallel-blocks", "1", "2"], "--parallel-blocks: expected one value or three"),
    "position": (["--c-pos-conds", "6"], "--c-pos-conds: expected a multiple of 4"),
    "positions": (["--c-pos-conds", "4", "8", "4"], "--c-pos-conds: the levels share one semantic embedding"),
    "top k": (["--top-k", "2"], "--top-k: expected at most 1.0, but got 2.0"),
    "no checkpoint": (["--mode", "test"], "--eval_ckpt: expected a checkpoint file in --mode test, but got none"),
    "device": (["--device", "tpu"], "--device: expected one of auto, cuda, cpu, mps, but got 'tpu'"),
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
    assert "--batch-size: expected at most 12" in fails(capsys, *tree, "--batch-size", "13")
    assert "--extractor: 'resnet0' is no timm model" in fails(capsys, *tree, "--extractor", "resnet0")
    (tmp_path / "file").write_text("")
    assert "--work-dir: cannot write in" in fails(capsys, *tree, "--work-dir", str(tmp_path / "file"))
    (tmp_path / "data" / "grid" / "ground_truth" / "broken" / "001_mask.png").unlink()
    assert "001.png: no mask at" in fails(capsys, *tree)
    assert not list((tmp_path / "runs").glob("mvtec*")), "a mistake leaves no run folder behind"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_no_cuda(tree: list[str], capsys: pytest.CaptureFixture) -> None:
    assert "--device: 'cuda' was asked for, but there is none here; choose from auto" in fails(
        capsys, *tree, "--device", "cuda"
    )


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


def test_chosen_names_what_was_typed() -> None:
    assert parse(["--lr", "1e-3"])[1] == {"lr": 1e-3}
