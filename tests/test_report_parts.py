"""What the report is made of: its tables, escaped names, pictures, curves and thresholds."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from default import make_config, to_dict
from utils.metrics import NAN, ClassResult, Curve, evaluate_maps
from utils.report import gallery
from utils.report.charts import thinned
from utils.report.gallery import Shot, Views, drawn, f1_threshold, jpeg, levels, normal_range, outline, spread
from utils.report.images import Album, ImageResult, NormalRange, first_of_each, pick
from utils.report.page import ClassPage, Curves, Report, class_page, concept_matrix, content, write_report
from utils.report.plots import BAND, heat_overlay
from utils.report.tables import TITLES


def noise(numbers: Any) -> Views:
    rng, count, side = np.random.default_rng(numbers[0]), len(numbers), gallery.SIDE
    return Views(heat=rng.normal(size=(count, side, side)), scores=rng.normal(size=count))


def noisy(number: int) -> Shot:
    """A picture that does not compress."""
    rng, side = np.random.default_rng(number), gallery.SIDE
    heat = rng.normal(size=(side, side))
    return Shot(image=rng.integers(0, 256, (side, side, 3), dtype=np.uint8), mask=heat > 2.5, heat=heat)


def image(label: int, score: float, hit: bool | None = None, **others: Any) -> ImageResult:
    plain: dict[str, Any] = {"path": "d/0.png", "class_name": "c", "concept": None, "peak": (0.5, 0.5)}
    return ImageResult(label=label, score=score, hit=hit, peak_value=1.0, **plain | others)


def page_of_noise(share: int) -> ClassPage:
    images = {
        n: image(n % 2, float(n), hit=n % 4 == 1 if n % 2 else None, path=f"d/{n}.png", concept=n, threshold=4, high=1)
        for n in range(20)
    }
    curve = Curve(x=np.linspace(0, 1, 5), y=np.linspace(0, 1, 5))
    return class_page(
        result=ClassResult(**dict.fromkeys(ClassResult.__dataclass_fields__, 0.5)), extra={"<b>S-AUROC": 0.25},
        curves=Curves(roc=curve, pro=curve), images=images, normal=normal_range(noise, range(40), 32), show=noisy,
        share=share,
    )  # fmt: skip


def test_fifteen_classes_of_noise_stay_below_the_limit_and_names_are_escaped(tmp_path: Path) -> None:
    page, evil = page_of_noise(15), "<script>alert(1)</script>"
    report = Report(
        name=evil, classes={f"{evil}{i}": page for i in range(15)}, training={}, config=to_dict(make_config()),
        published=[("<i>other</i>", {"image_auroc": 0.987, "mad": NAN}, "at 224 px & cropped")], shared_model=True,
        shown="likelihood", unseen=True,
    )  # fmt: skip
    write_report(tmp_path / "report.html", report)
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert content.count('class="shot"') == 15 * 12
    assert 2_000_000 < len(content) < 10_000_000
    assert "<script>alert" not in content and "<i>other" not in content
    assert "&lt;i&gt;other&lt;/i&gt; 98.7" in content and "at 224 px &amp; cropped" in content
    assert "<b>S-AUROC" not in content and "&lt;b&gt;S-AUROC" in content


def test_metrics_of_the_data_set_stand_beside_the_seven(tmp_path: Path) -> None:
    """With a mean of their own, and a class that lacks one."""
    one = page_of_noise(1)
    extra = {"a": {"S-AUROC": 0.25, "AU-sPRO@0.05": 0.5}, "b": {"S-AUROC": 0.75}}
    report = Report(
        name="run", classes={name: replace(one, extra=own) for name, own in extra.items()}, training={},
        config=to_dict(make_config()), shared_model=True, shown="likelihood", unseen=True,
    )  # fmt: skip
    shown = content(report)
    assert shown["extra"] == ["S-AUROC", "AU-sPRO@0.05"]
    assert (shown["mean"]["S-AUROC"], shown["mean"]["AU-sPRO@0.05"], shown["mean"]["aupro"]) == (0.5, 0.5, 0.5)
    assert [row["lowest"] for row in shown["rows"]] == [{"S-AUROC"}, set()]
    assert [title for title, *_ in shown["headline"]] == list(TITLES.values()), "the tiles are the seven and their mean"
    write_report(tmp_path / "report.html", report)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    table = page.split('<table class="sortable">')[1].split("</tfoot>")[0]
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row)[-2:] for row in table.split("<tr>")[2:]]
    assert cells == [["25.0", "50.0"], ["75.0", "-"], ["50.0", "50.0"]]


def test_concepts_are_counted_and_many_are_cut() -> None:
    page = page_of_noise(1)
    assert concept_matrix({"a": page}) == {
        "columns": list(range(20)), "rows": [("a", [(1, 1 / 20)] * 20)], "left_out": 0,
    }  # fmt: skip
    many = replace(page, images=[replace(page.images[0], concept=k) for k in [*range(70), 69]])
    matrix = concept_matrix({"a": many})
    assert matrix is not None and matrix["left_out"] == 6 and matrix["columns"][-1] == 69
    assert concept_matrix({"a": replace(page, images=[replace(page.images[0], concept=None)])}) is None


def test_a_clean_image_stays_grey() -> None:
    """What lies below the high end of normal has no colour, whatever the image's own maximum is."""
    picture = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    normal = NormalRange(low=2.0, high=4.0, threshold=0.0, count=1)
    maps = np.linspace(0, 4, 64).reshape(8, 8)
    clean = heat_overlay(picture, normal.scaled(maps))
    assert (clean == clean[..., :1]).all()
    marked = heat_overlay(picture, normal.scaled(maps + np.eye(8) * 9))
    assert ((marked != clean).any(-1) == np.eye(8, dtype=bool)).all()
    assert (heat_overlay(picture, normal.scaled(maps + np.eye(8) * 9, 14.0)) == clean).all(), "an image's own limit"


