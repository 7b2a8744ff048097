"""Decisions on images without labels: from Python, and by the command line into tables, pictures and maps."""

import _thread
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from default import UsageError
from detector import Opened, load_detector
from fake_data import METHOD, TINY, make_mvtec, picture, png16
from main import main
from predict import opened_batches, scaled
from prediction import Prediction, regions_of
from utils.run.checkpoint import read_checkpoint, write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SCORES = ["--image-score", "surprise", "--pixel-score", "contrast", "--false-alarm-rate", "0.3"]
ODD = os.fsdecode(b"o\xffdd.png") if sys.platform not in ("win32", "darwin") else "odd.png"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvtec(tmp_path_factory.mktemp("tree"), train=16)


@pytest.fixture(scope="module")
def run_folder(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with thresholds; its data and work folder are not needed afterwards."""
    work = tmp_path_factory.mktemp("work")
    argv = [*TINY, *METHOD, *SCORES, "--dataset", "mvtec", "--data-path", str(tree), "--class-names", "bottle", "grid"]
    assert main([*argv, "--work-dir", str(work), "--memory", "9", "--holdout", "0.5", "--no-report"]) == 0
    return next(p for p in work.iterdir() if p.name != "cache")


def predict(run_folder: Path, *words: str | Path) -> int:
    return main(["--mode", "predict", "--eval_ckpt", str(run_folder), "--device", "cpu", *map(str, words)])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- Python


def test_an_image_is_judged_alike_in_every_form(
    run_folder: Path, tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(4)
    expected = torch.randn(3)
    torch.manual_seed(4)
    detector = load_detector(run_folder, device="cpu")
    assert torch.equal(torch.randn(3), expected), "the program's random numbers stay its own"
    assert not list(tmp_path.iterdir()), "no work folder"
    path = tree / "bottle" / "test" / "broken" / "000.png"
    values = np.asarray(Image.open(path).convert("RGB"))
    first = detector(path)
    assert isinstance(first, Prediction)
    for given in (str(path), Image.open(path), values, values.astype(np.float64) / 255):
        again = detector(given)
        assert again.score == pytest.approx(first.score, rel=1e-2)
        assert (again.defective, again.concept) == (first.defective, first.concept)
    assert detector([path, values])[1].score == pytest.approx(first.score, rel=1e-4)
    assert detector([]) == []


def test_a_prediction_is_at_the_images_own_size(run_folder: Path) -> None:
    detector = load_detector(run_folder / "last.pt", device="cpu")
    rng = np.random.default_rng(3)
    image = np.asarray(Image.fromarray(picture(rng, defect=True)[0]).resize((150, 90)))
    found = detector(image)
    assert found.map.shape == found.mask.shape == (90, 150)
    assert found.map.dtype == np.float32
    np.testing.assert_array_equal(found.mask, found.map > found.pixel_threshold)
    assert found.peak.value == found.map.max() == found.map[found.peak.y, found.peak.x]
    assert found.defective == (found.score > found.threshold)
    assert 0 < found.p_value <= 1
    covered = np.zeros_like(found.mask)
    for region in found.regions:
        covered[region.y : region.y + region.height, region.x : region.x + region.width] = True
    assert (covered | ~found.mask).all()


def test_regions_by_hand() -> None:
    values = np.zeros((6, 8), np.float32)
    values[1, 1], values[2, 2], values[4:6, 5:8] = 3, 4, 2
    values[5, 7] = 9
    first, second = regions_of(values, values > 0)
    assert (first.x, first.y, first.width, first.height) == (5, 4, 3, 2)
    assert (first.peak.x, first.peak.y, first.peak.value) == (7, 5, 9)
    assert (second.x, second.y, second.width, second.height) == (1, 1, 2, 2), "corners touch: one region"
    assert (second.peak.x, second.peak.y) == (2, 2)
    assert regions_of(values, values > 10) == ()


def test_threads_share_a_detector(run_folder: Path, tree: Path) -> None:
    detector = load_detector(run_folder, device="cpu")
    paths = sorted((tree / "grid" / "test").rglob("*.png"))
    alone = [detector(path) for path in paths]
    found: dict[int, list[Prediction]] = {}

    def work(number: int) -> None:
        found[number] = [detector(path) for path in paths[number:] + paths[:number]]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        for one, other in zip(found[number], alone[number:] + alone[:number], strict=True):
            assert one.score == other.score
            np.testing.assert_array_equal(one.map, other.map)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.zeros((4, 4, 2), np.uint8), "expected (H, W) or (H, W, 3), grey or RGB"),
        (np.zeros((0, 4), np.uint8), "expected (H, W) or (H, W, 3), grey or RGB"),
        (np.full((4, 4), "a"), "expected uint8, deeper integers or floating-point numbers"),
        (np.full((4, 4), np.nan), "holds values that are not finite"),
        (np.full((4, 4), 2.0), "the value 2 is beyond 0 to 1"),
        ("nowhere.png", "nowhere.png: cannot be read as an image (No such file"),
    ],
)
def test_what_is_no_image_is_one_line(run_folder: Path, image: object, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        load_detector(run_folder, device="cpu")(image)
    assert expected in str(error.value)


def test_classes_that_are_read_differently(run_folder: Path, tmp_path: Path) -> None:
    content = read_checkpoint(run_folder / "last.pt")
    twelve = content["readings"]["grid"] | {"integers": [0, 4095]}
    write_checkpoint(tmp_path / "last.pt", content | {"readings": content["readings"] | {"grid": twelve}})
    deep = (picture(np.random.default_rng(0))[0].astype(np.uint16) << 4).clip(0, 4095)
    both, one = load_detector(tmp_path, device="cpu"), load_detector(tmp_path, device="cpu", class_name="grid")
    plain = (deep >> 4).astype(np.uint8)
    assert both(plain).score == one(plain).score
    assert one(deep).score == pytest.approx(one(plain).score, rel=0.1)
    with pytest.raises(UsageError, match="say which class it is of: --class-names CLASS"):
        both(deep)
    with pytest.raises(UsageError, match="is no model of 'pill'; choose from all, grid, bottle"):
        load_detector(tmp_path, device="cpu", class_name="pill")


# --- the command line


def test_files_in_a_folder_become_rows_and_pictures(
    run_folder: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = sorted((tree / "bottle" / "test").rglob("*.png"))
    out = tmp_path / "out"
    assert predict(run_folder, tree / "bottle" / "test", "--output", out, "--save-masks", "--save-maps", "npy") == 0
    printed = capsys.readouterr()
    assert printed.out.count("decision at a false-alarm rate of") == 1
    assert f"{len(images)} images:" in printed.out
    assert "\r" not in printed.err, "no bar where there is no terminal"
    rows = table(out)
    lines = [json.loads(line) for line in (out / "scores.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["path"] for row in rows} == {str(p) for p in images}
    detector = load_detector(run_folder, device="cpu")
    for number, (row, line) in enumerate(zip(rows, lines, strict=True), start=1):
        found = detector(row["path"])
        assert float(row["score"]) == line["score"] == pytest.approx(found.score, rel=1e-3)
        assert row["verdict"] == ("defect" if found.defective else "good")
        assert int(row["regions"]) == len(line["regions"])
        stem = f"{number:06d}_{Path(row['path']).stem}"
        values, mask = np.load(out / "maps" / f"{stem}.npy"), cv2.imread(str(out / "masks" / f"{stem}.png"), 0)
        np.testing.assert_allclose(values, found.map, rtol=1e-2, atol=1e-2)
        assert (mask > 0).sum() == (values > found.pixel_threshold).sum()
        overlay = cv2.imread(str(out / "overlays" / f"{stem}.jpg")).astype(int)
        assert overlay.shape[:2] == found.map.shape
        coloured = (overlay.max(2) - overlay.min(2)).max() > 8
        assert coloured == (values > 1.1 * found.pixel_threshold).any(), "what is normal is grey"
    assert {row["verdict"] for row in rows} == {"defect", "good"}
    assert predict(run_folder, tree / "bottle" / "test", out, "--output", out, "--fail-on", "defect") == 3
    assert f"{len(images)} of {len(images)} images were judged before" in capsys.readouterr().out
    assert len(table(out)) == len(rows)


def test_a_killed_prediction_goes_on(run_folder: Path, tree: Path, tmp_path: Path) -> None:
    images = sorted((tree / "grid" / "test" / "good").rglob("*.png"))
    assert predict(run_folder, images[0], "--output", tmp_path) == 0
    with (tmp_path / "scores.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"path": "ha')
    (tmp_path / "scores.csv").write_text("half a tab", encoding="utf-8")
    assert predict(run_folder, tree / "grid" / "test" / "good", "--output", tmp_path) == 0
    assert [row["path"] for row in table(tmp_path)] == [str(p) for p in images]
    assert len(list((tmp_path / "overlays").iterdir())) == len(images)


def test_another_model_may_not_write_into_the_same_table(
    run_folder: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = next((tree / "grid").rglob("*.png"))
    assert predict(run_folder, image, "--output", tmp_path) == 0
    assert predict(run_folder, image, "--output", tmp_path, "--false-alarm-rate", "0.1") == 2
    assert "holds predictions of another model or rate" in capsys.readouterr().err


def test_beside_the_run_and_from_standard_input(run_folder: Path, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = sorted((tree / "grid" / "test" / "broken").rglob("*.png"))
    names = [*images, tree / "gone.png"]
    given = io.TextIOWrapper(io.BytesIO(b"\n".join(os.fsencode(p) for p in names)))
    monkeypatch.setattr("sys.stdin", given)
    assert predict(run_folder, "-", "--no-overlays", "--fail-on", "defect") == 1, "not all are known to be good"
    rows = table(run_folder / "predict")
    assert [row["path"] for row in rows] == [str(p) for p in names]
    assert "No such file" in rows[-1]["error"]
    assert not (run_folder / "predict" / "overlays").exists()
    assert predict(run_folder, images[0]) == 0
    assert len(table(run_folder / "predict-2")) == 1


def test_a_mixed_folder_is_judged_in_one_run(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What happens to each: `expected` is the error, None for an image that is judged."""
    mixed, rng = tmp_path / "mixed folder", np.random.default_rng(0)
    mixed.mkdir()
    image = Image.fromarray(picture(rng, size=96)[0]).resize((96, 64))
    image.save(mixed / "plain.jpg")
    image.convert("CMYK").save(mixed / "cmyk.jpg")
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(mixed / "turned.jpg", exif=turned)
    image.save(mixed / "with spaces, 漢字.png")
    image.save(mixed / ODD)
    image.convert("L").save(mixed / "grey.tif")
    image.quantize(16).save(mixed / "palette.gif")
    image.save(mixed / "frames.gif", save_all=True, append_images=[image.rotate(90)])
    image.convert("RGBA").resize((50, 50)).save(mixed / "opaque.png")
    image.putalpha(128)
    image.save(mixed / "clear.png")
    image = image.convert("RGB")
    (mixed / "cut.jpg").write_bytes((mixed / "plain.jpg").read_bytes()[:-300])
    png16(mixed / "deep.png", np.asarray(image).astype(np.uint16) * 257, 2)
    (mixed / "cut.png").write_bytes((mixed / ODD).read_bytes()[:600])
    (mixed / "text.png").write_text("no image at all")
    (mixed / "empty.png").write_bytes(b"")
    Image.new("L", (1, 1), 90).save(mixed / "dot.png")
    Image.new("1", (20_000, 20_000)).save(mixed / "huge.png")
    (mixed / "notes.txt").write_text("left out")
    if sys.platform != "win32":
        (mixed / "loop").symlink_to(mixed)
        (mixed / "loop.png").symlink_to(mixed / "loop.png")
    expected = {
        "plain.jpg": "", "cmyk.jpg": "", "turned.jpg": "", "with spaces, 漢字.png": "", "dot.png": "",
        ODD.replace("\udcff", "\\xff"): "", "deep.png": "is beyond 0 to 255, the range of its class's training images",
        "cut.png": "cannot be read as an image", "text.png": "cannot be read as an image",
        "empty.png": "cannot be read as an image", "huge.png": "pixels are more than --max-pixels",
        "grey.tif": "", "palette.gif": "", "opaque.png": "", "clear.png": "is transparent",
        "frames.gif": "several frames",
        "cut.jpg": "cannot be read as an image",
    }  # fmt: skip
    assert predict(run_folder, mixed, "--output", tmp_path / "out", "--save-masks") == 1
    assert f"8 of {len(expected)} images could not be read" in capsys.readouterr().err
    rows = {Path(row["path"]).name: row for row in table(tmp_path / "out")}
    assert rows.keys() == expected.keys()
    for name, reason in expected.items():
        assert (rows[name]["score"] == "") == bool(reason), name
        assert reason in rows[name]["error"], name
        assert bool(reason) == bool(rows[name]["error"]), name
    sizes = {p.name[7:]: Image.open(p).size for p in (tmp_path / "out" / "masks").iterdir()}
    assert sizes["turned.png"] == (64, 96)
    assert sizes["dot.png"] == (1, 1)


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is a signal elsewhere")
def test_new_files_are_judged_once_and_whole(run_folder: Path, tree: Path, tmp_path: Path) -> None:
    images = sorted((tree / "grid" / "test" / "good").rglob("*.png"))
    inbox, out = tmp_path / "inbox", tmp_path / "inbox" / "out"
    inbox.mkdir()
    argv = ["--mode", "predict", "--eval_ckpt", str(run_folder), "--device", "cpu", "--watch", str(inbox)]
    argv += ["--output", str(out)]

    def wait_for(count: int) -> None:
        for _ in range(600):
            if (out / "scores.csv").is_file() and len(table(out)) >= count:
                return
            time.sleep(0.1)
        raise AssertionError(f"{count} rows expected")

    program = [sys.executable, "main.py", *argv]
    process = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    (inbox / "first.png").write_bytes(images[0].read_bytes())
    wait_for(1)
    data = images[1].read_bytes()
    with (inbox / "slow.png").open("wb", buffering=0) as file:
        for part in range(8):
            file.write(data[part * len(data) // 8 : (part + 1) * len(data) // 8])
            time.sleep(0.4)
    wait_for(2)
    process.send_signal(signal.SIGINT)
    assert "2 images: " in process.communicate()[0]
    assert process.returncode == 0
    (inbox / "third.png").write_bytes(images[2].read_bytes())

    def interrupt() -> None:
        wait_for(3)
        time.sleep(2.5)
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    assert main(argv) == 0
    assert [Path(row["path"]).name for row in table(out)] == ["first.png", "slow.png", "third.png"]
    assert not any(row["error"] for row in table(out))


def test_maps_in_every_format(run_folder: Path, tree: Path, tmp_path: Path) -> None:
    image = next((tree / "bottle" / "test" / "scratch").iterdir())
    found = {}
    for kind, suffix in (("npy", "npy"), ("tiff", "tiff"), ("png16", "png")):
        assert predict(run_folder, image, "--output", tmp_path / kind, "--save-maps", kind) == 0
        path = tmp_path / kind / "maps" / f"000001_{image.stem}.{suffix}"
        found[kind] = {"npy": np.load, "tiff": tifffile.imread, "png16": lambda p: cv2.imread(str(p), -1)}[kind](path)
    np.testing.assert_array_equal(found["npy"], found["tiff"])
    assert found["png16"].dtype == np.uint16
    np.testing.assert_allclose((found["png16"].astype(float) - 32768) / 100, found["npy"], atol=0.00501)


def test_without_thresholds_there_are_scores_alone(
    run_folder: Path, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "last.pt", read_checkpoint(run_folder / "last.pt") | {"decision": None})
    image = next((tree / "bottle" / "test" / "scratch").iterdir())
    assert predict(tmp_path, image, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.count("the model has no thresholds") == 1
    (row,) = table(tmp_path / "out")
    assert float(row["score"]) == pytest.approx(load_detector(run_folder, device="cpu")(image).score)
    assert [row[name] for name in ("p_value", "threshold", "verdict", "regions")] == [""] * 4
    assert not (tmp_path / "out" / "overlays").exists()
    for words in (["--save-masks"], ["--fail-on", "defect"]):
        assert predict(tmp_path, image, *words) == 2
        assert f"{words[0]}: {tmp_path} has no thresholds for these scores" in capsys.readouterr().err


def test_large_images_are_not_in_memory_together(monkeypatch: pytest.MonkeyPatch) -> None:
    class Folder:
        """A detector as far as reading goes."""

        class config:
            class train:
                batch_size = 4

        def read(self, path: Path) -> Opened:
            side = int(path.name)
            return Opened(views={(0,): torch.zeros(3, 1, 1)}, size=(side, side), picture=np.zeros((1, 1, 3), np.uint8))

    names = [Path(str(side)) for side in (10, 10, 10, 10, 10, 6000, 10, 5000, 5000, 10)]
    batches = [[int(path.name) for path, _, _ in b] for b in opened_batches(Folder(), names)]  # type: ignore[arg-type]
    assert batches == [[10, 10, 10, 10], [10, 6000], [10, 5000, 5000], [10]]


def test_one_is_the_threshold_on_the_scale_of_all_images() -> None:
    np.testing.assert_allclose(scaled(np.array([0.0, 1.0, 2.0, 5.0]), 2.0), [0, 0.5, 1, 2.5])
    np.testing.assert_allclose(scaled(np.array([-4.0, -2.0, 1.0]), -2.0), [0, 1, 2.5])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "PATH: expected images or folders of them after --mode predict, but got none"),
        (["--watch", "no/such/place"], "--watch: no such folder: no/such/place"),
        (["no/such/place"], "PATH: no such file or folder: no/such/place"),
        (["docs", "--class-names", "bottle", "grid"], "--class-names: expected one class in --mode predict, but got 2"),
    ],
)
def test_mistakes_are_one_line(
    run_folder: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(run_folder, *words) == 2
    assert expected in capsys.readouterr().err


def test_an_evaluation_writes_every_images_score(run_folder: Path, tree: Path) -> None:
    rows = table(run_folder)
    assert len(rows) == 18
    detector = load_detector(run_folder, device="cpu")
    for row in rows:
        found, bad = detector(row["path"]), row["label"] == "1"
        assert bad == ("/good/" not in row["path"])
        assert float(row["score"]) == pytest.approx(found.score, rel=1e-2, abs=1e-2)
        assert row["verdict"] in ("good", "defect")
        mask = tree / row["class"] / "ground_truth" / Path(row["path"]).parent.name
        if bad:
            marked = np.asarray(Image.open(mask / f"{Path(row['path']).stem}_mask.png")) > 0
            assert row["hit"] == str(int(marked[found.peak.y, found.peak.x]))
        else:
            assert row["hit"] == ""
