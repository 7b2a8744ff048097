"""The program itself on tiny trees: train, test, resume, workers, cache and official checkpoints."""

import contextlib
import io
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from default import ModelConfig, from_dict, to_dict
from fake_data import METHOD, TINY, make_mvtec, make_visa_original, make_visa_rearranged
from main import main
from models.extractor import IMAGENET, FrozenExtractor
from models.official import load_official
from models.scorer import Scorer
from models.vqflow import VQFlow
from utils.metrics import METRICS
from utils.run.checkpoint import read_checkpoint, write_checkpoint
from utils.run.log import flat, read_lines
from utils.run.seed import seed_everything

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 4
LONG = [
    "--meta-epochs", str(EPOCHS), "--noise", "0.3", "--reassign-quantize", "--loc-eval", "--pro-eval",
    "--pro-eval-interval", "2", "--tensorboard", "--memory", "3", "--image-score", "surprise", "--holdout", "0.1",
]  # fmt: skip
REMEMBERING = ["--memory", "4", "--image-score", "surprise", "--pixel-score", "surprise"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes that are started here: sums in another order would differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tree in MVTec layout under `mvtec` and both of VisA's."""
    folder = tmp_path_factory.mktemp("program")
    make_mvtec(folder / "mvtec")
    for name, make in (("visa-original", make_visa_original), ("visa-rearranged", make_visa_rearranged)):
        (folder / name).mkdir()
        make(folder / name)
    return folder


def command(place: Path, work: str, *more: str, tree: str = "mvtec", classes: str = "bottle grid") -> list[str]:
    places = ["--data-path", str(place / tree), "--work-dir", str(place / work)]
    return [*TINY, "--dataset", tree.split("-")[0], *places, "--class-names", *classes.split(), *more]


def start(argv: list[str]) -> subprocess.Popen[str]:
    """`python main.py` in a process of its own, its output line by line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "main.py", *argv], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def program(argv: list[str]) -> str:
    """What `python main.py` prints."""
    process = start(argv)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def only(place: Path, work: str) -> Path:
    """The one run folder in a work folder."""
    folders = [p for p in (place / work).iterdir() if p.name != "cache"]
    assert len(folders) == 1
    return folders[0]


def losses(folder: Path) -> list[float]:
    return [entry["train"]["loss"] for entry in read_lines(folder / "metrics.jsonl")]


# --- one model for all classes


@pytest.fixture(scope="module")
def unbroken(place: Path) -> tuple[Path, str]:
    """The run folder of a training in a process of its own with two spawned workers, and what it printed."""
    out = program(command(place, "unbroken", *METHOD, *LONG, "--workers", "2"))
    return only(place, "unbroken"), out


def test_what_training_prints_and_leaves(unbroken: tuple[Path, str]) -> None:
    folder, out = unbroken
    lines = [line for line in out.splitlines() if line.startswith("meta epoch")]
    assert len(lines) == EPOCHS
    assert all("image AUROC" in line and "pixel AUROC" in line for line in lines)
    assert ["AUPRO" in line for line in lines] == [False, True, False, True]
    for row in ("bottle", "grid", "mean", "best on test"):
        assert re.search(rf"^{row} .*\d", out, re.M)
    assert str(folder) in out

    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "config.json", "metrics.jsonl", "results.json", "results.csv", "results.md", "results.tex", "last.pt",
        "best_on_test.pt", "pictures", "tensorboard",
    }  # fmt: skip
    assert list((folder / "tensorboard").glob("events.out.tfevents.*"))
    pictures = {p.relative_to(folder / "pictures").as_posix() for p in folder.glob("pictures/*/*.jpg")}
    assert pictures == {f"{c}/{kind}_000.jpg" for c in ("bottle", "grid") for kind in ("good", "broken", "scratch")}
    config = from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert (config.train.meta_epochs, config.model.k_cspc, config.train.reassign_quantize) == (EPOCHS, 8, True)
    entries = read_lines(folder / "metrics.jsonl")
    assert [entry["epoch"] for entry in entries] == [1, 2, 3, 4]
    assert set(entries[0]["codebooks"]) == {"cpc", "cspc_0", "cspc_1", "cspc_2", "cspc_top"}


def test_the_last_epoch_is_the_result_and_the_best_a_column_of_its_own(unbroken: tuple[Path, str]) -> None:
    folder, _ = unbroken
    found, entries = results(folder), read_lines(folder / "metrics.jsonl")
    assert list(found["classes"]) == ["grid", "bottle"], "the data set's order"
    for metric in METRICS:
        assert found["mean"][metric] == pytest.approx(entries[-1]["test"][metric])
        best = found["best_on_test"][metric]
        assert best["value"] == max(entry["test"][metric] for entry in entries)
        assert entries[best["epoch"] - 1]["test"][metric] == best["value"]
    best_epoch = found["best_on_test"]["image_auroc"]["epoch"]
    assert read_checkpoint(folder / "best_on_test.pt")["epoch"] == best_epoch
    assert read_checkpoint(folder / "last.pt")["epoch"] == EPOCHS


def test_testing_the_checkpoint_repeats_the_last_evaluation(place: Path, unbroken: tuple[Path, str]) -> None:
    folder, _ = unbroken
    asked = ["--mode", "test", "--eval_ckpt", str(folder / "last.pt")]
    out = program(command(place, "tested", *METHOD, *asked))
    tested = only(place, "tested")
    assert tested.name == f"test-{folder.name}"
    assert results(tested)["classes"] == results(folder)["classes"]
    assert re.search(r"^mean .*\d", out, re.M)
    assert (tested / "pictures" / "grid" / "good_000.jpg").is_file()


def test_a_checkpoint_brings_its_settings_and_a_run_folder_stands_for_it(
    place: Path, unbroken: tuple[Path, str]
) -> None:
    folder, _ = unbroken
    assert main(["--mode", "test", "--eval_ckpt", str(folder), "--work-dir", str(place / "bare")]) == 0
    bare = only(place, "bare")
    assert results(bare)["classes"] == results(folder)["classes"]
    argv = ["--mode", "test", "--eval_ckpt", str(folder), "--work-dir", str(place / "one"), "--class-names", "grid"]
    assert main(argv) == 0
    found = results(only(place, "one"))["classes"]
    assert list(found) == ["grid"]
    assert found["grid"] == pytest.approx(results(folder)["classes"]["grid"], rel=1e-6), "in other batches"
    config = json.loads((bare / "config.json").read_text(encoding="utf-8"))
    assert config["run"]["device"] == "auto", "where to compute is this command's matter, not the checkpoint's"


def test_other_data_than_the_checkpoints_is_refused_and_another_tree_is_not(
    place: Path, unbroken: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = unbroken
    asked = ["--eval_ckpt", str(folder), "--work-dir", str(place / "other")]
    for mode, words, has in (
        ("test", "--holdout 0.5", "0.1"), ("export", "--input-size 96", "64"), ("test", "--dataset visa", "mvtec"),
        ("export", "--k-cpc 5", "4"), ("test", "--no-multi-class", "on"),
    ):  # fmt: skip
        capsys.readouterr()
        assert main(["--mode", mode, *asked, *words.split()]) == 2
        flag, _, value = words.replace("--no-", "--").partition(" ")
        said = f"main.py: error: {flag}: {folder / 'last.pt'} was made with {has}, not with {value or 'off'} as asked"
        assert capsys.readouterr().err.startswith(said)
    make_mvtec(place / "elsewhere", bad=2)
    words = ["--dataset", "folder", "--data-path", str(place / "elsewhere"), "--top-k", "0.5", "--preset", "cpu"]
    assert main(["--mode", "test", *asked, *words]) == 0
    config = results(only(place, "other"))["config"]
    assert (config["model"]["k_cpc"], config["eval"]["top_k"], config["data"]["holdout"]) == (4, 0.5, 0.1)


def same(a: Any, b: Any) -> bool:
    """Bitwise equality of nested values."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def test_a_killed_run_resumes_to_the_bits_of_an_unbroken_one(
    place: Path, unbroken: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its images are read in the main process: workers change no bit either. Nobody else resumes it while it lives."""
    argv = command(place, "killed", *METHOD, *LONG)
    process = start(argv)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("meta epoch 2/"):  # the checkpoint of the first is written by then
            break
    process.send_signal(signal.SIGSTOP)  # as it trains, but it will not end before we have looked
    folder, config = only(place, "killed"), (only(place, "killed") / "config.json").read_bytes()
    capsys.readouterr()
    assert main([*argv, "--resume"]) == 2
    assert f"--resume: {folder} is in use by process {process.pid} on " in capsys.readouterr().err
    assert (folder / "config.json").read_bytes() == config
    process.kill()
    process.communicate()
    assert 1 <= read_checkpoint(folder / "last.pt")["epoch"] < EPOCHS
    assert not (folder / "results.json").exists()
    done = read_checkpoint(folder / "last.pt")["epoch"]
    assert main([*argv, "--resume"]) == 0
    said = capsys.readouterr().out
    assert f"{folder}: taken over from process {process.pid} on " in said
    assert f"--resume: {folder} goes on with meta epoch {done + 1} of {EPOCHS}\n" in said
    assert only(place, "killed") == folder
    assert not (folder / "lock").exists()
    first, second = (read_checkpoint(f / "last.pt") for f in (unbroken[0], folder))
    for part in ("model", "optimizer", "random", "epoch", "best_on_test"):
        assert same(first[part], second[part]), part
    assert losses(folder) == losses(unbroken[0])
    assert results(folder)["classes"] == results(unbroken[0])["classes"]


@pytest.mark.parametrize("layout", ["visa-original", "visa-rearranged"])
def test_both_visa_layouts(place: Path, layout: str) -> None:
    options = {"tree": layout, "classes": "candle pcb1"}
    assert main(command(place, f"run-{layout}", *METHOD, **options)) == 0
    folder = only(place, f"run-{layout}")
    argv = command(
        place, f"test-{layout}", *METHOD, "--mode", "test", "--eval_ckpt", str(folder / "last.pt"), **options
    )
    assert main(argv) == 0
    found = results(folder)["classes"]
    assert list(found) == ["candle", "pcb1"]
    assert all(found[c][m] is not None for c in found for m in METRICS)
    assert results(only(place, f"test-{layout}"))["classes"] == found


# --- one model per class


def test_single_class_training_ends_in_one_table(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [word for word in METHOD if word != "--multi-class"]
    assert main(command(place, "single", *plain, "--limit", "5", "--batch-size", "16", "--memory", "3")) == 0
    folder, out = only(place, "single"), capsys.readouterr().out
    assert "2 classes, 10 training images" in out
    assert out.count("--batch-size 16: there are 5 training images, so a batch has 5\n") == 2
    entry = read_lines(folder / "grid" / "metrics.jsonl")[0]
    assert entry["train"]["images"] == 5
    assert len(read_checkpoint(folder / "grid" / "last.pt")["scorer"]["state"]["memory.descriptors"]) == 3
    tables = out.split("published")  # the results, then beside those of others
    assert tables[0].count("\nmean ") == 1
    assert {p.parent.name for p in folder.glob("*/last.pt")} == {"bottle", "grid"}
    found = results(folder)["classes"]
    assert list(found) == ["grid", "bottle"]
    work = ["--mode", "test", "--eval_ckpt", str(folder), "--work-dir"]
    assert main([*work, str(place / "single-tested")]) == 0
    assert results(only(place, "single-tested"))["classes"] == found
    assert results(only(place, "single-tested"))["config"]["data"]["class_names"] == ["bottle", "grid"]
    assert main([*work, str(place / "single-both"), "--class-names", "grid", "bottle"]) == 0
    assert results(only(place, "single-both"))["classes"] == found
    assert main([*work, str(place / "single-grid"), "--class-names", "grid"]) == 0
    assert results(only(place, "single-grid"))["classes"] == {"grid": found["grid"]}
    capsys.readouterr()
    assert main([*work, str(place / "none"), "--class-names", "wood"]) == 2
    assert f"--class-names: {folder} has no model of 'wood'; choose from all, bottle, grid" in capsys.readouterr().err
    asked = ["--mode", "test", "--eval_ckpt", str(folder / "grid" / "last.pt"), "--class-names", "bottle"]
    assert main([*asked, "--work-dir", str(place / "none")]) == 2
    assert "is a model of 'grid' alone" in capsys.readouterr().err


def test_batches_of_one_image(place: Path) -> None:
    assert main(command(place, "one-by-one", *METHOD, "--batch-size", "1", "--limit", "3")) == 0
    assert results(only(place, "one-by-one"))["mean"]["image_auroc"] is not None


# --- ways of reading images


class Counting(io.StringIO):
    """Counts the processes that read images, at each line that is printed."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[str, int] = {}

    def write(self, text: str) -> int:
        self.readers[text] = len(multiprocessing.active_children())
        return super().write(text)


def test_the_processes_of_a_class_end_with_it(place: Path) -> None:
    plain = [word for word in METHOD if word != "--multi-class"]
    words = ["--workers", "1", "--cache", "none", "--limit", "4", "--no-report", "--pictures", "0"]
    with contextlib.redirect_stdout(Counting()) as printed:
        assert main(command(place, "readers", *plain, *words)) == 0
    readers = {text.split()[0]: count for text, count in printed.readers.items() if text.strip()}
    assert readers["meta"] >= 1, "some read while a class is trained"
    assert printed.readers["class bottle"] == printed.readers["class grid"] == 0
    assert next(count for text, count in printed.readers.items() if "run folder" in text and "class " in text) == 0


@pytest.fixture(scope="module")
def live(place: Path) -> Path:
    """A run that reads its images in this process and computes their features each time."""
    argv = command(place, "live", *METHOD, *REMEMBERING, "--cache", "none", "--noise", "0.3", "--sub-epochs", "2")
    assert main(argv) == 0
    return only(place, "live")


def test_extracted_features_train_the_same_model_to_half_precision(place: Path, live: Path) -> None:
    argv = command(place, "cached", *METHOD, *REMEMBERING, "--noise", "0.3", "--sub-epochs", "2", "--pre-extract")
    assert main(argv) == 0
    folder = only(place, "cached")
    caches = {p: p.stat().st_mtime_ns for p in (place / "cached" / "cache").rglob("*.npy")}
    assert len(caches) == 2 * 5, "four levels and the masks, training and test"
    assert losses(folder) == pytest.approx(losses(live), rel=1e-3)
    for name, found in flat(results(live)["mean"]).items():
        assert results(folder)["mean"][name] == pytest.approx(found, abs=0.02)
    assert main(argv) == 0
    assert {p: p.stat().st_mtime_ns for p in (place / "cached" / "cache").rglob("*.npy")} == caches, "used again"


# --- every mode of the method


@pytest.mark.parametrize(
    "words",
    [
        "--multi-class --quantize-enable --quantize-type naive --concat-pos --c-conds 6 --pool-type max --amp-enable",
        "--multi-class --quantize-enable --no-pattern-quantize --mixed-gaussian --image-score likelihood",
        "--multi-class --concat-pos --mixed-gaussian --pool-type none --quantize-weight 0 --schedule cosine",
        "--multi-class --quantize-enable --objective released --codebooks released --schedule released "
        "--no-standardize --reassign-quantize --mixed-gaussian",
        "--multi-class --extractor test_vit --no-pretrained --quantize-enable --conditioning direct",
    ],
)
def test_variants_train_and_evaluate(place: Path, tmp_path: Path, words: str) -> None:
    assert main(command(place, "variants", *words.split(), "--work-dir", str(tmp_path), "--limit", "4")) == 0
    folder = next(p for p in tmp_path.iterdir() if p.name != "cache")
    assert all(value is not None for value in results(folder)["mean"].values())
    assert losses(folder)[0] is not None


# --- official checkpoints


def official_style(model: VQFlow) -> dict[str, Any]:
    """Our weights as the released code would have saved them (method section 7)."""
    parts: dict[str, Any] = {"epoch": 3}
    rules = [
        (r"hierarchy\.(semantic_encoder|semantic_mlp|feature_mlps)\.(.*)", r"\1 \2"),
        (r"hierarchy\.upsamplers\.(\d)\.(.*)", r"upsamplers \1.1.\2"),
        (r"hierarchy\.cpc\.(.*)", r"cpc_quantizer \1"),
        (r"hierarchy\.cspc\.(.*)", r"cspc_quantizers \1"),
        (r"level_flows\.(\d)\.blocks\.(.*)", r"parallel_flows \1.module_list.\2"),
        (r"prior\.shift\.(\d)\.(.*)", r"sigma_mu_generators \1.sigma.\2"),
        (r"prior\.scale\.(\d)\.(.*)", r"sigma_mu_generators \1.mu.\2"),
        (r"fusion\.(subnet_\d)\.(conv_[st].*)", r"fusion_flow module_list.1.\1.\2"),
        (r"fusion\.(subnet_\d)\.(.*)", r"fusion_flow module_list.1.\1.cross_convs.\2"),
        (r"fusion\.perm_([012])", r"fusion_flow module_list.\1\1.perm"),  # their numbers vary in the released code
    ]
    for key, value in model.state_dict().items():
        rule = next(((a, b) for a, b in rules if re.fullmatch(a, key)), None)
        if rule is None:
            assert re.fullmatch(r"(mean|std)_\d", key), key
            continue
        part, name = re.sub(*rule, key).split()
        turned = name.split(".")[-1] in ("embed", "embed_avg")
        parts.setdefault(part, {})[name] = value.T.contiguous() if turned else value
        if name.endswith(".perm"):
            parts[part][name + "_inv"] = value.argsort()
    return parts


def test_official_checkpoints_are_recognised(place: Path, live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An official file and a file of ours with the same weights give the same results."""
    ours = read_checkpoint(live / "last.pt")
    saved = from_dict(ours["config"])
    settings = to_dict(saved)
    settings["model"] |= {"objective": "released", "codebooks": "released", "standardize": False, "memory": 0}
    config = ModelConfig(**settings["model"])
    seed_everything(0)
    model = VQFlow(config, ours["channels"]).eval()
    settings["train"] |= {"noise": 0.0}
    settings["eval"] |= {"image_score": "mul", "pixel_score": "add"}
    extractor = FrozenExtractor("tf_efficientnet_lite0", input_size=64, normalization=IMAGENET)
    scorer = Scorer(channels=ours["channels"], memory=False)
    write_checkpoint(place / "ours.pt", ours | {
        "config": settings, "model": model.state_dict(), "normalization": [list(v) for v in IMAGENET],
        "scorer": {"rule": scorer.rule.plain(), "state": scorer.state_dict()}, "extractor": extractor.fingerprint(),
    })  # fmt: skip
    torch.save(official_style(model), place / "official.pt")
    assert same(load_official(place / "official.pt", config, ours["channels"]).state_dict(), model.state_dict())
    for name in ("ours", "official"):
        asked = ["--mode", "test", "--eval_ckpt", str(place / f"{name}.pt"), "--cache", "none"]
        assert main(command(place, f"tested-{name}", *METHOD, *asked)) == 0
    found = results(only(place, "tested-official"))
    assert found["classes"] == results(only(place, "tested-ours"))["classes"]
    assert found["config"]["model"]["objective"] == "released"
    capsys.readouterr()
    asked = ["--mode", "test", "--eval_ckpt", str(place / "official.pt"), "--k-cspc", "16"]
    assert main(command(place, "refused", *METHOD, *asked)) == 2
    assert re.fullmatch(r"main.py: error: \S*official.pt: made with other options .*\n", capsys.readouterr().err)
