"""Transparency, orientation, frames and size of images."""

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from datasets import build_datasets
from datasets.decode import read_pixels
from datasets.pixels import read_header
from datasets.reading import Reading, decide
from datasets.transforms import to_picture
from default import DataConfig, UsageError
from fake_data import load_image, make_mvtec, picture, png16, save

# --- transparency


def clear(hidden: int, seen: tuple[int, ...] = (200, 60, 60)) -> np.ndarray:
    """A square on a transparent ground, under which another colour hides: (64, 64, 4)."""
    image = np.full((64, 64, 4), hidden, np.uint8)
    image[16:48, 16:48, :3] = seen
    image[..., 3] = 0
    image[16:48, 16:48, 3] = 255
    return image


def test_hidden_colours_never_count(tmp_path: Path) -> None:
    for hidden in (0, 128, 255):
        Image.fromarray(clear(hidden)).save(tmp_path / f"{hidden}.png")
        Image.fromarray(clear(hidden)).save(tmp_path / f"{hidden}.tif")
        png16(tmp_path / f"{hidden}-16.png", clear(hidden).astype(np.uint16) * 257, 6)
    paths = sorted(tmp_path.iterdir())
    reading = decide(paths, DataConfig())
    assert reading.background == "white", "the square is dark"
    for background, level in (("white", 1.0), ("black", 0.0)):
        own = Reading(integers=(0, 65535), background=background)
        images = [load_image(path, 64, own) for path in paths]
        for image in images:
            torch.testing.assert_close(image, images[0], atol=1e-6, rtol=0)
        assert images[0][:, 0, 0].tolist() == [level] * 3
        np.testing.assert_allclose(images[0][:, 30, 30] * 255, (200, 60, 60), atol=1e-4)


def test_the_background_is_the_one_that_does_not_hide_the_object(tmp_path: Path) -> None:
    for seen, expected in (((250, 250, 250), "black"), ((10, 10, 10), "white")):
        Image.fromarray(clear(255, seen)).save(tmp_path / "a.png")
        assert decide([tmp_path / "a.png"], DataConfig()).background == expected
    with pytest.raises(UsageError, match=r"a\.png: is transparent, but no training image .* --background"):
        load_image(tmp_path / "a.png", 32)
    opaque = clear(255)
    opaque[..., 3] = 255
    Image.fromarray(opaque).save(tmp_path / "b.png")
    assert decide([tmp_path / "b.png"], DataConfig()) == Reading()
    np.testing.assert_array_equal(to_picture(load_image(tmp_path / "b.png", 64)), opaque[..., :3])


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_opacity_has_the_depth_of_the_colours(tmp_path: Path, bits: int) -> None:
    full = 2**bits - 1
    values = (clear(0).astype(float) / 255 * full).round().astype(np.uint16)
    values[0, 0] = full  # white and opaque
    png16(tmp_path / "a.png", values, 6)
    loaded = load_image(tmp_path / "a.png", 64, Reading(integers=(0, full), background="black"))
    np.testing.assert_allclose(loaded[:, 30, 30], np.array((200, 60, 60)) / 255, atol=1e-3)
    assert loaded[:, 0, 0].tolist() == [1, 1, 1]
    assert loaded[:, 0, 1].tolist() == [0, 0, 0]


def test_an_image_that_is_transparent_everywhere_is_a_mistake(tmp_path: Path) -> None:
    image = clear(0)
    image[..., 3] = 0
    Image.fromarray(image).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"a\.png: is transparent everywhere"):
        decide([tmp_path / "a.png"], DataConfig())


def test_every_kind_of_transparency(tmp_path: Path) -> None:
    grey = Image.fromarray(clear(0, (90, 90, 90))[..., 0])
    rgb = Image.fromarray(clear(0)[..., :3])
    grey.save(tmp_path / "grey.png", transparency=0)
    rgb.save(tmp_path / "rgb.png", transparency=(0, 0, 0))
    Image.fromarray(clear(0)).convert("LA").save(tmp_path / "la.png")
    palette = rgb.quantize(4)
    palette.save(tmp_path / "p.png", transparency=int(np.asarray(palette)[0, 0]))
    palette.save(tmp_path / "p.gif", transparency=int(np.asarray(palette)[0, 0]))
    png16(tmp_path / "grey16.png", np.asarray(grey)[..., None].astype(np.uint16) * 257, 0, struct.pack(">H", 0))
    png16(tmp_path / "rgb16.png", np.asarray(rgb).astype(np.uint16) * 257, 2, struct.pack(">HHH", 0, 0, 0))
    values = clear(0).astype(np.uint16) * 257
    half = values.copy()
    half[..., 3] //= 2
    half[..., :3] //= 2
    tifffile.imwrite(tmp_path / "premultiplied.tif", half, photometric="rgb", extrasamples=["assocalpha"])
    for path in tmp_path.iterdir():
        reading = decide([path], DataConfig())
        assert reading.background == "white", path
        assert load_image(path, 64, reading)[:, 0, 0].tolist() == [1, 1, 1], path
    loaded = load_image(tmp_path / "premultiplied.tif", 64, Reading(integers=(0, 65535), background="black"))
    np.testing.assert_allclose(loaded[:, 30, 30], np.array((200, 60, 60)) / 255 / 2, atol=1e-3)


