"""Masks: what they mark, whatever the file's kind, and which ones are refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from datasets import build_datasets
from datasets.checks import check_shared
from datasets.folder import ImageFolder, Item
from datasets.masks import agree, check_levels, check_marks, load_mask, read_marks
from default import DataConfig, UsageError
from fake_data import make_mvtec, picture, save

SHARE = 3 / 16  # three squares of a quarter of the side
SQUARES = ((8, 8), (8, 40), (40, 8))
VOC = [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128), (128, 0, 128), (0, 128, 128), (128, 128, 128)]


def drawn(*values: object, ground: object = 0, channels: int = 0, kind: type = np.uint8) -> np.ndarray:
    """Three squares of these values on a ground."""
    made = np.full((64, 64, channels) if channels else (64, 64), ground, kind)
    for (y, x), value in zip(SQUARES, values, strict=True):
        made[y : y + 16, x : x + 16] = value
    return made


def palette(ids: tuple[int, ...], colours: list[tuple[int, int, int]], ground: int = 0) -> Image.Image:
    made = Image.fromarray(drawn(*ids, ground=ground), "P")
    made.putpalette([c for colour in colours for c in colour])
    return made


def rgba(*colours: tuple[int, int, int], ground: tuple[int, int, int, int], alpha: int = 255) -> Image.Image:
    return Image.fromarray(drawn(*((*c, alpha) for c in colours), ground=ground, channels=4))


def padded() -> Image.Image:
    """White on black, in a frame of transparent pixels that touches a square."""
    made = np.dstack([drawn(255, 255, 255)] * 3 + [np.full((64, 64), 255, np.uint8)])
    made[:8, :, 3] = made[:, :8, 3] = 0
    return Image.fromarray(made)


def soft() -> Image.Image:
    """Black strokes whose faint rims have rounded colours."""
    made = np.zeros((64, 64, 4), np.uint8)
    made[..., 3] = drawn(255, 255, 255)
    made[8:24, 8] = (1, 1, 1, 3)
    return Image.fromarray(made)


BLACK, RED, WHITE = (0, 0, 0), (255, 0, 0), (255, 255, 255)
CLEAR, CLEAR_WHITE = (0, 0, 0, 0), (255, 255, 255, 0)
MASKS: dict[str, Callable[[], Image.Image]] = {
    "0/255": lambda: Image.fromarray(drawn(255, 255, 255)),
    "bits": lambda: Image.fromarray(drawn(1, 1, 1) > 0),
    "numbers": lambda: Image.fromarray(drawn(1, 2, 3)),
    "numbers, a high one": lambda: Image.fromarray(drawn(1, 2, 200)),
    "greys": lambda: Image.fromarray(drawn(85, 170, 255)),
    "colours": lambda: Image.fromarray(drawn(RED, (0, 255, 0), (0, 0, 255), channels=3)),
    "faint colours": lambda: Image.fromarray(drawn((1, 0, 0), (0, 1, 0), (0, 0, 1), channels=3)),
    "VOC": lambda: palette((1, 2, 7), VOC),
    "palette of greys": lambda: palette((1, 2, 3), [(0, 0, 0), (1, 1, 1), (2, 2, 2), (255, 255, 255)]),
    "palette, black not first": lambda: palette((0, 1, 2), [*VOC[1:4], (0, 0, 0)], ground=3),
    "palette, all colours the same": lambda: palette((1, 2, 3), [(0, 0, 0)] * 4),
    "palette with a clear ground": lambda: palette((1, 2, 3), VOC[:4]),
    "16 bits": lambda: Image.fromarray(drawn(1, 2, 300, kind=np.uint16)),
    "32 bits": lambda: Image.fromarray(drawn(1, -2, 70000, kind=np.int32)),
    "floats": lambda: Image.fromarray(drawn(0.25, -1, 1e-9, kind=np.float32)),
    "black on clear": lambda: rgba(BLACK, BLACK, BLACK, ground=CLEAR),
    "black on clear white": lambda: rgba(BLACK, BLACK, BLACK, ground=CLEAR_WHITE),
    "red on clear white": lambda: rgba(RED, RED, RED, ground=CLEAR_WHITE),
    "black and red on clear": lambda: rgba(BLACK, RED, BLACK, ground=CLEAR),
    "half transparent black": lambda: rgba(BLACK, BLACK, BLACK, ground=CLEAR, alpha=100),
    "black strokes with soft rims": soft,
    "white, the shape in alpha": lambda: Image.fromarray(
        np.dstack([np.full((64, 64), 255, np.uint8), drawn(255, 255, 255)])
    ),
    "opaque": lambda: rgba(RED, WHITE, RED, ground=(0, 0, 0, 255)),
    "even overlay": lambda: rgba(RED, WHITE, RED, ground=(0, 0, 0, 128), alpha=128),
    "white on black in a clear frame": padded,
}  # fmt: skip


@pytest.mark.parametrize("case", MASKS)
def test_every_value_but_background_is_marked(tmp_path: Path, case: str) -> None:
    image = MASKS[case]()
    path = tmp_path / ("a.tif" if image.mode in ("I", "F") else "a.png")
    image.save(path, **({"transparency": 0} if case == "palette with a clear ground" else {}))
    marks = read_marks(path)
    np.testing.assert_array_equal(marks, drawn(1, 1, 1) > 0)
    check_marks(path, marks)
    for size in (32, 64, 128):
        assert float(load_mask(path, size).float().mean()) == SHARE


def test_deep_colours_and_opacity(tmp_path: Path) -> None:
    colours = drawn((1, 0, 0), (0, 300, 0), (0, 0, 65535), channels=3, kind=np.uint16)
    tifffile.imwrite(tmp_path / "rgb.tif", colours, photometric="rgb")
    strokes = np.dstack([np.zeros_like(colours), drawn(65535, 65535, 65535, kind=np.uint16)])
    tifffile.imwrite(tmp_path / "rgba.tif", strokes, photometric="rgb", extrasamples=["unassalpha"])
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_marks(path), drawn(1, 1, 1) > 0, err_msg=path.name)
    tifffile.imwrite(tmp_path / "nan.tif", drawn(1, np.nan, 1, kind=np.float32))
    with pytest.raises(UsageError, match=r"nan\.tif: holds values that are not finite"):
        read_marks(tmp_path / "nan.tif")


@pytest.mark.parametrize(("name", "options"), [("a.jpg", {"quality": 75}), ("a.webp", {"quality": 75})])
def test_what_compression_blurs_is_marked_above_half(tmp_path: Path, name: str, options: dict) -> None:
    y, x = np.mgrid[:64, :64]
    truth = ((np.hypot(y - 30, x - 33) < 17) * 255).astype(np.uint8)
    Image.fromarray(truth).convert("RGB").save(tmp_path / name, **options)
    noise = (np.asarray(Image.open(tmp_path / name).convert("L")) > 0) != (truth > 0)
    assert noise.any(), "the file is blurred"
    assert (read_marks(tmp_path / name) != (truth > 0)).mean() < 0.01
    check_levels(tmp_path / name)
    Image.fromarray(drawn(85, 170, 255)).convert("RGB").save(tmp_path / name, **options)
    with pytest.raises(UsageError, match=f"{name}: has areas darker than half of full scale"):
        check_levels(tmp_path / name)
    Image.fromarray(drawn(1, 2, 3)).convert("RGB").save(tmp_path / "b.webp", lossless=True)
    assert read_marks(tmp_path / "b.webp").mean() == SHARE


def inverted() -> np.ndarray:
    return drawn(0, 0, 0, ground=255)


def inverted_at_the_edge() -> np.ndarray:
    made = inverted()
    made[:, 30:40] = 0
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (inverted, "marks the background: 100% of its border and 81% of all pixels, as if inverted"),
        (inverted_at_the_edge, "marks the background: 92% of its border and"),
        (lambda: drawn(0, 0, 0), "marks no pixel, but its image is in a folder of defective ones"),
        (lambda: drawn(255, 255, 255, ground=255), "marks every pixel"),
    ],
)
def test_masks_that_cannot_be_right_are_refused_by_name(tmp_path: Path, make: Callable, message: str) -> None:
    root = make_mvtec(tmp_path, ("bottle",))
    path = root / "bottle" / "ground_truth" / "broken" / "001_mask.png"
    save(path, make(), "L")
    options = {"dataset": "folder", "data_path": str(root), "input_size": 32}
    with pytest.raises(UsageError) as caught:
        build_datasets(DataConfig(**options), ("bottle",))  # type: ignore[arg-type]
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "--trust-masks" in str(caught.value)
    test = build_datasets(DataConfig(**options, trust_masks=True), ("bottle",))[1]  # type: ignore[arg-type]
    marked = next(test[n].mask for n, item in enumerate(test.items) if item.mask_path == path)
    assert float(marked.float().mean()) == pytest.approx((make() > 0).mean())


def test_large_defects_are_no_inverted_masks(tmp_path: Path) -> None:
    half = np.zeros((64, 64), bool)
    half[20:] = True
    check_marks(tmp_path, half)
    corner = np.zeros((64, 64), bool)
    corner[:, :30] = True
    check_marks(tmp_path, corner)
    middle = np.zeros((64, 64), bool)
    middle[1:-1, 1:-1] = True
    check_marks(tmp_path, middle)


# --- shapes and orientation


def test_shapes_agree_up_to_rounding() -> None:
    for width, height in ((1000, 1001), (4000, 3000), (640, 479), (7, 5)):
        assert not agree((width, height), (height, width)) or width - height in (1, -1, 2)
        for scale in (0.1, 0.33, 0.5, 2.0, 3.7):
            for whole in (round, int):
                small = max(whole(width * scale), 1), max(whole(height * scale), 1)
                assert agree(small, (width, height)), (small, (width, height))
    assert not agree((1000, 1001), (1001, 1000))
    assert not agree((64, 64), (70, 64))


def phone(root: Path, tag: int = 6) -> tuple[Path, Path]:
    """A class with one defective image that lies on its side, and the paths of image and mask."""
    make_mvtec(root, ("bottle",), train=2, good=1, bad=1)
    path, mask = (root / "bottle" / p for p in ("test/broken/000.jpg", "ground_truth/broken/000_mask.png"))
    path.with_suffix(".png").unlink()
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(picture(np.random.default_rng(0))[0][:40]).save(path, exif=exif)  # 64 x 40, seen as 40 x 64
    return path, mask


def masks_of(root: Path, **options: object) -> np.ndarray:
    data = DataConfig(dataset="folder", data_path=str(root), input_size=64, **options)  # type: ignore[arg-type]
    test: ImageFolder = build_datasets(data, ("bottle",))[1]
    return np.asarray(next(test[n].mask for n, item in enumerate(test.items) if item.kind == "broken"))


def test_a_mask_follows_its_image_where_that_makes_the_shapes_agree(tmp_path: Path) -> None:
    image, mask = phone(tmp_path)
    seen = np.zeros((64, 40), np.uint8)
    seen[4:20, 6:16] = 255
    expected = np.asarray(Image.fromarray(seen).resize((64, 64), Image.Resampling.NEAREST)) > 0
    stored = Image.fromarray(seen).transpose(Image.Transpose.ROTATE_90)
    tag = Image.Exif()
    tag[0x0112] = 6
    for turn, (drawing, options) in {
        "drawn on what people see": (Image.fromarray(seen), {}),
        "drawn on what is stored": (stored, {}),
        "with a tag of its own": (stored, {"exif": tag}),
    }.items():
        drawing.save(mask, **options)
        np.testing.assert_array_equal(masks_of(tmp_path), expected, err_msg=turn)
    Image.fromarray(seen).resize((80, 128), Image.Resampling.NEAREST).save(mask)
    np.testing.assert_array_equal(masks_of(tmp_path), expected, err_msg="another resolution")
    upright = picture(np.random.default_rng(0))[0][:, :40]
    Image.fromarray(upright).save(image)
    stored.save(mask)
    with pytest.raises(UsageError) as caught:
        masks_of(tmp_path)
    assert str(caught.value).startswith(f"{mask}: 64 x 40 is another shape than the 40 x 64 of its image {image};")
    assert masks_of(tmp_path, trust_masks=True).any()


def test_a_tag_behind_the_pixels_counts(tmp_path: Path) -> None:
    """PNG files may tell their orientation at the end: only decoding tells it."""
    image, mask = phone(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.with_suffix(".png").unlink(missing_ok=True)
    late = image.with_suffix(".png")
    Image.open(image).save(late, exif=exif)
    image.unlink()
    data = late.read_bytes()
    start = data.index(b"eXIf") - 4
    size = 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    late.write_bytes(data[:start] + data[start + size : end] + data[start : start + size] + data[end:])
    seen = np.zeros((64, 40), np.uint8)
    seen[4:20, 6:16] = 255
    Image.fromarray(seen).save(mask)
    assert masks_of(tmp_path)[:, :32].sum() > 3 * masks_of(tmp_path)[:, 32:].sum()


def test_a_mask_of_the_right_height_alone_is_of_another_shape(tmp_path: Path) -> None:
    root = make_mvtec(tmp_path, ("bottle",), train=1, good=1, bad=1)
    mask = root / "bottle" / "ground_truth" / "broken" / "000_mask.png"
    for size in ((64, 32), (32, 64)):
        Image.fromarray(np.eye(*size, dtype=np.uint8) * 255).save(mask)
        with pytest.raises(
            UsageError, match=rf"000_mask\.png: {size[1]} x {size[0]} is another shape than the 64 x 64"
        ):
            masks_of(root)


def test_masks_of_one_image_are_compared_with_the_first(tmp_path: Path) -> None:
    for name, side in (("000", 8), ("001", 8), ("002", 9), ("003", 8)):
        save(tmp_path / f"{name}.png", np.eye(side, dtype=np.uint8) * 255, "L")
    with pytest.raises(UsageError, match=r"002\.png: has another size than \S+000\.png, a mask of the same image"):
        read_marks(tmp_path)


def test_one_image_with_one_mask_listed_twice_is_no_mistake(tmp_path: Path) -> None:
    once, again = (
        Item(path=Path("a.png"), mask_path=Path("m.png"), label=1, class_index=0, kind="bad", name="a")
        for _ in range(2)
    )
    check_shared([once, again])
    with pytest.raises(UsageError, match=r"m\.png: is the mask of two images, a\.png and b\.png"):
        check_shared([once, replace(again, path=Path("b.png"))])


def test_no_mask_of_the_development_images_is_refused(real_images: Path) -> None:
    paths = sorted(real_images.glob("*/ground_truth/*/*"))
    assert len(paths) > 300
    for path in paths[::4]:
        marks = read_marks(path)
        check_marks(path, marks)
        np.testing.assert_array_equal(marks, np.asarray(Image.open(path).convert("L")) > 127)
