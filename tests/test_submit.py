"""--mode submit: the maps of MVTec AD 2's private test sets in the form that its server takes."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from datasets.mvtec_ad_2 import COUNTS, IN_PRIVATE
from default import UsageError
from detector import load_detector
from fake_data import METHOD, TINY
from fake_sets import make_ad_2
from main import main
from submit import ARCHIVE, Spread, as_half, images_of, lacking, pack, write_map
from utils.run.writer import write_whole

CLASSES = ["can", "vial"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ad_2(tmp_path_factory.mktemp("ad2"))


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    words = ["--dataset", "mvtec-ad-2", "--data-path", str(root), "--work-dir", str(root / "runs"), "--no-report"]
    score = ["--image-score", "surprise"]
    assert main([*TINY, *METHOD, *words, *score, "--class-names", *CLASSES]) == 0
    return next((root / "runs").glob("*/last.pt")).parent


def test_a_submission(root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mode", "submit", "--eval_ckpt", str(run), "--data-path", str(root), "--device", "cpu"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "12 images; the submission is " in said.out
    assert "not a whole submission: it lacks fabric, fruit_jelly" in said.err
    assert "can has 3 and 3 private images, the official copy 321 of each kind" in said.err
    names = {f"{c}/test_private/{i:03d}_regular" for c in CLASSES for i in range(3)}
    names |= {f"{c}/test_private_mixed/{i:03d}_mixed" for c in CLASSES for i in range(3)}
    with tarfile.open(tmp_path / "out" / "submission.tar.gz") as archive:
        files = {member.name for member in archive if member.isfile()}
    assert files == {f"anomaly_images/{n}.tiff" for n in names} | {f"anomaly_images_thresholded/{n}.png" for n in names}
    detector = load_detector(run, device="cpu")
    spread = np.concatenate(
        [detector(p).map.astype(np.float16).ravel() for p in sorted((root / "vial/validation/good").iterdir())]
    ).astype(np.float64)
    limit = spread.mean() + 3 * spread.std()
    for name, side in (("vial/test_private/001_regular", 48), ("vial/test_private_mixed/001_mixed", 64)):
        heat = tifffile.imread(tmp_path / "out" / "anomaly_images" / f"{name}.tiff")
        assert (heat.dtype, heat.shape) == (np.float16, (side, side))
        np.testing.assert_allclose(heat, detector(root / f"{name}.png").map, rtol=2e-3, atol=2e-3)
        cut = np.asarray(Image.open(tmp_path / "out" / "anomaly_images_thresholded" / f"{name}.png"))
        np.testing.assert_array_equal(cut, (heat > limit) * 255)
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert "--output: " in capsys.readouterr().err


def test_what_is_refused(root: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mode", "submit", "--eval_ckpt", str(run), "--device", "cpu", "--output", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert main([*words, "--data-path", str(tmp_path)]) == 2
    assert "can lacks images in validation/good" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="lacks images in test_private"):
        (tmp_path / "x" / "validation" / "good").mkdir(parents=True)
        Image.new("L", (9, 9)).save(tmp_path / "x" / "validation" / "good" / "a.png")
        images_of(tmp_path / "x")


def test_a_spread_is_that_of_all_pixels_together() -> None:
    rng, made = np.random.default_rng(0), Spread()
    maps = [rng.normal(1000 * n, n + 1, (7, 3 + n)) for n in range(5)]
    for heat in maps:
        made.add(heat)
    values = np.concatenate([heat.ravel() for heat in maps])
    assert made.threshold == pytest.approx(values.mean() + 3 * values.std())


def test_maps_beyond_half_precision_stay_finite(tmp_path: Path) -> None:
    write_map(tmp_path, Path("can/test_private/000_regular"), as_half(np.array([[1e9, -1e9]], np.float32)), 0.0)
    heat = tifffile.imread(tmp_path / "anomaly_images/can/test_private/000_regular.tiff")
    assert np.isfinite(heat).all() and heat[0, 0] > 0 > heat[0, 1]


def test_a_full_disk_leaves_no_half_file(tmp_path: Path) -> None:
    """Files may have no more than 10,000 bytes for a while: the system's own error."""
    resource = pytest.importorskip("resource", reason="no limit on the size of files")
    rng, name = np.random.default_rng(0), Path("can/test_private/000_regular")
    write_map(tmp_path, name, rng.normal(size=(60, 60)).astype(np.float16), 0.0)
    before, failed = resource.getrlimit(resource.RLIMIT_FSIZE), []
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        for write in (
            lambda: write_map(tmp_path, name.with_stem("001_regular"), np.zeros((90, 90), np.float16), 0.0),
            lambda: write_whole(tmp_path / ARCHIVE, lambda file: [pack(tmp_path, file) for _ in range(9)]),
        ):
            with pytest.raises(OSError) as caught:
                write()
            failed.append(caught.value.filename)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert failed == [str(tmp_path / "anomaly_images/can/test_private/001_regular.tiff"), str(tmp_path / ARCHIVE)]
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"000_regular.tiff", "000_regular.png"}


def test_a_whole_submission_lacks_nothing() -> None:
    assert lacking({name: [IN_PRIVATE[name]] * 2 for name in COUNTS}) == []
    assert lacking({name: [IN_PRIVATE[name], 1] for name in COUNTS})[0].startswith("can has 321 and 1 private images")