# --- orientation, frames, size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_read_as_people_see_them(tmp_path: Path, orientation: int) -> None:
    seen = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # what undoes the tag's turn
    stored = seen if back is None else np.asarray(Image.fromarray(seen).transpose(Image.Transpose(back)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(stored).save(tmp_path / "a.tif", exif=exif)
    Image.fromarray(stored[..., 0].astype(np.uint16) * 257).save(tmp_path / "deep.png", exif=exif)
    tag = [(0x0112, 3, 1, orientation, True)]
    deep = np.ascontiguousarray(stored).astype(np.uint16) * 257
    tifffile.imwrite(tmp_path / "deep.tif", deep, photometric="rgb", extratags=tag)
    for name in ("a.png", "a.tif", "deep.png", "deep.tif"):
        pixels = read_pixels(tmp_path / name)
        assert (pixels.size, pixels.orientation) == ((40, 24), orientation), name
        values = pixels.values // 257 if pixels.image is None else np.asarray(pixels.image)
        np.testing.assert_array_equal(values[..., 0], seen[..., 0], err_msg=name)


def test_damaged_tags_say_nothing_of_the_pixels(tmp_path: Path) -> None:
    image = picture(np.random.default_rng(0))[0]
    Image.fromarray(image).save(tmp_path / "a.png", exif=b"Exif\0\0nonsense")
    np.testing.assert_array_equal(to_picture(load_image(tmp_path / "a.png", 64)), image)


def test_one_image_a_file(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), v, np.uint8)) for v in (10, 20)]
    for name in ("a.gif", "a.tif", "a.webp", "a.png", "phone.mpo"):
        frames[0].convert("RGB").save(tmp_path / name, save_all=True, append_images=[frames[1].convert("RGB")])
    for name in ("a.gif", "a.tif", "a.webp", "a.png"):
        with pytest.raises(UsageError, match=rf"{name}: holds .* expected one image a file"):
            read_header(tmp_path / name)
    (tmp_path / "phone.mpo").rename(tmp_path / "phone.jpg")
    assert load_image(tmp_path / "phone.jpg", 8).mean() * 255 == pytest.approx(10, abs=1.5)
    with tifffile.TiffWriter(tmp_path / "small.tif") as file:  # with a thumbnail
        file.write(np.full((8, 8), 50, np.uint8))
        file.write(np.full((4, 4), 50, np.uint8), subfiletype=1)
    assert load_image(tmp_path / "small.tif", 8).mean() * 255 == pytest.approx(50)


def test_most_pixels(tmp_path: Path) -> None:
    save(tmp_path / "a.png", np.zeros((30, 40), np.uint8), "L")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((30, 40), np.uint16))
    for name, count, deep in (("a.png", 1200, ""), ("a.tif", 4800, " of more than 8 bits, which count 4 times,")):
        line = rf"{name}: 40 x 30 = 1200 pixels{deep} are more than --max-pixels {count - 1}"
        with pytest.raises(UsageError, match=line):
            load_image(tmp_path / name, 8, max_pixels=count - 1)
        assert load_image(tmp_path / name, 8, max_pixels=count).shape == (3, 8, 8)


def test_giants_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for size, kind, message in (
        ((13_000, 13_000), 16, "169000000 pixels of more than 8 bits, which count 4 times, are more than --max-pixels"),
        ((1, 100_000_000), 8, "1 x 100000000 pixels are more than 262144 on a side; cut it into parts"),
        ((262_145, 1), 8, "262145 x 1 pixels are more than 262144 on a side"),
    ):
        head = struct.pack(">IIBBBBB", *size, kind, 0, 0, 0, 0)
        chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
        body = b"".join(
            struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
        )  # fmt: skip
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
        with pytest.raises(UsageError, match=message):
            load_image(path, 32)
    save(path, np.full((1, 9000), 51, np.uint8), "L")
    assert load_image(path, 32).mean() == pytest.approx(0.2)


def test_a_line_scan_of_200_megapixels_has_a_way(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path, ("bottle",), train=2, good=1, bad=1)
    path = root / "bottle" / "test" / "good" / "000.png"
    Image.new("1", (20_000, 10_001), 1).save(path)
    options = {"dataset": "folder", "data_path": str(root), "input_size": 32}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UsageError, match=r"000\.png: 20000 x 10001 = 200020000 pixels .* --max-pixels 178956970"):
            build_datasets(DataConfig(**options), ("bottle",))  # type: ignore[arg-type]
        test = build_datasets(DataConfig(**options, max_pixels=201_000_000), ("bottle",))[1]  # type: ignore[arg-type]
        number = [item.path for item in test.items].index(path)
        assert test[number].image.min() == 1