def test_pictures_show_the_verdict_and_keep_clean_images_grey() -> None:
    grey, mask = np.full((200, 200, 3), 90, np.uint8), np.zeros((50, 50), bool)
    normal = NormalRange(low=0.0, high=1.0, threshold=2.0, count=1)
    heat = np.full((50, 50), 0.5)
    good = drawn(Shot(image=grey, mask=mask, heat=heat), image(0, 1.25).within(normal), normal)
    assert good.shape == (200 + BAND, 3 * 200 + 8, 3)
    assert (good == good[..., :1]).mean() > 0.99, "neither heat nor a red verdict"
    heat[10:15, 20:25], mask[10:15, 20:25] = 3.0, True
    found = image(1, 2.5, hit=True, peak=(0.45, 0.25)).within(normal)
    bad = drawn(Shot(image=grey, mask=mask, heat=heat), found, normal)
    coloured = (bad != bad[..., :1]).any(-1)[:200, 204:404]
    rows, columns = coloured.nonzero()
    assert rows.min() >= 36 and rows.max() < 64 and columns.min() >= 76 and columns.max() < 104
    assert (bad[200:] != bad[200:, :, :1]).any(), "the verdict of an alarm is red"
    assert found.verdict() == "alarm: score 2.500, threshold 2.000, peak in the defect"
    assert image(0, 1.25).within(normal).verdict() == "no alarm: score 1.250, threshold 2.000"
    own = image(0, 1.25, threshold=1.0, high=9.0)
    assert own.within(normal) == own and not own.defective, "an image's own limits stand"


def test_values_under_the_pointer_are_the_highest_of_their_cells() -> None:
    maps = np.zeros((130, 130))
    maps[129, 0], maps[5, 64], maps[0, 129] = 1.7, -3, 99
    read = np.frombuffer(levels(maps), np.uint8).reshape(64, 64)
    assert read[63, 0] == 85 and read[0, 63] == 255 and np.count_nonzero(read) == 2
    assert np.frombuffer(levels(np.eye(3)), np.uint8).tolist() == [50, 0, 0, 0, 50, 0, 0, 0, 50]


def test_an_album_keeps_what_pictures_and_report_want() -> None:
    rng, scores = np.random.default_rng(5), np.random.default_rng(5).normal(size=60).round(1)
    images = [image(n % 2, float(s), hit=bool(rng.integers(2)) if n % 2 else None) for n, s in enumerate(scores)]
    album = Album([7, 30])
    for number, found in enumerate(images):
        album.add(number, (found.label, found.hit), found.score, np.full((2, 2), number))
    wanted = {number for group in pick(images).values() for number in group} | {7, 30}
    assert wanted <= album.maps.keys() and len(album.maps) <= 3 * 6 + 2
    assert all((shown == number).all() for number, shown in album.maps.items())
    assert np.isfinite(album_of(np.full((2, 2), 1e9))).all()
    assert first_of_each("aabab", 2) == [0, 1, 2, 4] and first_of_each("ab", 0) == []


def album_of(shown: np.ndarray) -> np.ndarray:
    album = Album()
    album.add(0, "group", 0.0, shown)
    return album.maps[0]


def test_choosing_pictures() -> None:
    labels, scores = [0, 1, 0, 1, 1, 0, 0, 1], [0.1, 0.2, 0.9, 0.8, 0.3, 0.4, 0.5, 0.7]
    unmarked = [image(label, score) for label, score in zip(labels, scores, strict=True)]
    assert pick(unmarked) == {"alarms": [2, 6, 5], "misses": [1, 4], "finds": [3, 7], "astray": []}
    marked = [replace(found, hit=n != 3 if found.label else None) for n, found in enumerate(unmarked)]
    assert pick(marked) == {"alarms": [2, 6, 5], "misses": [1, 4], "finds": [7], "astray": [3]}
    assert pick([image(1, 0.5)]) == {"alarms": [], "misses": [], "finds": [0], "astray": []}
    assert spread(range(100), 4) == [0, 25, 50, 75] and spread([3, 5], 4) == [3, 5]


def test_f1_threshold_reaches_the_metric() -> None:
    rng = np.random.default_rng(3)
    labels, scores = rng.integers(0, 2, 60), rng.normal(size=60).round(1)
    cut = f1_threshold(scores[labels == 0].tolist(), scores[labels == 1].tolist())
    alarmed = scores >= cut
    f1 = 2 * (alarmed & (labels == 1)).sum() / (alarmed.sum() + labels.sum())
    zeros = np.zeros((60, 2, 2))
    assert f1 == pytest.approx(evaluate_maps(labels, scores, zeros, zeros).image_f1max)
    assert np.isnan(f1_threshold([1.0], []))


def test_outlines_and_thumbnails() -> None:
    mask = np.zeros((40, 40), bool)
    mask[10:20, 5:15] = True
    assert outline(mask) == "M5.5,10.5 5.5,19.5 14.5,19.5 14.5,10.5Z"
    assert outline(mask & False) == ""
    picture = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    assert len(jpeg(picture, 5000)) <= 5000 < len(jpeg(picture, 50_000)) <= 50_000


def test_thinned_curves_keep_their_shape_and_end_at_the_limit() -> None:
    x = np.linspace(0, 1, 5000) ** 3
    curve = thinned(Curve(x=x, y=np.sqrt(x)), 0.3)
    assert len(curve.x) <= 200 and curve.x[0] == 0 and curve.x[-1] == 0.3
    assert np.abs(np.interp(x[x < 0.3], curve.x, curve.y) - np.sqrt(x[x < 0.3])).max() < 0.01
