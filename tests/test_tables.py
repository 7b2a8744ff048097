"""Tables of one run and of several: formats, published figures, intervals, seeds, what is left out, bad input."""

import csv
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from default import MVTEC_CLASSES, VISA_CLASSES, Config, make_config
from fake_data import METHOD, TINY, make_mvtec
from main import main, parse
from utils.metrics import METRICS, ClassResult, evaluate_maps
from utils.metrics.bootstrap import IMAGE_METRICS, bootstrap, drawn_counts, resampled_metrics
from utils.metrics.published import class_rows, comparison_rows
from utils.report.gather import gather_runs, read_run
from utils.report.results import Results, result_rows, write_results
from utils.report.tables import COLUMNS, Table, latex, markdown, percent

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")
FORMATS = ("json", "csv", "md", "tex")


def made(*figures: float) -> ClassResult:
    return ClassResult(**dict(zip(METRICS, figures, strict=True)))


A, B = made(0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3), made(1.0, 0.9, 0.8, NAN, NAN, NAN, NAN)


def results(config: Config | None = None, **changes: object) -> Results:
    plain = {"classes": {"carpet": A, "wood": B}, "best_on_test": None, "intervals": None, "unseen": False}
    return Results(config=config or Config(), **plain | changes)  # type: ignore[arg-type]


def run_main(*words: str | Path) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def own_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes: a whole one, one without masks, one without normal test images."""
    import shutil

    root = make_mvtec(tmp_path_factory.mktemp("own"), classes=("whole", "maskless", "allbad"), train=4, good=2, bad=2)
    shutil.rmtree(root / "maskless" / "ground_truth")
    shutil.rmtree(root / "allbad" / "test" / "good")
    return root


@pytest.fixture(scope="module")
def seeds_work(own_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with two seeds, then a third one by --resume."""
    work = tmp_path_factory.mktemp("work")
    words = [*TINY, *METHOD, "--dataset", "folder", "--data-path", own_tree, "--work-dir", work, "--name", "tiny"]
    assert run_main(*words, "--bootstrap", "50", "--seeds", "1", "2") == 0
    first = (work / "tiny-seed1" / "last.pt").stat().st_mtime_ns
    assert run_main(*words, "--seeds", "1", "2", "3", "--resume") == 0
    assert (work / "tiny-seed1" / "last.pt").stat().st_mtime_ns == first
    return work


def test_one_row_a_class_and_the_papers_columns_first(tmp_path: Path) -> None:
    write_results(tmp_path, results(best_on_test={"image_auroc": {"value": 0.99, "epoch": 3}}))
    rows = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8")))
    assert [row["class"] for row in rows] == ["carpet", "wood", "mean", "best on test"]
    assert list(rows[0])[1:9] == list(COLUMNS)
    assert COLUMNS[:2] == ("image_auroc", "pixel_auroc")
    assert float(rows[2]["image_auroc"]) == pytest.approx(0.95)
    assert rows[1]["pixel_auroc"] == rows[1]["mad"] == ""
    assert float(rows[0]["mad"]) == pytest.approx(0.6)
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| wood | 100.0 | - | 90.0 | 80.0 | - | - | - | - |" in text
    assert "P-AUROC, P-AP, P-F1max, AUPRO: not defined for wood; the mean is over 1 of 2 classes" in text
    assert r"carpet & 90.0 & 60.0" in (tmp_path / "results.tex").read_text(encoding="utf-8")


def test_results_json_is_as_documented(tmp_path: Path) -> None:
    best = {"image_auroc": {"value": 0.99, "epoch": 3}}
    write_results(tmp_path, results(make_config(image_score="likelihood"), best_on_test=best))
    content = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert set(content["classes"]["carpet"]) == set(content["mean"]) == set(METRICS)
    assert content["classes"]["carpet"]["image_auroc"] == 0.9
    assert content["classes"]["wood"]["pixel_auroc"] is None
    assert content["mean"]["pixel_auroc"] == 0.6
    assert content["best_on_test"] == best
    assert content["config"]["data"]["dataset"] == "mvtec"
    assert content["left_out"]["aupro"] == ["wood"]
    assert content["scores"]["image_ap"] == "likelihood"
    assert (content["scores"]["pixel_ap"], content["scores"]["aupro"]) == ("add", "mul")


def test_nothing_to_average_is_a_dash() -> None:
    empty = results(classes={"wood": B})
    assert math.isnan(dict(result_rows(empty))["mean"]["aupro"])
    assert percent(NAN) == "-"


