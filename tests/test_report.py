"""The report: made by the real command line, complete, small, and working in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from default import make_config, to_dict
from fake_data import METHOD, TINY, make_mvtec
from main import main
from utils.metrics import NAN, ClassResult, Curve, evaluate_maps
from utils.report import gallery
from utils.report.charts import thinned
from utils.report.gallery import Shot, Views, drawn, f1_threshold, jpeg, levels, normal_range, outline, spread
from utils.report.images import Album, ImageResult, NormalRange, first_of_each, pick
from utils.report.page import ClassPage, Curves, Report, class_page, concept_matrix, content, write_report
from utils.report.plots import BAND, heat_overlay
from utils.report.tables import TITLES

CLASSES = ("clean", "nut & bolt", "unmasked")  # the first one has no defects, the third one no masks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = make_mvtec(tmp_path_factory.mktemp("data"), CLASSES, bad=4)
    for kind in ("broken", "scratch"):
        shutil.rmtree(root / "clean" / "test" / kind)
    shutil.rmtree(root / "unmasked" / "ground_truth")
    return root


def run(data: Path, work: Path, *flags: str) -> Path:
    """A run by the command line; its folder."""
    before = set(work.iterdir()) if work.is_dir() else set()
    assert main(["--dataset", "folder", "--data-path", str(data), "--work-dir", str(work), *TINY, *flags]) == 0
    return next(p for p in set(work.iterdir()) - before if (p / "results.json").is_file())


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a multi-class run of two meta epochs."""
    return run(data, tmp_path_factory.mktemp("runs"), *METHOD, "--meta-epochs", "2")


def text(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page)


def test_report_of_a_training_is_complete(trained: Path) -> None:
    page = text(trained)
    assert sections(page) == ["results", "gallery", "scores", "curves", "codebooks", "training", "settings"]
    assert not re.search(r"""(src|href)=["'](?!data:|#)|@import|url\(|https?://(?!www\.w3\.org)""", page)
    assert "nut & bolt" not in page
    rows = re.findall(r'<tr><th scope="row" data-value="([^"]*)">.*?</tr>', page, re.DOTALL)
    assert rows == ["clean", "nut &amp; bolt", "unmasked"]
    assert page.count('class="series"') > 9 and page.count("Perplexity") >= 1
    assert "AUPRO: without a value for clean, unmasked" in page
    assert page.split('id="training"')[1].split("<figure")[0].count("<details>") == 1


