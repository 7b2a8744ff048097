"""--mode inspect: what it counts, what it calls wrong, and its status."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.data import coins

from datasets.duplicates import equal, near
from fake_data import make_mvtec, png16, save
from fake_sets import make_btad, make_cifar, make_kolektor, make_loco, make_mpdd
from main import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_mvtec(tmp_path / "data", ("bolt",))


def inspected(capsys: pytest.CaptureFixture[str], root: Path, *words: str, dataset: str = "folder") -> dict[str, Any]:
    status = main(["--mode", "inspect", "--dataset", dataset, "--data-path", str(root), "--json", *words])
    found = json.loads(capsys.readouterr().out)
    assert status == int(found["wrong"] > 0)
    return found


def only(found: dict[str, Any]) -> dict[str, Any]:
    assert len(found["classes"]) == 1
    return found["classes"][0]


def test_what_is_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("L", (50, 40), 9).save(root / "bolt" / "train" / "good" / "small.bmp")
    png16(root / "bolt" / "train" / "good" / "deep.png", np.full((64, 64, 1), 300), 0)
    facts = only(inspected(capsys, root))
    assert facts["counts"] == {"train": 8, "good": 3, "bad": 6, "held_out": 0}
    assert facts["sizes"] == {"64x64": 16, "50x40": 1}
    assert facts["modes"] == {"RGB": 15, "L": 1, "grey": 1}
    assert facts["depths"] == {"8 bits": 16, "16 bits": 1}
    assert facts["formats"] == {"PNG": 16, "BMP": 1}
    assert facts["masks"] == 6
    assert facts["defect_area"] == dict.fromkeys(("least", "median", "most"), pytest.approx(1 / 16))
    assert facts["ignored"] == {".txt": 1}
    assert facts["wrong"] == [] and facts["duplicates"] == {}


def test_what_people_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--mode", "inspect", "--dataset", "folder", "--data-path", str(root)]) == 0
    text = capsys.readouterr().out
    for line in ("bolt: train 6, good 3, bad 6", "  sizes: 64x64 (15)", "masks: 6, marked least 6.250%"):
        assert line in text
    assert text.rstrip().endswith("1 classes: nothing is wrong")
    shutil.copy(root / "bolt/test/good/000.png", root / "bolt/train/good/copy.png")
    assert main(["--mode", "inspect", "--dataset", "folder", "--data-path", str(root)]) == 1
    text = capsys.readouterr().out
    assert "  wrong: the same image in training and test: " in text and "1 things are wrong" in text


@pytest.mark.parametrize(
    ("source", "target", "part", "wrong"),
    [
        ("train/good/001.png", "train/good/copy.png", "train", []),
        ("test/good/001.png", "test/good/copy.png", "test", []),
        ("train/good/001.png", "test/good/copy.png", "across", ["the same image in training and test"]),
        ("test/scratch/001.png", "test/good/copy.png", "test", ["the same image as good and defective"]),
    ],
)
def test_equal_files(
    source: str, target: str, part: str, wrong: list[str], root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(root / "bolt" / source, root / "bolt" / target)
    facts = only(inspected(capsys, root))
    pair = sorted(str(root / "bolt" / name) for name in (source, target))
    assert {p: [sorted(g) for g in groups] for p, groups in facts["duplicates"].items()} == {part: [pair]}
    assert [line.partition(":")[0] for line in facts["wrong"]] == wrong


def test_files_that_cannot_be_read(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (root / "bolt/train/good/000.png").read_bytes()
    (root / "bolt/train/good/000.png").write_bytes(whole[: len(whole) // 2])
    (root / "bolt/test/good/000.png").write_text("no image")
    facts = only(inspected(capsys, root))
    assert len(facts["unreadable"]) == 2 and facts["wrong"] == facts["unreadable"]
    assert "train/good/000.png: cannot be read as an image" in facts["unreadable"][0]


def test_masks_that_cannot_be_right(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(root / "bolt/ground_truth/broken/000_mask.png", np.zeros((64, 64), np.uint8), "L")
    save(root / "bolt/ground_truth/broken/001_mask.png", np.full((30, 64), 255, np.uint8), "L")
    facts = only(inspected(capsys, root))
    assert ["000_mask" in facts["wrong"][0], "001_mask" in facts["wrong"][1], len(facts["wrong"])] == [True, True, 2]
    (root / "bolt/ground_truth/broken/002_mask.png").unlink()
    assert "no mask at" in only(inspected(capsys, root))["wrong"][0]


def test_official_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, make_mpdd(tmp_path), "--class-names", "tubes", "metal_plate", dataset="mpdd")
    plate, tubes = found["classes"]
    assert (found["licence"], "ICUMT 2021" in found["citation"]) == ("CC BY-NC-SA 4.0", True)
    assert tubes["official"] == {"train": 122, "good": 32, "bad": 69, "held_out": 0}
    assert tubes["wrong"] == [
        "3 training images, but the official copy has 122 (-119)",
        "3 good test images, but the official copy has 32 (-29)",
        "3 defective test images, but the official copy has 69 (-66)",
    ]
    assert plate["wrong"][0].startswith("--data-path: no folder of the class 'metal_plate'")


def test_official_counts_of_all_classes_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, make_kolektor(tmp_path), dataset="kolektorsdd")
    assert found["wrong"] == 3 and all(not facts["wrong"] for facts in found["classes"])
    assert found["total"][2] == "6 defective test images, but the official copy has 52 (-46)"
    assert inspected(capsys, tmp_path, "--class-names", "fold1", dataset="kolektorsdd")["wrong"] == 0
    main(["--mode", "inspect", "--dataset", "kolektorsdd", "--data-path", str(tmp_path)])
    assert "wrong: all classes together: 36 training images, but" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "dataset", "name"), [(make_btad, "btad", "02"), (make_loco, "mvtec-loco", "pushpins")]
)
def test_masks_of_known_sets_need_only_the_size_of_their_image(
    make: Any, dataset: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path)
    facts = only(inspected(capsys, tmp_path, "--class-names", name, dataset=dataset))
    assert all("official copy" in line for line in facts["wrong"])
    path = next(p for p in sorted(tmp_path.rglob(f"{name}/ground_truth/**/*.png")))
    save(path, np.full((20, 20), 255, np.uint8), "L")
    if path.with_name("001.png").exists():
        save(path.with_name("001.png"), np.full((20, 20), 255, np.uint8), "L")
    facts = only(inspected(capsys, tmp_path, "--class-names", name, dataset=dataset))
    assert [line for line in facts["wrong"] if "has another size than its image" in line]


def test_sets_without_folders_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, make_cifar(tmp_path), "--multi-class", dataset="cifar10")
    assert [facts["sizes"] for facts in found["classes"]] == [{"32x32": 70}] * 4
    assert all(facts["masks"] == 0 and facts["defect_area"] is None for facts in found["classes"])


def test_a_flag_that_does_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--dry-run"]) == 2
    assert "--json: does nothing without --mode inspect" in capsys.readouterr().err


# --- near-duplicates


def test_near_duplicates(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imagehash")
    image = Image.fromarray(coins())
    image.save(root / "bolt/train/good/002.png")
    image.save(root / "bolt/test/good/again.jpg", quality=75)  # other bytes, the same picture
    facts = only(inspected(capsys, root))
    pair = [str(root / "bolt/train/good/002.png"), str(root / "bolt/test/good/again.jpg")]
    assert facts["near_duplicates"] == {"across": [pair]}
    assert facts["duplicates"] == {} and facts["wrong"] == [], "they look alike, which may be right"


def test_without_the_package_a_line_says_so(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "imagehash", None)
    assert main(["--mode", "inspect", "--dataset", "folder", "--data-path", str(root)]) == 0
    assert "near-duplicates: not looked for, that needs the package imagehash" in capsys.readouterr().out
    found = inspected(capsys, root)
    assert found["near_duplicates_looked_for"] is False and only(found)["near_duplicates"] is None


def test_groups_of_hashes_are_those_of_a_double_loop() -> None:
    rng = np.random.default_rng(0)
    seeds = [int(v) for v in rng.integers(0, 2**63, 30)]
    hashes = [seed ^ (1 << int(rng.integers(64))) ^ (1 << int(rng.integers(64))) for seed in seeds for _ in range(3)]
    slow = {n: {n} for n in range(len(hashes))}
    for a in range(len(hashes)):
        for b in range(len(hashes)):
            if (hashes[a] ^ hashes[b]).bit_count() <= 2:
                joined = slow[a] | slow[b]
                for n in joined:
                    slow[n] = joined
    expected = {tuple(sorted(group)) for group in slow.values() if len(group) > 1}
    assert {tuple(group) for group in near(hashes)} == expected and expected
    assert near([]) == [] and equal(["a", "b", "a"]) == [[0, 2]]