@pytest.mark.parametrize(("dataset", "names"), [("mvtec", MVTEC_CLASSES), ("visa", VISA_CLASSES)])
def test_published_figures_are_whole(dataset: str, names: tuple[str, ...]) -> None:
    rows = {name: figures for name, figures, _ in comparison_rows(dataset)}
    methods = {"VQ-Flow", "MSFlow", "HGAD", "UniAD", "MambaAD", "INP-Former-B", "Dinomaly-B", "Dinomaly2-B"}
    assert methods <= rows.keys()
    assert all(0 < v < 1 and m in METRICS for figures in rows.values() for m, v in figures.items())
    assert all(note for *_, note in comparison_rows(dataset))
    for method, classes in class_rows(dataset).items():
        assert set(classes) == set(names)
        for metric in ("image_auroc", "pixel_auroc"):
            mean = np.mean([figures[metric] for figures in classes.values()])
            assert mean == pytest.approx(rows[method][metric], abs=6e-4), (method, metric)
    assert comparison_rows("folder") == []
    assert class_rows("sample") == {}


def test_published_figures_are_those_handed_over() -> None:
    """Every number of the shared file is in ours, counted."""
    if not (SHARED / "published.md").is_file():
        pytest.skip("the shared file of published figures is not on this machine")
    lines = (SHARED / "published.md").read_text(encoding="utf-8").splitlines()
    cells = [c for line in lines if line.startswith("|") for c in line.strip("|").split("|")[1:3]]
    theirs = sorted(float(v) for c in cells for v in re.findall(r"\b\d+\.\d\b", c))
    figures = [f for d in ("mvtec", "visa") for _, f, _ in comparison_rows(d)]
    ours = [100 * v for f in figures for v in f.values()]
    ours += [100 * v for d in ("mvtec", "visa") for v in (f[m] for f in class_rows(d)["VQ-Flow"].values() for m in f)]
    mean_twice = [99.5, 98.3, 95.9, 98.9]  # VQ-Flow's means stand in both tables; MSFlow's in the per-class one alone
    others = [99.7, 98.8, 97.8, 98.9]
    assert sorted([*ours, *mean_twice]) == pytest.approx(sorted([*theirs, *others]), abs=1e-9)


def test_comparison_stands_in_every_format(tmp_path: Path) -> None:
    shown = write_results(tmp_path, results())
    for text in (shown, *((tmp_path / f"results.{s}").read_text(encoding="utf-8") for s in ("md", "tex"))):
        assert "Dinomaly2-B" in text
        assert "I-AUROC MSFlow" in text
        assert "2 of the 15 classes" in text
        assert "chosen on the test set" in text
    rows = list(csv.DictReader((tmp_path / "published.csv").open(encoding="utf-8")))
    assert rows[0]["method"] == "this run"
    assert {row["method"]: row["image_auroc"] for row in rows}["VQ-Flow"] == "0.995"
    published = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["published"]
    assert published["classes"]["VQ-Flow"]["carpet"]["pixel_auroc"] == 0.986


@pytest.mark.parametrize(
    ("options", "there"), [({}, True), ({"compare": False}, False), ({"dataset": "folder"}, False)]
)
def test_compare_is_on_where_figures_are_published(options: dict, there: bool, tmp_path: Path) -> None:
    write_results(tmp_path, results(make_config(**options)))
    assert ("published" in json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))) == there
    assert (tmp_path / "published.csv").is_file() == there


def test_intervals_by_explicit_resamples() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(30) > 0.4
    scores = np.round(rng.normal(size=30) + labels, 1)  # ties
    got = resampled_metrics(labels, scores, 20, np.random.default_rng(7))
    draws = np.random.default_rng(7)
    order = np.argsort(-scores, kind="stable")
    up, down = (drawn_counts(chosen, 20, draws) for chosen in (labels[order], ~labels[order]))
    for counts, values in zip(up + down, got, strict=True):
        y, s = np.repeat(labels[order], counts), np.repeat(scores[order], counts)
        assert (y.sum(), len(y)) == (labels.sum(), 30)
        precision, recall, _ = precision_recall_curve(y, s)
        f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-300)).max()
        assert values == pytest.approx([roc_auc_score(y, s), average_precision_score(y, s), f1], abs=1e-12)


def test_intervals_are_deterministic_and_narrow_with_more_images() -> None:
    rng = np.random.default_rng(1)
    few, many = (
        {n: (np.arange(count) % 2, rng.normal(size=count) + np.arange(count) % 2) for n in ("a", "b")}
        for count in (20, 2000)
    )
    first = bootstrap(few, 500, seed=3)
    assert first == bootstrap(dict(reversed(few.items())), 500, seed=3)
    assert first != bootstrap(few, 500, seed=4)
    wide, narrow = first.mean["image_auroc"], bootstrap(many, 500, seed=3).mean["image_auroc"]
    assert narrow[1] - narrow[0] < (wide[1] - wide[0]) / 5
    labels, scores = few["a"]
    value = evaluate_maps(labels, scores, np.zeros((20, 1, 1)), np.zeros((20, 1, 1))).image_auroc
    assert first.classes["a"]["image_auroc"][0] <= value <= first.classes["a"]["image_auroc"][1]
    onesided = bootstrap(few | {"c": ([1, 1], [0.0, 1.0])}, 500, seed=3)
    assert onesided.mean == first.mean
    assert "c" not in onesided.classes
    none = bootstrap({"c": ([1, 1], [0.0, 1.0])}, 500, seed=3)
    assert (none.mean, none.classes) == ({}, {})


