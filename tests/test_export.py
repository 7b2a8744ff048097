"""The ONNX files of a trained model say what the model says, with this program and without PyTorch."""

import contextlib
import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alone import SCRIPT, run_alone
from benchmarks import engines
from datasets import build_datasets
from datasets.decode import read_pixels
from datasets.geometry import Geometry
from datasets.reading import PLAIN
from datasets.transforms import to_picture, to_tensor
from default import PRECISIONS, UsageError, __version__, from_dict
from detector import load_detector as load_image_detector
from export import DECIDED, SCORED, Exported, serialized
from fake_data import METHOD, TINY, make_mvtec, picture, save
from main import main
from stage import Stage, load_detector
from test import EvalResult, evaluate
from utils.run.checkpoint import read_checkpoint

onnx = pytest.importorskip("onnx", reason="the extra 'export' is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a model per class, on a small extractor: tracing takes as long as the network is deep."""
    place = tmp_path_factory.mktemp("export")
    argv = [*TINY, *METHOD, "--no-multi-class", "--extractor", "test_resnet", "--no-pretrained", "--dataset", "mvtec"]
    argv += ["--data-path", str(make_mvtec(place / "data")), "--class-names", "bottle", "--work-dir", str(place / "w")]
    argv += ["--memory", "4", "--image-score", "surprise", "--pixel-score", "contrast", "--eval-size", "48"]
    argv += ["--resize", "pad"]
    assert main([*argv, "--no-report", "--false-alarm-rate", "0.2"]) == 0
    return next(p for p in (place / "w").iterdir() if p.name != "cache")


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[str]:
    """What the export of the whole folder prints; the files are there afterwards. One trace serves all precisions."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        words = ["--mode", "export", "--eval_ckpt", str(folder), "--precision", "float32", "float16", "int8"]
        assert main(words) == 0
    return [line for line in said.getvalue().splitlines() if ".onnx" in line]


@pytest.fixture(scope="module")
def expected(folder: Path, lines: list[str]) -> EvalResult:
    """What the evaluation of the same checkpoint says of the test images."""
    content = read_checkpoint(folder / "bottle" / "last.pt")
    stage = Stage(from_dict(content["config"]))
    test = build_datasets(stage.config.data, ("bottle",), stage.config.score_size)[1]
    features = stage.ordered_features(test).epoch(0)
    return evaluate(load_detector(content, stage, ""), features, ["bottle"], stage.config.eval)


def numbers(rows: list[dict[str, str]], name: str) -> np.ndarray:
    return np.array([float(row[name]) for row in rows])


def test_a_folder_is_exported_as_a_whole(folder: Path, lines: list[str]) -> None:
    names = ["model.onnx", "model.float16.onnx", "model.int8.onnx"]
    assert [line.split(":")[0] for line in lines] == [str(folder / "bottle" / name) for name in names]
    outputs = "(B, 64, 64, 3) -> map, score, p_value, threshold, verdict, mask, pixel_threshold, concept; "
    assert all(outputs in line for line in lines)
    assert "; 3 images of noise: 3 of 3 verdicts equal, scores off by " in lines[0]
    assert all("; 6 normal images: " in line and " of 6 verdicts equal" in line for line in lines[1:])


@pytest.mark.skipif(os.name == "nt", reason="pipes end in another way")
def test_the_script_ends_without_a_word_when_its_reader_has_gone(folder: Path, expected: EvalResult) -> None:
    words = [sys.executable, str(SCRIPT), str(folder / "bottle" / "model.onnx"), expected.images[0].path]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
        assert script.stdout and script.stderr
        script.stdout.close()
        assert script.stderr.read() == ""
    assert script.returncode == 1


def test_the_script_says_what_an_evaluation_says(folder: Path, expected: EvalResult) -> None:
    rows, status = run_alone(folder / "bottle" / "model.onnx", *(Path(image.path) for image in expected.images))
    assert status == 0
    assert [row["path"] for row in rows] == [image.path for image in expected.images]
    scores = np.array([image.score for image in expected.images])
    limits = np.array([image.threshold for image in expected.images])
    off = 2e-3 * np.abs(scores).max()  # an evaluation rounds features as a cache does
    np.testing.assert_allclose(numbers(rows, "score"), scores, rtol=1e-2, atol=off)
    np.testing.assert_allclose(numbers(rows, "threshold"), limits, rtol=1e-5)
    sure = np.abs(scores - limits) > 1e-2 * np.abs(scores) + off
    verdicts = np.array([row["verdict"] == "defect" for row in rows])
    assert sure.sum() > len(rows) // 2
    np.testing.assert_array_equal(verdicts[sure], np.array([image.defective for image in expected.images])[sure])
    assert 0 < verdicts.sum() < len(verdicts)


def test_the_script_reads_as_the_program_does(folder: Path, expected: EvalResult, tmp_path: Path) -> None:
    model = folder / "bottle" / "model.onnx"
    with Image.open(expected.images[-1].path) as image:
        wide = image.resize((150, 90))
    tags = Image.Exif()
    tags[0x0112] = 6
    (tmp_path / "in" / ".hidden").mkdir(parents=True)
    wide.save(tmp_path / "in" / "b.PNG")
    wide.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "in" / "a.png", exif=tags)
    wide.convert("L").save(tmp_path / "in" / "c.png")
    wide.save(tmp_path / "in" / ".hidden" / "d.png")
    (tmp_path / "in" / "e.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    wide.convert("RGBA").resize((80, 80)).save(tmp_path / "f.png")
    wide.putalpha(128)
    wide.save(tmp_path / "g.png")
    Image.fromarray(np.full((9, 9), 999, np.uint16)).save(tmp_path / "h.png")
    rows, status = run_alone(model, tmp_path / "in", *(tmp_path / f"{n}.png" for n in "fghi"), Path("=1+1.png"))
    names = ["a.png", "b.PNG", "c.png", "e.jpg", *(f"{n}.png" for n in "fghi"), "'=1+1.png"]
    assert [Path(row["path"]).name for row in rows] == names
    assert status == 1
    errors = [row["error"] for row in rows]
    assert [bool(error) for error in errors] == [False, False, False, True, False, True, True, True, True]
    assert "transparent" in errors[5]
    assert "more than 8 bits" in errors[6]
    assert errors[7] == "No such file or directory"
    same = ("score", "p_value", "peak_x", "peak_y")
    assert [rows[0][name] for name in same] == [rows[1][name] for name in same], "turned as the tag says"
    session = runtime.InferenceSession(str(model))
    for row in rows[1:3]:
        path = Path(row["path"])
        place = Geometry(input_size=64, resize="pad").place((150, 90))
        pixels = to_picture(to_tensor(path, read_pixels(path), Geometry(input_size=64, resize="pad"), PLAIN))
        found = dict(zip(DECIDED, session.run(list(DECIDED), {"image": pixels[None]}), strict=True))
        assert float(row["score"]) == pytest.approx(float(found["score"][0]), rel=1e-5)
        assert place.part(found["map"][0]).shape == (28, 48)
        heat = place.drawn(found["map"][0])
        assert float(row["peak_value"]) == pytest.approx(heat.max(), rel=1e-5)
        assert heat[int(row["peak_y"]), int(row["peak_x"])] == pytest.approx(heat.max(), rel=1e-5)


def test_script_and_program_put_tiles_together_alike(folder: Path, lines: list[str], tmp_path: Path) -> None:
    """The graph judges squares: who runs it cuts the tiles that the file's facts tell of."""
    model, tiles = folder / "bottle" / "model.onnx", {"tile": 50, "overlap": 20, "resize": "squash"}
    (tmp_path / "tiles.onnx").write_bytes(serialized(onnx.load(model), facts_of(model) | tiles))
    paths, rng = [], np.random.default_rng(0)
    for number, size in enumerate([(130, 90), (40, 120), (50, 50), (51, 30)]):
        image = picture(rng, size=max(size))[0][: size[1], : size[0]]
        image[20:26, 20:27] = 255 * (number % 2)
        paths.append(tmp_path / f"{number}.png")
        save(paths[-1], image.astype(np.uint8))
    rows, status = run_alone(tmp_path / "tiles.onnx", *paths)
    assert status == 0
    for row, wanted in zip(rows, load_image_detector(tmp_path / "tiles.onnx", device="cpu")(paths), strict=True):
        assert row["verdict"] == ("defect" if wanted.defective else "good")
        highest = float(wanted.map.max())
        near = {"rel": 1e-4, "abs": 1e-4 * float(np.abs(wanted.map).max())}
        assert float(row["score"]) == pytest.approx(wanted.score, **near)
        assert float(row["peak_value"]) == pytest.approx(highest, **near)
        assert wanted.map[int(row["peak_y"]), int(row["peak_x"])] == pytest.approx(highest, **near)


def test_a_batch_is_its_images_and_the_mask_its_map(folder: Path, lines: list[str]) -> None:
    session = runtime.InferenceSession(str(folder / "bottle" / "model.onnx"))
    images = np.random.default_rng(1).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    images[0, :20] = 255
    found = dict(zip(DECIDED, session.run(list(DECIDED), {"image": images}), strict=True))
    for i, image in enumerate(images):
        single = dict(zip(DECIDED, session.run(list(DECIDED), {"image": image[None]}), strict=True))
        np.testing.assert_allclose(found["map"][i], single["map"][0], rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(found["score"][i], single["score"][0], rtol=1e-3)
    facts = facts_of(folder / "bottle" / "model.onnx")
    assert found["map"].shape == (3, 48, 48)
    np.testing.assert_array_equal(found["mask"], found["map"] > np.float32(facts["pixel_thresholds"][0]))
    np.testing.assert_array_equal(found["verdict"], found["score"] > found["threshold"])


def facts_of(path: Path) -> dict[str, Any]:
    return {p.key: json.loads(p.value) for p in onnx.load(path).metadata_props}


def test_a_file_says_what_it_is(folder: Path, lines: list[str]) -> None:
    facts = facts_of(folder / "bottle" / "model.float16.onnx")
    assert (facts["precision"], facts["input_size"], facts["classes"]) == ("float16", 64, ["bottle"])
    assert (facts["image_score"], facts["map"], facts["top_k"]) == ("surprise", "surprise", 0.03)
    assert (facts["weights_license"], facts["torch"], facts["version"]) == (None, torch.__version__, __version__)
    assert facts["readings"]["bottle"]["background"] is None
    assert facts["false_alarm_rate"] == 0.2
    assert "no guarantee" in facts["basis"]
    assert len(facts["thresholds"]) == len(facts["pixel_thresholds"]) >= 1
    assert facts["colour_scale"] == [0.0, facts["pixel_thresholds"][0]]


def test_the_script_without_thresholds(folder: Path, lines: list[str], expected: EvalResult, tmp_path: Path) -> None:
    model = onnx.load(folder / "bottle" / "model.onnx")
    del model.graph.output[2:]
    onnx.save(model, tmp_path / "bare.onnx")
    rows, status = run_alone(tmp_path / "bare.onnx", Path(expected.images[0].path))
    assert status == 0
    assert (rows[0]["p_value"], rows[0]["threshold"], rows[0]["verdict"]) == ("", "", "")
    assert float(rows[0]["score"]) == pytest.approx(expected.images[0].score, rel=0.02)


def test_a_model_without_thresholds_gives_map_and_score(folder: Path) -> None:
    content = read_checkpoint(folder / "bottle" / "last.pt")
    stage = Stage(from_dict(content["config"]))
    content["decision"] = None
    exported = Exported(stage.extractor, load_detector(content, stage, ""), stage.config.eval).eval()
    assert exported.names == (*SCORED, "concept")
    shapes = [tuple(v.shape) for v in exported(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))]
    assert shapes == [(2, 48, 48), (2,), (2,)]


# --- the file in the program


def test_a_file_judges_like_its_checkpoint(
    folder: Path, lines: list[str], expected: EvalResult, tmp_path: Path
) -> None:
    model = folder / "bottle" / "model.onnx"
    file, original = load_image_detector(model, device="cpu"), load_image_detector(folder, device="cpu")
    paths = [image.path for image in expected.images]
    for found, wanted in zip(file(paths), original(paths), strict=True):
        off = 1e-3 * np.abs(wanted.map).max()
        np.testing.assert_allclose(found.map, wanted.map, atol=off)
        assert found.map.shape == found.mask.shape == (64, 64)
        limits = (found.threshold, found.pixel_threshold)
        assert limits == pytest.approx((wanted.threshold, wanted.pixel_threshold), rel=1e-5)
        if abs(wanted.score - wanted.threshold) > off:
            assert (found.defective, found.p_value) == (wanted.defective, pytest.approx(wanted.p_value))
        assert (found.concept, found.class_name) == (wanted.concept, "bottle")
    assert (file.engine, file.decides, file.rules()) == ("onnxruntime", True, original.rules())
    Image.fromarray(np.arange(81, dtype=np.uint16).reshape(9, 9) * 3).save(tmp_path / "deep.png")
    words = ["--mode", "predict", "--eval_ckpt", str(model), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main([*words, "--save-masks", *paths, str(tmp_path / "deep.png")]) == 1
    with (tmp_path / "out" / "scores.csv").open(encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert rows.pop()["error"] == "has more than 8 bits per channel, an ONNX file takes 8; give the checkpoint"
    assert [row["path"] for row in rows] == paths
    assert {(row["concept"], row["error"]) for row in rows} == {("bottle", "")}
    assert len(list((tmp_path / "out" / "masks").iterdir())) == len(paths)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--false-alarm-rate", "0.1"], "--false-alarm-rate: MODEL has its own 0.2; leave it out, or export the model"),
        (["--k-cpc", "3"], "--k-cpc: MODEL has its own; leave it out"),
        (["--engine", "torch"], "MODEL is an ONNX file; leave it out, or give the checkpoint"),
        (["--class-names", "grid"], "--class-names: MODEL is no model of 'grid'; choose from all, bottle"),
        (["--device", "mps"], "--device: onnxruntime, as it is installed here, computes on cpu, not on mps"),
    ],
)
def test_what_a_file_fixes_is_refused(
    folder: Path, lines: list[str], words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(folder / "bottle" / "model.onnx")
    assert main(["--mode", "predict", "--eval_ckpt", model, "docs", *words]) == 2
    said = capsys.readouterr().err
    assert expected.replace("MODEL", model) in said
    assert said.count("\n") == 1


def test_what_is_no_file_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(UsageError, match="no such file"):
        load_image_detector(path)
    path.write_bytes(b"no model")
    with pytest.raises(UsageError, match=r"cannot read .* as an ONNX file"):
        load_image_detector(path)
    make, kind = onnx.helper, onnx.TensorProto.FLOAT
    values = [make.make_tensor_value_info(name, kind, [1]) for name in ("image", "out")]
    graph = make.make_graph([make.make_node("Identity", ["image"], ["out"])], "other", values[:1], values[1:])
    onnx.save(make.make_model(graph, ir_version=10, opset_imports=[make.make_opsetid("", 20)]), path)
    with pytest.raises(UsageError, match="is not an ONNX file of --mode export"):
        load_image_detector(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"package onnxruntime is not installed; pip install -e '.\[exp"):
        load_image_detector(path)


def test_precision_needs_normal_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mode", "export", "--eval_ckpt", str(folder), "--data-path", str(tmp_path / "gone")]
    assert main([*words, "--precision", "int8"]) == 2
    assert (
        "--precision int8: is calibrated on normal images, but --data-path: no such folder" in capsys.readouterr().err
    )
    assert main(["--precision", "int8"]) == 2
    assert "--precision: does nothing without --mode export" in capsys.readouterr().err


def test_export_wants_a_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mode", "export"]) == 2
    assert "--eval_ckpt: expected a checkpoint" in capsys.readouterr().err


def test_engines_side_by_side(folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    made, size = engines.engines_of(folder / "bottle" / "last.pt", threads=1)
    assert (size, [e.name for e in made]) == (64, ["PyTorch", *(f"onnxruntime {p}" for p in PRECISIONS)])
    rows = [row.split(" | ") for row in engines.table(made[:2], np.full((1, 64, 64, 3), 99, np.uint8), 1).splitlines()]
    assert [row[0] for row in rows[2:]] == ["| PyTorch", "| onnxruntime float32"]
    assert rows[2][2:] == ["1.00", "0 |"]
    assert float(rows[3][3].rstrip(" |")) < 1e-3
