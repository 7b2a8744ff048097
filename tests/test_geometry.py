"""Images of any shape: squashed, padded, cropped, and maps laid back on them."""

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import build_datasets
from datasets.geometry import Geometry
from datasets.pixels import Pixels
from datasets.reading import PLAIN
from datasets.transforms import to_tensor
from default import DataConfig, UsageError, make_config
from fake_data import picture, save

RNG = np.random.default_rng(0)
WIDE = Image.fromarray(RNG.integers(0, 256, (60, 90, 3), dtype=np.uint8).repeat(3, 0).repeat(3, 1))  # 270 x 180


def tensor(image: Image.Image, **geometry: object) -> np.ndarray:
    """What the model sees, (S, S, 3) in 0..255."""
    found = to_tensor(Path("a.png"), Pixels(image=image), Geometry(**geometry), PLAIN)  # type: ignore[arg-type]
    return (found * 255).round().permute(1, 2, 0).numpy()


def test_squash_is_pillows_resize() -> None:
    expected = np.asarray(WIDE.resize((64, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(tensor(WIDE, input_size=64), expected)


def test_center_crop_is_resize_then_crop() -> None:
    whole = np.asarray(WIDE.resize((64, 64), Image.Resampling.LANCZOS)).astype(float)
    for side, start in ((48, 8), (49, 8), (51, 6)):  # torchvision's rounding: 7.5 -> 8, 6.5 -> 6
        found = tensor(WIDE, input_size=64, center_crop=side)
        assert found.shape == (side, side, 3)
        assert np.abs(found - whole[start : start + side, start : start + side]).max() <= 1


def test_crop_takes_the_middle_of_the_longer_side() -> None:
    whole = np.asarray(WIDE.resize((96, 64), Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(tensor(WIDE, input_size=64, resize="crop") - whole[:, 16:80]).max() <= 1
    tall = WIDE.transpose(Image.Transpose.ROTATE_90)
    whole = np.asarray(tall.resize((64, 96), Image.Resampling.LANCZOS)).astype(float)
    assert np.abs(tensor(tall, input_size=64, resize="crop") - whole[16:80]).max() <= 1


def test_pad_repeats_the_edges_of_the_shorter_side() -> None:
    whole = np.asarray(WIDE.resize((66, 44), Image.Resampling.LANCZOS)).astype(float)
    found = tensor(WIDE, input_size=66, resize="pad")
    assert np.abs(found[11:55] - whole).max() <= 1
    np.testing.assert_array_equal(found[:11], np.broadcast_to(found[11], (11, 66, 3)))
    np.testing.assert_array_equal(found[55:], np.broadcast_to(found[54], (11, 66, 3)))
    cropped = tensor(WIDE, input_size=66, resize="pad", center_crop=50)
    assert np.abs(cropped - found[8:58, 8:58]).max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (300, 7), (2, 90), (64, 64)])
@pytest.mark.parametrize("resize", ["squash", "pad", "crop"])
@pytest.mark.parametrize("crop", [None, 33])
def test_maps_and_masks_of_any_shape_fit_their_images(size: tuple[int, int], resize: str, crop: int | None) -> None:
    place = Geometry(input_size=64, resize=resize, center_crop=crop).place(size)
    side = crop or 64
    assert place.square([Image.new("L", size, 7)]).shape == (side, side, 1)
    full = place.mask(np.ones(size[::-1], bool), 24).numpy()
    assert full.any()
    assert (place.part(full)).all(), "what is padded is no part of the image, all else is"
    for maps in (24, side):
        values = RNG.random((maps, maps)).astype(np.float32)
        drawn = place.drawn(values)
        assert drawn.shape == size[::-1]
        assert drawn.max() <= values.max()
        assert drawn[place.seen(size)].size


@pytest.mark.parametrize("options", [{}, {"resize": "pad"}, {"resize": "crop"}, {"resize": "pad", "center_crop": 80}])
def test_a_spot_is_where_it_was(options: dict) -> None:
    """Of an image: drawn on it, seen by the model, and laid back on it."""
    image, (x, y) = np.zeros((300, 400), np.uint8), (232, 121)
    image[y - 6 : y + 6, x - 6 : x + 6] = 255
    place = Geometry(input_size=100, **options).place((400, 300))
    view = place.square([Image.fromarray(image)])[..., 0].astype(np.float32)
    drawn = place.drawn(view)
    rows, columns = np.nonzero(drawn > 128)
    assert abs(rows.mean() - (y - 0.5)) < 2
    assert abs(columns.mean() - (x - 0.5)) < 2
    mask = place.mask(image > 0, 50).numpy()
    small = np.asarray(Image.fromarray(view).resize((50, 50), Image.Resampling.BOX)) > 128
    assert (mask ^ small).sum() <= 8
    assert mask.any()


def test_masks_of_another_resolution_and_native_ones(tmp_path: Path) -> None:
    for i in range(2):
        save(tmp_path / "bolt/train/good" / f"{i}.png", picture(RNG)[0])
    image = np.full((60, 120, 3), 90, np.uint8)
    mask = np.zeros((30, 60), np.uint8)
    mask[10:20, 40:50] = 255  # in the image: rows 20..40, columns 80..100
    save(tmp_path / "bolt/test/bad/0.png", image)
    save(tmp_path / "bolt/ground_truth/bad/0.png", mask, "L")
    turned = Image.fromarray(image.transpose(1, 0, 2))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "bolt/test/bad/1.jpg", exif=exif)
    save(tmp_path / "bolt/ground_truth/bad/1.png", mask, "L")
    save(tmp_path / "bolt/test/good/0.png", image)
    for resize, shape, left in (("squash", (60, 120), 80), ("pad", (60, 120), 80), ("crop", (60, 60), 50)):
        data = DataConfig(dataset="folder", data_path=str(tmp_path), input_size=32, resize=resize)
        test = build_datasets(data, ("bolt",))[1]
        for number, item in enumerate(test.items):
            expected = np.zeros(shape, bool)
            if item.label:
                expected[20:40, left : left + 20] = True
            np.testing.assert_array_equal(test.marks(number), expected)
            assert test.place(number).size == (120, 60)
            assert bool(test[number].mask.any()) == bool(item.label)


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(UsageError, match="--center-crop: expected at most --input-size, which is 64, but got 65"):
        DataConfig(input_size=64, center_crop=65)
    assert make_config(input_size=64, center_crop=48).score_size == 48
    assert make_config(input_size=64, center_crop=48, eval_size="native").score_size == 48
    for value in ("natural", 4, 1.5):
        with pytest.raises(UsageError, match="--eval-size: expected "):
            make_config(eval_size=value)
    assert torch.equal(Geometry(input_size=8).place((3, 5)).mask(np.ones((5, 3), bool), 4), torch.ones(4, 4).bool())


def test_the_script_without_pytorch_lays_images_out_alike() -> None:
    pytest.importorskip("onnxruntime")
    script = runpy.run_path(str(Path(__file__).resolve().parents[1] / "deploy" / "run_onnx.py"), run_name="script")
    for resize in ("squash", "pad", "crop"):
        for crop in (None, 33, 64):
            facts = {"input_size": 64, "resize": resize, "center_crop": crop}
            for size in ((1, 1), (7, 300), (300, 7), (91, 90), (1920, 1080)):
                place = Geometry(**facts).place(size)  # type: ignore[arg-type]
                found = [script["axis"](own, size, facts) for own in size]
                assert [axis[0] for axis in found] == [place.side, place.side]
                assert [axis[n] for n in (1, 2) for axis in found] == list(place.used)
                assert [axis[n] for n in (3, 4) for axis in found] == list(place.visible(size))