def test_intervals_cover_the_true_value() -> None:
    """Of 200 experiments with 60 images about 95 % hold the AUROC of the distribution."""
    rng, hits = np.random.default_rng(5), 0
    truth = 0.7602499  # Phi(1 / sqrt 2)
    for seed in range(200):
        labels = np.arange(60) % 2
        low, high = bootstrap({"a": (labels, rng.normal(size=60) + labels)}, 300, seed).mean["image_auroc"]
        hits += low <= truth <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_intervals_in_the_tables(tmp_path: Path) -> None:
    drawn = {"carpet": ([0, 1] * 20, list(np.random.default_rng(0).normal(size=40))), "wood": ([1], [1.0])}
    shown = write_results(tmp_path, results(intervals=bootstrap(drawn, 200, seed=1)))
    assert re.search(r"carpet +90\.0 \[\d+\.\d, \d+\.\d\]", shown)
    assert re.search(r"wood +100\.0 +-", shown)
    rows = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8")))
    assert float(rows[0]["image_ap_low"]) < float(rows[0]["image_ap_high"])
    assert rows[1]["image_ap_low"] == ""
    intervals = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["intervals"]
    assert set(intervals["mean"]) == set(intervals["classes"]["carpet"]) == set(IMAGE_METRICS)
    assert (intervals["resamples"], intervals["level"]) == (200, 0.95)


def test_special_characters() -> None:
    table = Table(rows=[("a_b|c & 5 %", {"x": "1.0 ± 0.1"})], columns=("x",))
    assert r"a\_b|c \& 5 \% & 1.0 $\pm$ 0.1 \\" in latex(table)
    assert r"| a_b\|c &amp; 5 % | 1.0 ± 0.1 |" in markdown(table)


def test_what_a_class_lacks_ends_as_null(seeds_work: Path) -> None:
    content = json.loads((seeds_work / "tiny-seed1" / "results.json").read_text(encoding="utf-8"))
    pixel = [m for m in METRICS if not m.startswith("image")]
    assert all(content["classes"]["maskless"][m] is None for m in pixel)
    assert all(content["classes"]["maskless"][m] is not None for m in IMAGE_METRICS)
    assert all(content["classes"]["allbad"][m] is None for m in IMAGE_METRICS)
    assert all(content["classes"]["allbad"][m] is not None for m in pixel)
    text = (seeds_work / "tiny-seed1" / "results.md").read_text(encoding="utf-8")
    assert "I-AUROC, I-AP, I-F1max: not defined for allbad" in text


def test_seeds_are_summarized(seeds_work: Path) -> None:
    runs = [read_run(seeds_work / f"tiny-seed{seed}") for seed in (1, 2, 3)]
    folder = seeds_work / "tiny-seeds1_2_3"
    assert all((folder / f"results.{suffix}").is_file() for suffix in FORMATS)
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    figures = [run.mean["pixel_auroc"] for run in runs]
    assert content["mean"]["pixel_auroc"] == pytest.approx(np.mean(figures))
    assert content["deviation"]["mean"]["pixel_auroc"] == pytest.approx(np.std(figures, ddof=1))
    assert content["seeds"] == [1, 2, 3]
    assert content["classes"]["maskless"]["aupro"] is None
    rows = {row["class"]: row for row in csv.DictReader((folder / "results.csv").open(encoding="utf-8"))}
    assert float(rows["mean"]["pixel_auroc_sd"]) == pytest.approx(np.std(figures, ddof=1))
    shown = f"{100 * np.mean(figures):.1f} ± {100 * np.std(figures, ddof=1):.1f}"
    assert shown in (folder / "results.md").read_text(encoding="utf-8")
    assert json.loads((seeds_work / "tiny-seed2" / "config.json").read_text())["run"]["seeds"] == []


