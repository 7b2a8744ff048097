"""The command line: its frozen surface, what each flag does, and the README's commands. Bad input: test_bad_input."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from default import PARTS, PRESETS, Config, DataConfig, UsageError, __version__, flag_of, make_config, to_dict
from main import build_parser, main, parse

ROOT = Path(__file__).resolve().parents[1]
PAPER = (
    "--mode train --dataset mvtec --class-names all --multi-class --quantize-enable --quantize-type residual "
    "--concat-pos --mixed-gaussian --extractor convnextv2_base"
)
PAPER_LINES = (PAPER, PAPER.replace("mvtec", "visa"), PAPER.replace("train", "test") + " --eval_ckpt $CKPT_PATH")

SURFACE = """
--accumulate --amp-enable --background --bandwidth --batch-size --bit-depth --bootstrap --c-conds --c-pos-conds
--cache --center-crop --checkpoint-activations --clamp --class-names --clear --clip-norm --codebooks --compare
--compile --concat-pos --conditioning --context --data-path --dataset --deterministic --device --dim-cpc --dry-run
--efficiency --engine --eval-ckpt --eval-interval --eval-size --eval_ckpt --extractor --fail-on --false-alarm-rate
--float-range --fpr-limit --good-names --gpu --gpus --help --holdout --holdout-seed --image-score --images
--input-size --interconnect --json --k-cpc --k-cspc --latency --limit --loc-eval --lr --max-dropped --max-pixels
--memory --memory-place --meta-epochs --mixed-gaussian --mode --multi-class --name --no-amp-enable
--no-checkpoint-activations --no-compare --no-compile --no-concat-pos --no-deterministic --no-json --no-loc-eval
--no-mixed-gaussian --no-multi-class --no-offline --no-overlays --no-pattern-quantize --no-pre-extract --no-pretrained
--no-pro-eval --no-quantize-enable --no-reassign-quantize --no-report --no-resume --no-save-masks --no-standardize
--no-tensorboard --no-trust-masks --no-wandb-enable --noise --objective --offline --output --overlap --overlays
--parallel-blocks --pattern-quantize --pictures --pixel-score --pool-type --pre-extract --precision --preset
--pretrained --pro-eval --pro-eval-interval --pro-score --profile --quantize-enable --quantize-type --quantize-weight
--reading --reassign-quantize --report --resize --resume --save-every --save-maps --save-masks --schedule --seed
--seeds --semantics --standardize --storage --sub-epochs --tensorboard --test-images --tflops --tile --top-k
--trust-masks --version --wandb-enable --warmup --watch --weight-decay --weights --work-dir --workers -h
"""

RELEASED = {
    "--dataset": "visa", "--input-size": "256", "--pre-extract": None, "--mode": "train", "--multi-class": None,
    "--amp-enable": None, "--wandb-enable": None, "--resume": None, "--class-names": "bottle cable", "--lr": "3e-4",
    "--batch-size": "8", "--meta-epochs": "3", "--sub-epochs": "4", "--extractor": "resnet18", "--pool-type": "max",
    "--parallel-blocks": "1 2 3", "--c-conds": "32 32 32", "--loc-eval": None, "--pro-eval": None,
    "--pro-eval-interval": "2", "--quantize-enable": None, "--quantize-type": "naive", "--no-pattern-quantize": None,
    "--concat-pos": None, "--reassign-quantize": None, "--quantize-weight": "0.5", "--dim-cpc": "64",
    "--c-pos-conds": "16 16 16", "--k-cspc": "128", "--k-cpc": "8", "--mixed-gaussian": None,
}  # fmt: skip

# Every field: what is typed, and the value that it must have in the resolved configuration.
OTHER: dict[str, tuple[str, Any]] = {
    "dataset": ("visa", "visa"), "data_path": ("some/where", "some/where"),
    "class_names": ("pill wood", ["pill", "wood"]),
    "multi_class": ("", True), "resize": ("pad", "pad"), "center_crop": ("96", 96), "tile": ("512", 512),
    "overlap": ("8 --tile 512", 8),
    "input_size": ("128", 128), "limit": ("5", 5), "workers": ("2", 2),
    "pre_extract": ("", True), "extractor": ("resnet18", "resnet18"), "weights": ("w.pth", "w.pth"),
    "pretrained": ("no", False), "pool_type": ("max", "max"), "standardize": ("no", False),
    "quantize_enable": ("", True), "quantize_type": ("naive --quantize-enable", "naive"),
    "pattern_quantize": ("no", False), "concat_pos": ("", True), "mixed_gaussian": ("", True), "dim_cpc": ("32", 32),
    "k_cpc": ("3", 3), "k_cspc": ("7", 7), "c_pos_conds": ("8", [8]), "c_conds": ("9 9 5", [9, 9, 5]),
    "parallel_blocks": ("3", [3]), "clamp": ("1.5", 1.5), "codebooks": ("released --quantize-enable", "released"),
    "conditioning": ("auto", "auto"), "objective": ("released", "released"), "lr": ("0.01", 0.01),
    "batch_size": ("3", 3), "meta_epochs": ("4", 4), "sub_epochs": ("5", 5), "schedule": ("cosine", "cosine"),
    "warmup": ("0.25", 0.25), "weight_decay": ("0.125", 0.125), "noise": ("0.5", 0.5), "clip_norm": ("1.5", 1.5),
    "quantize_weight": ("0.25", 0.25), "reassign_quantize": ("--quantize-enable", True), "amp_enable": ("", True),
    "save_every": ("50", 50), "max_dropped": ("3", 3), "resume": ("", True), "tensorboard": ("", True),
    "wandb_enable": ("", True),
    "eval_ckpt": ("a.pt --mode test", "a.pt"), "eval_interval": ("2", 2), "loc_eval": ("", True),
    "pro_eval": ("", True), "pro_eval_interval": ("7", 7), "image_score": ("add", "add"), "pixel_score": ("mul", "mul"),
    "pro_score": ("likelihood", "likelihood"), "top_k": ("0.5", 0.5), "fpr_limit": ("0.1", 0.1), "pictures": ("0", 0),
    "mode": ("test --eval_ckpt a.pt", "test"), "work_dir": ("runs", "runs"), "device": ("cpu", "cpu"), "seed": ("7", 7),
    "clear": ("0 --mode cache", 0), "offline": ("", True), "deterministic": ("", True),
    "bit_depth": ("12", 12), "float_range": ("-1 2.5", [-1.0, 2.5]), "background": ("black", "black"),
    "false_alarm_rate": ("0.05", 0.05),
    "max_pixels": ("9", 9), "good_names": ("gut fein", ["gut", "fein"]), "trust_masks": ("", True),
    "holdout": ("0.1", 0.1), "holdout_seed": ("5", 5), "memory": ("100", 100),
    "memory_place": ("host", "host"), "semantics": ("pooled", "pooled"), "context": ("3", 3),
    "cache": ("ram", "ram"), "accumulate": ("2", 2), "compile": ("", True), "checkpoint_activations": ("", True),
    "profile": ("3", 3), "seeds": ("1 2", [1, 2]), "name": ("mine", "mine"), "paths": ("a b --mode table", ["a", "b"]),
    "output": ("o --mode predict --eval_ckpt a.pt", "o"), "overlays": ("no", False),
    "engine": ("torch --mode predict --eval_ckpt a.pt", "torch"),
    "save_maps": ("npy --mode predict --eval_ckpt a.pt", "npy"),
    "save_masks": ("--mode predict --eval_ckpt a.pt", True),
    "watch": ("new --mode predict --eval_ckpt a.pt", "new"),
    "fail_on": ("defect --mode predict --eval_ckpt a.pt", "defect"),
    "precision": ("float16 int8 --mode export --eval_ckpt a.pt", ["float16", "int8"]),
    "eval_size": ("native", "native"), "bootstrap": ("50", 50), "compare": ("", True), "report": ("no", False),
    "json": ("--mode inspect", True),
    "images": ("50 --mode plan", 50), "test_images": ("7 --mode plan --images 50", 7),
    "gpus": ("4 --mode plan --images 50", 4), "gpu": ("h100 --mode plan --images 50", "h100"),
    "tflops": ("1 2 3 --mode plan --images 50", [1.0, 2.0, 3.0]),
    "bandwidth": ("1000 --mode plan --images 50", 1000.0), "efficiency": ("0.5 --mode plan --images 50", 0.5),
    "interconnect": ("50 --mode plan --images 50", 50.0), "latency": ("20 --mode plan --images 50", 20.0),
    "storage": ("3 --mode plan --images 50", 3.0), "reading": ("90 --mode plan --images 50", 90.0),
}  # fmt: skip


def dry(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    """The resolved configuration as one flat dictionary, through --dry-run."""
    assert main([*argv, "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown.pop("version") == __version__
    return {name: value for part in shown.values() for name, value in part.items()}


def flags(name: str) -> tuple[list[str], Any]:
    """What `OTHER` types for a field, and what it expects."""
    typed, expected = OTHER[name]
    flag = flag_of(name)
    named = [] if name == "paths" else [flag]  # the only words without a flag
    return [flag.replace("--", "--no-", 1)] if typed == "no" else [*named, *typed.split()], expected


# --- the surface


def test_the_surface_is_frozen() -> None:
    options = {word for action in build_parser()._actions for word in action.option_strings}
    assert sorted(options) == SURFACE.split()


@pytest.mark.parametrize("separator", ["-", "_"])
def test_released_flags_keep_their_spelling(separator: str) -> None:
    words = [w for flag, value in RELEASED.items() for w in (flag.replace("-", separator), *(value or "").split())]
    words = [w.replace("__", "--", 1) if w.startswith("__") else w for w in words]
    config = parse(words)[0]
    assert config == parse([w for flag, value in RELEASED.items() for w in (flag, *(value or "").split())])[0]
    assert (config.data.dataset, config.model.parallel_blocks, config.model.pattern_quantize) == (
        "visa",
        (1, 2, 3),
        False,
    )
    for flag in ("--eval_ckpt", "--eval-ckpt"):
        assert parse(["--mode", "test", flag, "my_file.pt"])[0].eval.eval_ckpt == "my_file.pt"


def test_values_keep_their_underscores_and_hyphens() -> None:
    assert parse(["--work_dir=--my_dir=a_b"])[0].run.work_dir == "--my_dir=a_b"
    assert parse(["--class_names", "metal_nut", "--data-path", "my_data"])[0].data == DataConfig(
        class_names=("metal_nut",), data_path="my_data"
    )


@pytest.mark.parametrize("name", [e.name for kind in PARTS.values() for e in fields(kind)])  # type: ignore[arg-type]
def test_each_flag_reaches_the_configuration(capsys: pytest.CaptureFixture[str], name: str) -> None:
    words, expected = flags(name)
    default = {n: v for part in json.loads(json.dumps(to_dict(Config()))).values() for n, v in part.items()}
    assert default[name] != expected or name == "quantize_type"
    found = dry(capsys, *words)
    assert found[name] == expected
    also = {w[2:].replace("-", "_") for w in words if w.startswith("--")}
    assert {n for n in found if found[n] != default[n]} <= also | {name}


def test_typed_values_override_the_preset_and_presets_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for preset, row in PRESETS.items():
        found = dry(capsys, "--preset", preset)
        expected = {n: v for part in to_dict(make_config(**row)).values() for n, v in part.items()}
        assert found == json.loads(json.dumps(expected))
        assert set(row) <= found.keys()
    for order in (("--preset", "cpu", "--lr", "0.5"), ("--lr", "0.5", "--preset", "cpu")):
        found = dry(capsys, *order, "--no-pre-extract")
        assert (found["lr"], found["pre_extract"], found["schedule"]) == (0.5, False, "cosine")


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as left:
            main([flag])
        assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for kind in PARTS.values():
        for entry in fields(kind):  # type: ignore[arg-type]
            assert flag_of(entry.name) in text or entry.name == "paths"
            if isinstance(entry.default, (int, float, str)) and not isinstance(entry.default, bool):
                assert f"(default: {entry.default})" in text
    assert "(default: 2 5 8)" in text
    assert all(preset in text for preset in PRESETS)


def test_version_and_dry_run_in_a_process_of_their_own() -> None:
    def output(*words: str) -> str:
        done = subprocess.run([sys.executable, "main.py", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout

    assert output("--version").strip() == f"VQ-Flow {__version__}"
    shown = json.loads(output("--preset", "released", "--batch_size=4", "--dry_run"))
    assert (shown["train"]["batch_size"], shown["train"]["schedule"]) == (4, "released")


def test_switches_that_a_preset_sets_may_be_void() -> None:
    for name in ("codebooks", "reassign_quantize"):
        words, _ = flags(name)
        with pytest.raises(UsageError, match=f"{words[0]}: does nothing without --quantize-enable"):
            parse([w for w in words if w != "--quantize-enable"])
    assert parse(["--preset", "released", "--no-quantize-enable"])[0].model.codebooks == "released"
    assert parse(["--preset", "cpu", "--no-pattern-quantize", "--k-cpc", "4"])[0].model.pattern_quantize is False
    assert parse(["--no-resume", "--no-tensorboard", "--mode", "test", "--eval_ckpt", "a.pt"])[0].run.mode == "test"


# --- commands of the README


def readme_commands() -> list[str]:
    """What follows `python main.py` in the README's bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = (re.match(r"\s*(?:[A-Z_]+=\S*\s+)*\S*python3?\s+main\.py\s+(.*)", line) for line in lines)
    return [match[1] for match in found if match]


@pytest.mark.parametrize("command", list(dict.fromkeys([*PAPER_LINES, *readme_commands()])))
def test_commands_resolve(capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str) -> None:
    (tmp_path / "last.pt").touch()
    words = shlex.split(command.replace("$CKPT_PATH", str(tmp_path / "last.pt")), comments=True)
    if "--help" not in words and "--version" not in words:
        assert dry(capsys, *words)


def test_paper_commands_mean_the_papers_settings(capsys: pytest.CaptureFixture[str]) -> None:
    for line, dataset in zip(PAPER_LINES, ("mvtec", "visa", "mvtec"), strict=True):
        found = dry(capsys, *line.split())
        names = ("dataset", "input_size", "batch_size", "meta_epochs", "sub_epochs", "lr", "seed", "k_cpc", "k_cspc")
        assert [found[n] for n in names] == [dataset, 384, 16, 30, 2, 1e-4, 9826, 32, 512]
        assert (found["quantize_type"], found["c_pos_conds"], found["parallel_blocks"]) == ("residual", [64], [2, 5, 8])
