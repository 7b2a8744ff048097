"""The benchmarks: what they compare and count, and the ablation on a tiny tree."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import ablation, classes, gpu
from benchmarks.counted import peak_gib
from benchmarks.forms import Bench, Form, ends, for_inference, ladder
from benchmarks.throughput import check_agreement
from fake_data import TINY, make_mvtec
from models.work import Work
from utils.run.device import has_bfloat16

CPU = torch.device("cpu")


def test_inference_compares_what_differs_without_training() -> None:
    plain = [form for form in ladder(CPU) if not form.compiled and not form.bf16]
    assert [form.name for form in for_inference(plain)] == [
        "released way", "extractor without gradients", "our direct form", "structured condition", "channels-last",
        "quick extractor", "cached features",
    ]  # fmt: skip
    low = ["ours in bfloat16"] * has_bfloat16(CPU)
    assert [f.name for f in for_inference(ends(ladder(CPU)))] == ["released way", "ours", *low, "cached features"]
    assert [f.name for f in ends(ladder(CPU))] == ["released way", "ours", *low, "activations computed again"]
    assert not any(form.cached for form in for_inference(plain)[:-1])


def test_parts_belong_to_the_timed_work_alone() -> None:
    bench = Bench("small", 2, CPU, input_size=64)
    check_agreement(bench)
    bench.use(Form(name="", cached=True))
    parts = bench.timed(bench.infer)
    before = dict(parts)
    bench.use(Form(name=""))
    bench.infer()
    assert parts == before
    assert parts["extractor"] == 0 < parts["flows"]
    assert bench.timed(bench.train_step)["extractor"] > 0


def test_bytes_are_counted_once_and_until_they_go() -> None:
    x = torch.zeros(100)
    with Work([x, x.view(10, 10)]) as work:
        y = x[:] + 1
        z = y[:50] * 2
        assert work.peak == 4 * (100 + 100 + 50)
        del y
        w = z.view(5, 10) + z.view(5, 10)
        assert work.peak == 4 * (100 + 100 + 50)
        v = torch.cat([w.flatten(), z])
    assert work.peak == 4 * (100 + 50 + 50 + len(v))


def test_a_step_of_ours_holds_less_at_the_published_batch() -> None:
    released, ours = (peak_gib("small", 16, form) for form in ends(ladder(CPU))[:2])
    assert ours < 0.6 * released


def test_ablation_trains_reads_and_uses_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_mvtec(tmp_path / "data")
    rows = ["recipe", "memory alone", "no position encoding"]
    words = [
        "--data-path",
        str(tmp_path / "data"),
        "--work-dir",
        str(tmp_path / "work"),
        "--seeds",
        "1",
        "--only",
        *rows,
    ]

    def table(*flags: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", ["ablation.py", *words, "--flags", *TINY, "--pictures", "0", *flags])
        ablation.main()
        return capsys.readouterr().out.splitlines()

    first = table()
    assert [line.split(" | ")[0] for line in first[2:]] == [f"| {row}" for row in rows]
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*/last.pt")}
    assert len(files) == 2
    assert table() == first
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "work").glob("*/last.pt")}
    with pytest.raises(SystemExit) as left:
        table("--lr", "0.01")
    assert left.value.code == 2
    assert "was made with lr" in capsys.readouterr().err


def test_models_of_groups_of_classes_have_rows_with_and_without_codebooks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two classes each has its model; their rows are means over the classes."""
    make_mvtec(tmp_path / "data")
    words = [
        "--data-path",
        str(tmp_path / "data"),
        "--work-dir",
        str(tmp_path / "work"),
        "--seeds",
        "1",
        "--sizes",
        "1",
    ]
    flags = ["--flags", *TINY, "--pictures", "0"]
    monkeypatch.setattr(sys, "argv", ["classes.py", *words, *flags])
    classes.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]
    endings = [f"{reading}{end}" for end in ("", ", no codebooks") for reading in classes.READ]
    assert [row[0] for row in rows] == [f"1 a model, {end}" for end in endings]
    folders = {path.parent.name for path in (tmp_path / "work").glob("*/last.pt")}
    assert len(folders) == 4
    single = [json.loads(p.read_text())["mean"] for p in (tmp_path / "work").glob("cpu-1-*/results.json")]
    assert len(single) == 2
    for column, metric in enumerate(classes.METRICS, 1):
        assert float(rows[0][column]) == pytest.approx(50 * sum(own[metric] for own in single), abs=0.051), metric


def test_groups_are_neighbours_and_hold_every_class_once() -> None:
    assert classes.groups_of(["b", "a", "d", "c", "e"], 2) == [["a", "b"], ["c", "d"], ["e"]]
    assert classes.groups_of(["b", "a"], 5) == [["a", "b"]]


def test_what_a_gpu_is_to_show_is_tried_out_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, tables = tmp_path / "new" / "GPU.json", tmp_path / "B.md"
    tables.write_text(f"before\n{gpu.BEGIN}\nold\n{gpu.END}\nafter\n", encoding="utf-8")
    words = ["--small", "--device", "cpu", "--out", str(out), "--tables", str(tables)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    assert left.value.code == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["sections"]) == list(gpu.SECTIONS) and found["left_out"] == []
    differences = {row["what"]: row["difference"] for row in found["sections"]["Difference from the CPU"]}
    assert 0 < differences.pop("the same in bfloat16") < 0.005
    assert differences == dict.fromkeys(("loss", "log-determinant", "gradient", "the memory's distances"), 0.0)
    assert [row["batch"] for row in found["sections"]["Inference by batch"]] == [1, 2]
    kernels = found["sections"]["Largest kernels"]
    assert len(kernels) == 5 and 0 < kernels[4]["ms"] <= kernels[0]["ms"]
    text = tables.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "### Training" in text and "| released way |" in text
    assert gpu.BEGIN in (gpu.ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu"])
    with pytest.raises(SystemExit) as left:
        gpu.main()
    assert left.value.code == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_sections_that_fail_or_have_no_time_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: gpu.Session) -> gpu.Rows:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    monkeypatch.setattr(gpu, "SECTIONS", {"A": failing, "B": lambda _: [{"x": 1.5, "y": float("nan")}]})
    found, left_out = gpu.measured(object())  # type: ignore[arg-type]
    assert found["A"] == [{"failed": "CUDA out of memory."}] and left_out == []
    assert gpu.tables(found, ["C"]).endswith("| 1.5 |  |\n\nLeft out for want of time: C.")
    monkeypatch.setattr(gpu, "LIMIT", -1.0)
    assert gpu.measured(object()) == ({}, ["A", "B"])  # type: ignore[arg-type]