def test_runs_are_gathered(seeds_work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, results())
    folders = [*(seeds_work / f"tiny-seed{seed}" for seed in (1, 2, 3)), seeds_work / "tiny-seeds1_2_3", tmp_path]
    assert run_main("--mode", "table", *folders, "--work-dir", seeds_work) == 0
    shown = capsys.readouterr().out
    assert "mean of tiny, seeds 1, 2, 3" in shown
    assert "dataset=folder" in shown
    folder = seeds_work / "table"
    assert all((folder / f"table.{suffix}").is_file() for suffix in FORMATS)
    rows = list(csv.DictReader((folder / "table.csv").open(encoding="utf-8")))
    assert len(rows) == 6
    for column in ("pixel_auroc", "pixel_auroc_sd", "mad"):  # the summary is what --seeds wrote
        assert float(rows[3][column]) == pytest.approx(float(rows[5][column]))
    content = json.loads((folder / "table.json").read_text(encoding="utf-8"))
    assert content["seeds"][0]["seeds"] == [1, 2, 3]
    assert set(content["runs"][0]["mean"]) == set(METRICS)


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for part, kind in (("one", "naive"), ("two", "residual")):
        (tmp_path / part / "same").mkdir(parents=True)
        write_results(tmp_path / part / "same", results(make_config(quantize_type=kind)))
    runs = tuple(str(tmp_path / part / "same") for part in ("one", "two"))
    shown = gather_runs(make_config(mode="table", paths=runs, work_dir=str(tmp_path)))
    assert all(run in shown for run in runs)
    assert "quantize_type=naive" in shown
    assert "mean of" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "table"], "PATH: expected run folders after --mode table, but got none"),
        (["--mode", "table", "tests"], "PATH: expected a run folder with a results.json, but got tests"),
        (["work_dirs/run"], "PATH: paths are for --mode table and predict alone, but got 'work_dirs/run'"),
        (["--mode", "test", "--eval_ckpt", "x", "--seeds", "1"], "--seeds: trains one model per seed"),
        (["--seeds", "1", "1"], "--seeds: expected different seeds, but got 1 1"),
        (["--seeds", "1", "--seed", "2"], "--seed: --seeds was given too"),
        (
            ["--dataset", "sample", "--compare"],
            "--compare: there are published figures for mvtec, visa, btad, mpdd, real-iad, cifar10, not for sample",
        ),
        (["--name", "a/b"], "--name: expected letters, digits, '_', '.' and '-', but got 'a/b'"),
        (["--eval-size", "4"], "--eval-size: expected at least 8, but got 4"),
        (["--bootstrap", "-1"], "--bootstrap: expected at least 0, but got -1"),
    ],
)
def test_mistakes_end_in_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"config": {}, "mean": [], "classes": {}}'])
def test_broken_results_end_in_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(text)
    assert run_main("--mode", "table", tmp_path, "--work-dir", tmp_path) == 2
    assert "cannot be read as results of a run" in capsys.readouterr().err


def test_evaluation_at_another_size(tmp_path: Path) -> None:
    """Masks come from their files at that size, cached features or not; a larger size keeps the exact area."""
    tree = make_mvtec(tmp_path / "data", classes=("bottle",), train=4, good=2, bad=2, size=128)
    found = []
    for cached in ("--pre-extract", "--no-pre-extract"):
        words = ["--dataset", "mvtec", "--class-names", "bottle", "--data-path", tree, "--work-dir", tmp_path / cached]
        assert run_main(*TINY, *METHOD, *words, cached, "--eval-size", "128") == 0
        found.append(read_run(next((tmp_path / cached).glob("mvtec*"))).mean)
        text = next((tmp_path / cached).glob("mvtec*/results.md")).read_text(encoding="utf-8")
        assert "maps and masks at 128 x 128" in text
    assert found[0] == pytest.approx(found[1], abs=0.05)
    folder = next((tmp_path / "--pre-extract").glob("mvtec*"))
    words = ["--mode", "test", "--eval_ckpt", folder, "--work-dir", tmp_path / "again", "--eval-size", "64"]
    assert run_main(*words) == 0
    text = next((tmp_path / "again").glob("test-*/results.md")).read_text(encoding="utf-8")
    assert "maps and masks at 64 x 64; checkpoint" in text


def test_paper_targets_are_commands_that_parse() -> None:
    """The six combinations of the ablation differ from each other, and each target's command is accepted."""
    lines = (ROOT / "Makefile").read_text(encoding="utf-8").splitlines()
    prefix = next(line.partition(" = ")[2] for line in lines if line.startswith("ABLATION ="))
    commands = [line.strip().replace("$(ABLATION)", prefix) for line in lines if line.startswith("\t$(ABLATION)")]
    commands += [line.strip() for line in lines if "--preset paper-" in line and line.startswith("\t$(PY)")]
    assert len(commands) == 9
    models = []
    for command in commands:
        for variable, value in (("$(PY)", "python"), ("$(ARGS)", ""), ("$(ABLATION_DIR)", "work_dirs/ablation")):
            command = command.replace(variable, value)
        models.append(parse(shlex.split(command)[2:])[0].model)
    assert len(set(models[:6])) == 6
    assert models[5] == models[6]