def test_gallery_of_classes_without_defects_or_masks(trained: Path) -> None:
    articles = [a.split("</article>")[0] for a in text(trained).split("<article")[1:]]
    kinds = [re.findall(r'data-kind="(\w+)"', article) for article in articles]
    assert kinds[0] == ["alarms"] and kinds[2] == ["alarms", "misses", "finds"]
    assert kinds[1][:2] == ["alarms", "misses"] and {*kinds[1][2:]} <= {"finds", "astray"}
    shots = [article.count('class="shot"') for article in articles]
    assert shots[0] == 3 and shots[2] == 9 and 6 < shots[1] <= 12
    assert [article.count("<path") // 2 for article in articles] == [0, shots[1] - 3, 0]
    assert [article.count("<circle") // 2 for article in articles] == shots
    places = [re.findall(r"peak (?:in|beside) the defect", article) for article in articles]
    assert [len(found) for found in places] == [0, shots[1] - 3, 0]
    for kind in re.findall(r'data-kind="(\w+)".*?(?=data-kind|$)', articles[1], re.DOTALL):
        part = articles[1].split(f'data-kind="{kind}"')[1].split("data-kind")[0]
        assert ("peak beside" in part) <= (kind in ("misses", "astray")) and ("peak in" in part) <= (kind != "astray")


def test_headings_say_what_is_there(trained: Path) -> None:
    """Where no good image has an alarm, those with the highest scores are not called false alarms."""
    parts = text(trained).split('data-kind="')[1:]
    for part in (part.split("</article>")[0] for part in parts):
        kind, heading = part.split('"')[0], part.split("<h4>")[1].split(" <small>")[0]
        are = f">{'no alarm' if kind == 'misses' else 'alarm'}</em>" in part
        names = {"alarms": "false alarm", "misses": "miss", "finds": "find"}
        if kind in names:
            assert heading.startswith("Nearest to a") != are
            assert names[kind] in heading


def test_verdicts_are_counted_by_place_per_class(trained: Path) -> None:
    table = text(trained).split('<table class="sortable">')[1].split("</table>")[0]
    heads = re.findall(r'<button type="button">([^<]*)</button>', table)
    assert heads[:4] == ["class", "false alarms", "found", "peak in defect"]
    rows = [re.findall(r"<td[^>]*>(?:(\d+) <small>of (\d+)</small>|-)</td>", row) for row in table.split("<tr>")[2:]]
    alarms, found, placed = ([row[i] for row in rows] for i in range(3))
    assert [whole for _, whole in alarms] == ["3", "3", "3", "9"]
    assert [whole for _, whole in found] == ["", "8", "8", "16"]
    assert placed[1][1] == found[1][0] or (placed[1], found[1][0]) == (("", ""), "0")
    assert placed[0] == placed[2] == ("", ""), "no masks, no place"


def test_without_defects_and_masks_what_needs_them_is_absent(data: Path, tmp_path: Path) -> None:
    page = text(run(data, tmp_path, "--class-names", "clean"))
    assert sections(page) == ["results", "gallery", "scores", "training", "settings"]
    body = page.split("</style>")[1].split("<script>")[0]
    for word in ("AUROC", "AUPRO", "defective", "found", "peak in defect", "F1-max", "outline of", 'class="tile"'):
        assert word not in body, word
    assert "3 good test images" in body and "of 3 good alarmed" in body
    training = body.split('id="training"')[1].split("</section>")[0]
    assert "<svg" not in training and 'class="number"' in training, "one meta epoch is a number"


def test_size_for_fifteen_classes(trained: Path) -> None:
    assert (trained / "report.html").stat().st_size / len(CLASSES) * 15 < 10_000_000


def test_test_mode_has_no_training_section(trained: Path, data: Path, tmp_path: Path) -> None:
    folder = run(data, tmp_path, *METHOD, "--mode", "test", "--eval_ckpt", str(trained / "last.pt"))
    page = text(folder)
    assert sections(page) == ["results", "gallery", "scores", "curves", "codebooks", "settings"]
    scores, gallery = (re.compile(f'<section id="{name}".*?</section>', re.DOTALL) for name in ("scores", "gallery"))
    assert scores.findall(page) == scores.findall(text(trained))
    assert gallery.findall(page) == gallery.findall(text(trained))


def test_single_class_runs(data: Path, tmp_path: Path) -> None:
    """A model each, without codebooks; then all checkpoints of the run folder."""
    folder = run(data, tmp_path, "--class-names", "clean", "nut & bolt")
    page = text(folder)
    assert "a model each" in page
    assert sections(page) == ["results", "gallery", "scores", "curves", "training", "settings"]
    training = page.split('id="training"')[1].split("</section>")[0]
    assert re.findall(r"</strong> ([^<]+)</p>", training)[:2] == ["clean", "nut &amp; bolt"]
    again = text(run(data, tmp_path / "again", "--mode", "test", "--eval_ckpt", str(folder)))
    for name in ("results", "gallery", "scores"):
        mine, theirs = (p.split(f'id="{name}"')[1].split("</section>")[0] for p in (again, page))
        assert mine == theirs


def test_no_report(data: Path, tmp_path: Path) -> None:
    assert not (run(data, tmp_path, "--class-names", "clean", "--no-report") / "report.html").exists()


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
    page = page_of_noise(1)
    extra = {"a": {"S-AUROC": 0.25, "AU-sPRO@0.05": 0.5}, "b": {"S-AUROC": 0.75}}
    report = Report(
        name="run", classes={name: replace(page, extra=own) for name, own in extra.items()}, training={},
        config=to_dict(make_config()), shared_model=True, shown="likelihood", unseen=True,
    )  # fmt: skip
    shown = content(report)
    assert shown["extra"] == ["S-AUROC", "AU-sPRO@0.05"]
    assert (shown["mean"]["S-AUROC"], shown["mean"]["AU-sPRO@0.05"], shown["mean"]["aupro"]) == (0.5, 0.5, 0.5)
    assert [row["lowest"] for row in shown["rows"]] == [{"S-AUROC"}, set()]
    assert [title for title, *_ in shown["headline"]] == list(TITLES.values()), "the tiles are the seven and their mean"
    write_report(tmp_path / "report.html", report)
    table = text(tmp_path).split('<table class="sortable">')[1].split("</tfoot>")[0]
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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A headless Chromium with an empty profile."""
    found = [next((p for n in names if (p := shutil.which(n))), None) for names in (CHROMIUM, ("chromedriver",))]
    if None in found:
        pytest.skip("no Chromium with its chromedriver is installed here")
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found[1]))
    yield driver
    driver.quit()


CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "disable-dev-shm-usage",
)  # fmt: skip


def visit(browser: Any, folder: Path, *, width: int = 1400, scheme: str = "light") -> None:
    wanted = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": wanted})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((folder / "report.html").as_uri())
    browser.execute_script("localStorage.clear()")
    browser.refresh()


def ask(browser: Any, expression: str) -> Any:
    return browser.execute_script(f"return {expression}")


def test_browser_shows_every_image_without_errors(browser: Any, trained: Path) -> None:
    visit(browser, trained)
    assert browser.get_log("browser") == []
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    widths = ask(browser, "[...document.images].map(i => i.complete && i.naturalWidth)")
    assert len(widths) == 2 * text(trained).count('class="shot"') and min(widths) == 64
    charts = ask(browser, "[...document.querySelectorAll('.chart > svg')].map(s => s.getBoundingClientRect().height)")
    assert len(charts) == 2 + 3 + 10 + 5 and min(charts) > 80


def test_browser_sorts(browser: Any, trained: Path) -> None:
    visit(browser, trained)

    def click(column: int) -> list[str]:
        browser.find_elements("css selector", ".sortable thead button")[column].click()
        return ask(
            browser, f"[...document.querySelectorAll('.sortable tbody tr')].map(r => r.cells[{column}].textContent)"
        )

    assert click(0) == sorted(CLASSES) and click(0) == sorted(CLASSES, reverse=True)
    click(2)
    click(2)
    assert ask(browser, "document.querySelectorAll('.sortable th')[2].ariaSort") == "ascending"
    for _ in range(2):  # what is not there stands last in both orders
        column = click(4)
        assert column[-1] == "-" and column.count("-") == 1
    assert click(8)[1:] == ["-", "-"]
    rows = "[...document.querySelectorAll('.sortable tbody tr')]"
    browser.execute_script(f"{rows}.forEach((r, i) => {{ r.cells[4].dataset.value = [9, 100, 20][i] }})")
    click(4)
    assert ask(browser, f"{rows}.map(r => r.cells[4].dataset.value)") == ["100", "20", "9"]  # by value, not by text


def test_browser_enlarges(browser: Any, trained: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(key: str) -> str:
        ActionChains(browser).send_keys(key).perform()
        return ask(browser, "document.querySelector('#large img').src")

    visit(browser, trained)
    sources = ask(browser, "[...document.querySelectorAll('.shot img:first-child')].map(i => i.src)")[::2]
    assert not ask(browser, "document.getElementById('lightbox').open")
    browser.find_element("css selector", ".shot").click()
    assert ask(browser, "document.getElementById('lightbox').open")
    assert ask(browser, "document.querySelector('#large img').getBoundingClientRect().width") > 300
    assert ask(browser, "document.getElementById('place').textContent").startswith("clean · ")
    assert press(Keys.ARROW_RIGHT) == sources[1] and press(Keys.ARROW_LEFT) == sources[0]
    assert press(Keys.ARROW_LEFT) == sources[-1]
    assert ask(browser, "document.querySelector('#lightbox .scale').getBoundingClientRect().width") > 100
    heat = browser.find_element("css selector", "#large .heat")
    circle = "document.querySelector('#large circle')"
    x, y = ask(browser, f"[{circle}.cx.baseVal.value / 64 - 0.5, {circle}.cy.baseVal.value / 64 - 0.5]")
    size = heat.size
    ActionChains(browser).move_to_element_with_offset(heat, x * size["width"], y * size["height"]).perform()
    shown = float(ask(browser, "document.getElementById('value').textContent").removeprefix("at least ").split()[0])
    levels = "[...atob(document.querySelector('#large .heat').dataset.levels)].map(c => c.charCodeAt(0))"
    assert shown == pytest.approx(0.02 * ask(browser, f"Math.max(...{levels})"), abs=0.011), "the ring is at the peak"
    press(Keys.ESCAPE)
    assert not ask(browser, "document.getElementById('lightbox').open")
    assert browser.get_log("browser") == []


def test_browser_light_and_dark(browser: Any, trained: Path) -> None:
    def brightness() -> int:
        return int(re.findall(r"\d+", ask(browser, "getComputedStyle(document.body).backgroundColor"))[0])

    for scheme, dark in (("light", False), ("dark", True)):
        visit(browser, trained, scheme=scheme)
        assert (brightness() < 60) == dark
        browser.find_element("id", "theme").click()
        assert (brightness() < 60) != dark
        ink = ask(browser, "getComputedStyle(document.querySelector('.chart text')).fill")
        assert (int(re.findall(r"\d+", ink)[0]) > 128) != dark


@pytest.mark.parametrize("width", [390, 1400])
def test_browser_fits_the_width(browser: Any, trained: Path, width: int) -> None:
    visit(browser, trained, width=width)
    assert ask(browser, "document.documentElement.scrollWidth") <= ask(browser, "innerWidth") == width
    hint = "getComputedStyle(document.querySelector('.scroll'), '::after').content"
    assert ("scroll sideways" in ask(browser, hint)) == (width < 400)
    browser.execute_script("document.querySelector('.shot').click()")
    box = ask(browser, "document.getElementById('lightbox').getBoundingClientRect().toJSON()")
    assert box["left"] >= 0 and box["right"] <= width and box["bottom"] <= 800


def test_browser_brings_a_line_out(browser: Any, trained: Path) -> None:
    visit(browser, trained)
    browser.execute_script("document.querySelector('#curves .legend button').click()")
    opacity = (
        "[...document.querySelectorAll('#curves .series')].map(s => [s.dataset.series, getComputedStyle(s).opacity])"
    )
    assert {(n == "1", o == "1") for n, o in ask(browser, opacity)} == {(True, True), (False, False)}
