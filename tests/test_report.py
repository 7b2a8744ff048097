"""The report: made by the real command line, complete, small, and working in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fake_data import METHOD, TINY, make_mvtec
from main import main

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
