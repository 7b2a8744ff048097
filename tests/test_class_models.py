"""A run with a model for each class predicts as a whole."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest

from default import UsageError
from detector import load_detector
from fake_data import METHOD, TINY, picture, png16, save
from main import main
from prediction import Prediction
from utils.run.checkpoint import read_checkpoint, write_checkpoint

TRAINED = ["--no-multi-class", "--extractor", "test_resnet", "--no-pretrained", "--image-score", "surprise"]
TRAINED += ["--holdout", "0.5", "--false-alarm-rate", "0.2", "--memory", "8", "--eval-size", "48", "--lr", "0.001"]


def bolt(rng: np.random.Generator) -> np.ndarray:
    return picture(rng)[0]


def nut(rng: np.random.Generator) -> np.ndarray:
    """Stripes, unlike a bolt."""
    return (255 - picture(rng)[0].astype(int) // 4 - 60 * (np.arange(64) // 8 % 2)[:, None, None]).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good images of two classes; those of the second have 12 bits."""
    place, rng = tmp_path_factory.mktemp("parts"), np.random.default_rng(5)
    for i in range(20):
        save(place / "bolt" / f"{i}.png", bolt(rng))
        (place / "nut").mkdir(exist_ok=True)
        png16(place / "nut" / f"{i}.png", nut(rng).astype(np.uint16) << 4, 2)
    return place


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New images of both, in a folder that is named after neither."""
    place, rng = tmp_path_factory.mktemp("new"), np.random.default_rng(6)
    for i in range(3):
        save(place / "bolt" / f"is_nut_{i}.png", nut(rng))
        save(place / "bolt" / f"is_bolt_{i}.png", bolt(rng))
    image = nut(rng)
    image[:20] = 0
    save(place / "bolt" / "broken.png", image)
    png16(place / "bolt" / "is_deep.png", nut(rng).astype(np.uint16) << 4, 2)
    return place / "bolt"


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    argv = [*TINY, *METHOD, *TRAINED, "--dataset", "folder", "--data-path", str(data), "--work-dir", str(work)]
    assert main([*argv, "--name", "two"]) == 0
    return work / "two-seed9826"


def predict(ckpt: Path, *words: str | Path) -> int:
    return main(["--mode", "predict", "--eval_ckpt", str(ckpt), "--device", "cpu", *map(str, words)])


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        return {Path(row["path"]).name: row for row in csv.DictReader(file)}


def test_the_model_that_finds_an_image_most_normal_answers(
    run: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(run, new, "--output", tmp_path) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "decision at a false-alarm rate" in line]
    assert [line.split(":")[0] for line in lines] == ["bolt", "nut"]
    rows = table(tmp_path)
    alone = {name: load_detector(run, device="cpu", class_name=name) for name in ("bolt", "nut")}
    for name, row in rows.items():
        if name == "is_deep.png":
            assert row["concept"] == "nut", "bolts have no images of 12 bits"
            continue
        found: dict[str, Prediction] = {c: detector(new / name) for c, detector in alone.items()}
        best = max(found.values(), key=lambda f: (f.p_value, -f.score / f.threshold))
        assert row["concept"] == best.class_name
        assert float(row["score"]) == pytest.approx(best.score, rel=1e-3)
        assert row["verdict"] == ("defect" if all(f.defective for f in found.values()) else "good")
        if name.startswith("is_"):
            assert row["concept"] == name.split("_")[1]
    assert rows["broken.png"]["verdict"] == "defect"


def test_a_named_class_answers_alone(run: Path, new: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = new / "is_nut_0.png"
    assert predict(run, image, "--output", tmp_path, "--class-names", "bolt") == 0
    assert [(row["concept"], row["verdict"]) for row in table(tmp_path).values()] == [("bolt", "defect")]
    assert predict(run, image, "--class-names", "screw") == 2
    assert "has no model of 'screw'; choose from all, bolt, nut" in capsys.readouterr().err


def test_models_share_their_extractor(run: Path) -> None:
    detector = load_detector(run, device="cpu")
    first, second = (member.engine for member in detector.members)
    assert first.features is second.features
    assert first.model is not second.model


def test_without_thresholds_a_class_must_be_named(run: Path, new: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    content = read_checkpoint(run / "nut" / "last.pt")
    write_checkpoint(tmp_path / "run" / "nut" / "last.pt", content | {"decision": None})
    with pytest.raises(UsageError, match=r"nut/last.pt has no thresholds .* name a class with --class-names CLASS"):
        load_detector(tmp_path / "run", device="cpu")
    assert load_detector(tmp_path / "run", device="cpu", class_name="nut")(new / "is_nut_0.png").defective is None
