"""Depth and range of images, kept with the model."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from datasets import build_datasets
from datasets.cache import cache_key
from datasets.decode import read_pixels
from datasets.pixels import read_header
from datasets.reading import RELEASED, Reading, check_flags, decide, float_span, integer_span
from datasets.transforms import to_picture
from default import DataConfig, UsageError, make_config
from fake_data import load_image, make_mvtec, picture, png16, save

SIDE = 48
DEEP = np.random.default_rng(0).integers(0, 65536, (SIDE, SIDE, 4)).astype(np.uint16)
DEEP[0, 0] = 65535  # the full range is used
SIXTEEN = Reading(integers=(0, 65535))


def pixmap(path: Path, values: np.ndarray, kind: str, most: int) -> None:
    """A portable map of 16 bits, plain (P2, P3) or binary (P5, P6)."""
    head = f"{kind}\n# made by hand\n{values.shape[1]} {values.shape[0]}\n{most}\n".encode()
    plain = " ".join(map(str, values.ravel())).encode() + b"\n"
    path.write_bytes(head + (plain if kind in ("P2", "P3") else values.astype(">u2").tobytes()))


def deep_files(root: Path) -> dict[str, np.ndarray]:
    """Files of more than 8 bits by name, with their numbers (S, S, 1 or 3)."""
    grey, rgb = DEEP[..., :1], DEEP[..., :3]
    Image.fromarray(grey[..., 0]).save(root / "grey.png")
    Image.fromarray(grey[..., 0]).save(root / "grey.jp2", irreversible=False)
    png16(root / "rgb.png", rgb, 2)
    png16(root / "rgba.png", np.dstack([rgb, np.full_like(grey, 65535)]), 6)
    png16(root / "la.png", np.dstack([grey, np.full_like(grey, 65535)]), 4)
    assert cv2.imwrite(str(root / "rgb.jp2"), rgb[..., ::-1], [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    assert cv2.imwrite(str(root / "lzw.tif"), rgb[..., ::-1])
    tifffile.imwrite(root / "big.tif", grey[..., 0], byteorder=">")
    tifffile.imwrite(root / "rgb.tif", rgb, photometric="rgb")
    tifffile.imwrite(root / "zip.tif", rgb, photometric="rgb", compression="zlib", byteorder=">")
    tifffile.imwrite(root / "planes.tif", np.moveaxis(rgb, 2, 0), photometric="rgb", planarconfig="separate")
    tifffile.imwrite(root / "rgbx.tif", DEEP, photometric="rgb", extrasamples=["unspecified"])
    opaque = np.dstack([grey, np.full_like(grey, 65535)])
    tifffile.imwrite(root / "la.tif", opaque, photometric="minisblack", extrasamples=["unassalpha"])
    tifffile.imwrite(root / "uint32.tif", grey[..., 0].astype(np.uint32), byteorder=">")
    tifffile.imwrite(root / "int32.tif", grey[..., 0].astype(np.int32))
    for kind in ("P2", "P5"):
        pixmap(root / f"{kind}.pgm", grey, kind, 65535)
    for kind in ("P3", "P6"):
        pixmap(root / f"{kind}.ppm", rgb, kind, 65535)
    return {
        p.name: grey if p.stem in ("grey", "la", "big", "uint32", "int32", "P2", "P5") else rgb for p in root.iterdir()
    }


def test_every_kind_of_deep_file_keeps_its_precision(tmp_path: Path) -> None:
    for name, values in deep_files(tmp_path).items():
        assert read_header(tmp_path / name).deep, name
        assert decide([tmp_path / name], DataConfig()).integers == (0, 65535), name
        loaded = load_image(tmp_path / name, SIDE, SIXTEEN)
        expected = np.broadcast_to(values / 65535, (SIDE, SIDE, 3))
        tolerance = 2e-4 if name == "rgb.jp2" else 1e-7
        np.testing.assert_allclose(loaded.permute(1, 2, 0), expected, atol=tolerance, err_msg=name)
        assert len(loaded[0].unique()) > 2000, name


def test_portable_maps_are_read_by_their_numbers(tmp_path: Path) -> None:
    """So that a class may mix them with other files of the same camera."""
    values = DEEP[..., :3] >> 4
    for kind in ("P2", "P3", "P5", "P6"):
        own = values[..., :1] if kind in ("P2", "P5") else values
        pixmap(tmp_path / "a.ppm", own, kind, 4095)
        np.testing.assert_array_equal(read_pixels(tmp_path / "a.ppm").values, own)
        assert decide([tmp_path / "a.ppm"], DataConfig()).integers == (0, 4095)
    (tmp_path / "a.ppm").write_bytes((tmp_path / "a.ppm").read_bytes()[:-2])
    with pytest.raises(UsageError, match=r"a\.ppm: cannot be read as an image"):
        read_pixels(tmp_path / "a.ppm")


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16, 20, 24, 32])
def test_depth_is_the_least_that_holds_the_training_images(tmp_path: Path, bits: int) -> None:
    grey = np.asarray(Image.fromarray(picture(np.random.default_rng(0))[0]).convert("L"))
    full = 2.0**bits - 1
    values = (grey / grey.max() * full).round().astype(np.uint16 if bits <= 16 else np.uint32)
    tifffile.imwrite(tmp_path / "a.tif", values)
    tifffile.imwrite(tmp_path / "dark.tif", values // 2)
    reading = decide([tmp_path / "dark.tif", tmp_path / "a.tif"], DataConfig())
    assert reading.integers == (0, full)
    loaded = load_image(tmp_path / "a.tif", 64, reading)
    np.testing.assert_allclose(loaded[0], values / full, atol=1e-7)
    assert f"{bits}-bit" in str(reading)


def test_the_same_picture_reads_the_same_at_every_depth(tmp_path: Path) -> None:
    grey = np.asarray(Image.fromarray(picture(np.random.default_rng(0))[0]).convert("L"))
    save(tmp_path / "plain.png", grey, "L")
    expected = load_image(tmp_path / "plain.png", 32)
    for name, values in {
        "16": grey.astype(np.uint16) * 257,
        "32": grey.astype(np.int32),
        "8 in 16": grey.astype(np.uint16),
    }.items():
        Image.fromarray(values).save(tmp_path / "deep.tif")
        reading = decide([tmp_path / "deep.tif"], DataConfig(bit_depth=16 if name == "16" else None))
        assert (load_image(tmp_path / "deep.tif", 32, reading) - expected).abs().max() <= 1.001 / 255, name


def test_white_is_zero(tmp_path: Path) -> None:
    values = DEEP[..., 0]
    for shift in (0, 4):
        for order in "<>":
            stored = values >> shift
            tifffile.imwrite(tmp_path / "w.tif", stored, photometric="miniswhite", byteorder=order)
            reading = decide([tmp_path / "w.tif"], DataConfig())
            expected = 1 - stored / (65535 >> shift)
            np.testing.assert_allclose(load_image(tmp_path / "w.tif", SIDE, reading)[0], expected, atol=1e-6)
    tifffile.imwrite(tmp_path / "w.tif", (values >> 8).astype(np.uint8), photometric="miniswhite")
    np.testing.assert_allclose(load_image(tmp_path / "w.tif", SIDE)[0], 1 - (values >> 8) / 255, atol=1e-6)


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
def test_floating_point(tmp_path: Path, kind: type, channels: int) -> None:
    values = np.random.default_rng(0).random((SIDE, SIDE, channels)).astype(kind)
    tifffile.imwrite(tmp_path / "f.tif", values[..., 0] if channels == 1 else values)
    reading = decide([tmp_path / "f.tif"], DataConfig())
    assert reading.floats == (0, 1)
    loaded = load_image(tmp_path / "f.tif", SIDE, reading).permute(1, 2, 0)
    np.testing.assert_allclose(loaded, np.broadcast_to(values, (SIDE, SIDE, 3)).astype(float), atol=1e-7)


def test_ranges_of_floating_point_images() -> None:
    assert float_span(0.0, 0.9) == (0, 1)
    assert float_span(-0.5, 1.0) == (-1, 1)
    assert float_span(0.0, 254.0) == (0, 255)
    assert float_span(3.0, 60000.0) == (0, 65535)
    assert float_span(1.0, 1.5) == (0.875, 1.625), "0 to 255 would leave two levels of it"
    assert float_span(0.0, 1e-3)[1] < 2e-3
    assert float_span(-300.0, 900.0) == (-600, 1200)
    low, high = float_span(5e5, 5e5)
    assert low < 5e5 < high


def test_signed_integers() -> None:
    assert integer_span([0, -5], [900, 20]) == (-2048, 2047)
    assert integer_span([-32768], [32767]) == (-32768, 32767)
    with pytest.raises(UsageError, match="more than 32 bits"):
        integer_span([0], [2.0**40])


def test_values_beyond_the_range_are_named(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 5000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"a\.png: the value 5000 is beyond 0 to 4095, .* --bit-depth"):
        load_image(tmp_path / "a.png", 8, Reading(integers=(0, 4095)))
    with pytest.raises(UsageError, match=r"a\.png: the value 5000 is beyond 0 to 255, .* --bit-depth"):
        load_image(tmp_path / "a.png", 8)
    for value, message in (
        (2.0, "the value 2 is beyond 0 to 1, .* --float-range"),
        (np.nan, "not finite"),
        (np.inf, "not finite"),
    ):
        tifffile.imwrite(tmp_path / "f.tif", np.array([[0.0, value]], np.float32))
        with pytest.raises(UsageError, match=rf"f\.tif: .*{message}"):
            load_image(tmp_path / "f.tif", 8, Reading(floats=(0, 1)))
    with pytest.raises(UsageError, match=r"f\.tif: .*not finite"):
        decide([tmp_path / "f.tif"], DataConfig())
    tifffile.imwrite(tmp_path / "f.tif", np.zeros((4, 4), np.float32))
    with pytest.raises(UsageError, match=r"f\.tif: has floating-point pixels, but no training image .* --float-range"):
        load_image(tmp_path / "f.tif", 8)


def test_fewer_bits_than_8_are_not_deep(tmp_path: Path) -> None:
    Image.fromarray(np.eye(8) > 0).save(tmp_path / "a.tif")
    assert not read_header(tmp_path / "a.tif").deep
    np.testing.assert_array_equal(load_image(tmp_path / "a.tif", 8)[0], np.eye(8))


@pytest.mark.parametrize("kind", ["png", "jp2"])
def test_deep_files_that_end_early_are_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 65536, (64, 48, 3), dtype=np.uint16))
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UsageError, match=rf"a\.{kind}: cannot be read .* \(OpenCV does not decode its 16 bits"):
        read_pixels(path)


def test_kinds_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    Image.new("LAB", (8, 8)).save(tmp_path / "lab.tif")
    with pytest.raises(UsageError, match=r"lab\.tif: expected grey, RGB, CMYK or a palette, but got LAB"):
        load_image(tmp_path / "lab.tif", 8)
    tifffile.imwrite(tmp_path / "a.tif", DEEP, photometric="separated")
    with pytest.raises(UsageError, match=r"a\.tif: expected grey or RGB, but got 4 channels"):
        read_pixels(tmp_path / "a.tif")
    tifffile.imwrite(
        tmp_path / "a.tif", np.zeros((5, 8, 8), np.uint16), photometric="minisblack", planarconfig="separate"
    )
    with pytest.raises(UsageError, match=r"a\.tif"):
        read_pixels(tmp_path / "a.tif")


# --- flags, checkpoints and caches


def test_flags_have_the_last_word(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save(tmp_path / "a.png")
    data = DataConfig(bit_depth=16, float_range=(-2.0, 3.0), background="black")
    made = decide([tmp_path / "a.png"], data)
    assert made == Reading(integers=(0, 65535), floats=(-2.0, 3.0), background="black")
    check_flags("brick", made, data)
    for flag, options in (
        ("--bit-depth", {"bit_depth": 12}),
        ("--float-range", {"float_range": (0.0, 1.0)}),
        ("--background", {"background": "white"}),
    ):
        with pytest.raises(UsageError, match=f"{flag}: the model reads images of brick otherwise"):
            check_flags("brick", made, DataConfig(**options))  # type: ignore[arg-type]
    for span in ((1.0,), (1.0, 1.0), (2.0, 1.0)):
        with pytest.raises(UsageError, match="--float-range: expected black and a higher white"):
            make_config(float_range=span)


def test_readings_survive_a_checkpoint() -> None:
    for reading in (Reading(), RELEASED, Reading(integers=(0.0, 1023.0), floats=(-1.5, 2.0), background="white")):
        assert Reading.from_plain(reading.plain()) == reading
    assert str(Reading()) == ""


def test_checkpoints_of_version_1_read_as_it_did(tmp_path: Path) -> None:
    Image.fromarray(DEEP[..., 0]).save(tmp_path / "g.png")
    old = (DEEP[..., 0].astype(np.float64) / 257).round().astype(np.uint8)
    np.testing.assert_array_equal(to_picture(load_image(tmp_path / "g.png", SIDE, RELEASED))[..., 0], old)
    rgba = (DEEP >> 8).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(to_picture(load_image(tmp_path / "a.png", SIDE, RELEASED)), rgba[..., :3])
    png16(tmp_path / "c.png", DEEP[..., :3], 2)
    np.testing.assert_array_equal(to_picture(load_image(tmp_path / "c.png", SIDE, RELEASED)), DEEP[..., :3] >> 8)


def make_deep(root: Path, scale: int) -> Path:
    """A class of fake images stored in 16 bits."""
    make_mvtec(root, ("bottle",), train=3, good=1, bad=1)
    for part in ("train", "test"):
        for path in (root / "bottle" / part).rglob("*.png"):
            grey = np.asarray(Image.open(path).convert("L")).astype(np.uint16)
            Image.fromarray(grey * scale).save(path)
    return root


def test_a_class_is_read_as_its_training_images_say(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = make_deep(tmp_path, 16)
    data = DataConfig(dataset="folder", data_path=str(root), input_size=32)
    train, test = build_datasets(data, ("bottle",))
    assert train.readings == test.readings == (Reading(integers=(0, 4095)),)
    assert "bottle: integers beyond 8 bits as 12-bit ones (0 to 4095)" in capsys.readouterr().out
    assert train[0].image.max() > 0.5
    other = build_datasets(DataConfig(dataset="folder", data_path=str(root), input_size=32, bit_depth=16), ("bottle",))[
        0
    ]
    assert other[0].image.max() < 0.07
    assert cache_key(other) != cache_key(train)
    kept = build_datasets(data, ("bottle",), readings={"bottle": SIXTEEN})[0]
    assert kept.readings == (SIXTEEN,)
    hot = root / "bottle" / "test" / "good" / "000.png"
    Image.fromarray(np.full((8, 8), 4096, np.uint16)).save(hot)
    with pytest.raises(UsageError, match=r"good.000\.png: the value 4096 is beyond 0 to 4095"):
        build_datasets(data, ("bottle",))
