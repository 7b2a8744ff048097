"""Metrics that single data sets ask for: sPRO against a slow reimplementation, AUROC over samples, their tables."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from datasets import build_datasets, protocols
from datasets.folder import Item
from datasets.real_iad import SampleProtocol
from datasets.saturation import LIMITS, SproProtocol
from default import DataConfig, UsageError, make_config
from fake_data import save
from fake_sets import make_autovi, make_loco
from utils.metrics import ClassResult
from utils.metrics.spro import SproAccumulator, saturation
from utils.report.gather import gather_runs, read_run, summarize_seeds
from utils.report.results import Results, write_results

NAN = float("nan")


def slow_curve(maps: list[np.ndarray], regions: list[list[tuple[np.ndarray, int]]]) -> tuple[np.ndarray, np.ndarray]:
    """Thresholds one by one, regions one by one: false-positive rate and mean sPRO of what is above each."""
    levels = sorted({float(v) for heat in maps for v in heat.ravel()}, reverse=True)
    xs, ys = [0.0], [0.0]
    for threshold in [*levels[1:], -np.inf]:
        wrong = free = 0
        overlaps = []
        for heat, own in zip(maps, regions, strict=True):
            found = heat > threshold
            outside = np.ones(heat.shape, bool)
            for mask, enough in own:
                outside &= ~mask
                overlaps.append(min((found & mask).sum() / enough, 1.0))
            wrong += (found & outside).sum()
            free += outside.sum()
        xs.append(wrong / free)
        ys.append(float(np.mean(overlaps)))
    return np.array(xs), np.array(ys)


def slow_area(x: np.ndarray, y: np.ndarray, limit: float) -> float:
    """By a fine grid, whose error is far below the tolerance of the tests: the curve is piecewise linear."""
    grid = np.linspace(0, limit, 20001)
    middles = (grid[1:] + grid[:-1]) / 2
    last = np.searchsorted(x, middles, side="right") - 1
    right = np.minimum(last + 1, len(x) - 1)
    wide = np.where(x[right] > x[last], x[right] - x[last], 1)
    return float((y[last] + (y[right] - y[last]) * (middles - x[last]) / wide).mean())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 30), st.sampled_from([0.05, 0.3, 1.0]))
def test_spro_equals_counting_at_each_threshold(seed: int, levels: int, limit: float) -> None:
    rng = np.random.default_rng(seed)
    maps = [rng.integers(0, levels, (9, 11)) / levels for _ in range(4)]
    regions: list[list[tuple[np.ndarray, int]]] = []
    for number in range(4):
        masks = [rng.random((9, 11)) < 0.2 for _ in range(number)]  # they may overlap; the first image is good
        regions.append([(mask, int(rng.integers(1, mask.sum() + 1))) for mask in masks if mask.any()])
    made = SproAccumulator()
    for heat, own in zip(maps, regions, strict=True):
        made.add(torch.from_numpy(heat), [(torch.from_numpy(mask), enough) for mask, enough in own])
    x, y = slow_curve(maps, regions)
    assert made.area(limit) == pytest.approx(slow_area(x, y, limit), abs=2e-3)
    curve = made.curve()
    np.testing.assert_allclose([curve.x[-1], curve.y[-1]], [1, 1])
    np.testing.assert_allclose(np.interp(x, curve.x, curve.y)[-1], y[-1])
    for a, b in zip(x, y, strict=True):
        assert min(np.hypot(curve.x - a, curve.y - b)) < 1e-9, "each point is one of ours"


def test_a_saturated_region_needs_no_more_pixels() -> None:
    mask = torch.zeros(10, 10, dtype=torch.bool)
    mask[:5] = True
    heat = torch.zeros(10, 10)
    heat[0, :5] = 1.0  # five of fifty pixels
    for enough, expected in ((5, 1.0), (10, 0.5), (50, 0.1)):
        made = SproAccumulator()
        made.add(heat, [(mask, enough)])
        assert made.curve().y[1] == pytest.approx(expected)
    with pytest.raises(ValueError, match="regions"):
        made.add(heat, [(torch.zeros(10, 10, dtype=torch.bool), 1)])


def test_saturations() -> None:
    assert saturation(101, 0.5, relative=True) == 50
    assert saturation(7, 1.0, relative=True) == 7
    assert saturation(7, 20, relative=False) == 7 and saturation(700, 20, relative=False) == 20
    assert saturation(1, 0.1, relative=True) == 1, "never none"


def loco(root: Path) -> tuple[list[Item], SproProtocol]:
    data = DataConfig(dataset="mvtec-loco", data_path=str(make_loco(root)), input_size=32)
    items = list(build_datasets(data, ("pushpins",))[1].items)
    made = protocols(data, ("pushpins",), items)["pushpins"]
    assert isinstance(made, SproProtocol)
    return items, made


def test_loco_measures_kinds_apart_at_the_images_own_size(tmp_path: Path) -> None:
    items, made = loco(tmp_path)
    labels, scores, logical = [], [], []
    for number, item in enumerate(items):
        mask = sum((m.float() for m, _ in made.regions_of(item)), torch.zeros(64, 64))
        # logical defects are found exactly, structural ones not at all
        heat = mask if item.kind == "logical_anomalies" else torch.zeros(64, 64)
        score = float(number % 4) + 10 * (item.kind == "logical_anomalies")
        made.add(str(item.path), item.label, score, torch.nn.functional.max_pool2d(heat[None], 1)[0])
        labels.append(item.label)
        scores.append(score)
        logical.append(item.kind != "structural_anomalies")
    found, wanted = made.results(), np.array(logical)
    assert found["AU-sPRO@0.05 logical"] == pytest.approx(1)
    assert found["AU-sPRO@0.05 structural"] == pytest.approx(0.025), "a diagonal: all pixels are alike"
    assert found["AU-sPRO@0.05"] == pytest.approx((1 + 0.025) / 2)
    assert found["I-AUROC logical"] == pytest.approx(roc_auc_score(np.array(labels)[wanted], np.array(scores)[wanted]))
    assert found["I-AUROC mean"] == pytest.approx((found["I-AUROC logical"] + found["I-AUROC structural"]) / 2)
    assert {f"AU-sPRO@{limit:g}" for limit in LIMITS} <= found.keys()


def test_loco_saturates_as_the_file_says(tmp_path: Path) -> None:
    items, made = loco(tmp_path)
    for item in items:
        for mask, enough in made.regions_of(item):
            area = int(mask.sum())
            assert enough == (min(20, area) if item.kind == "logical_anomalies" else area)
        assert len(made.regions_of(item)) == 2 * item.label


def test_loco_without_its_saturations_or_with_strange_masks(tmp_path: Path) -> None:
    items, made = loco(tmp_path)
    config = tmp_path / "pushpins" / "defects_config.json"
    rows, saturations = json.loads(config.read_text()), made.saturations
    made = SproProtocol(items, {252: saturations[252]})
    with pytest.raises(UsageError, match=r"000\.png: expected pixels of one value out of 252 .*, but got 251"):
        made.check()
    path = tmp_path / "pushpins" / "ground_truth" / "structural_anomalies" / "001" / "001.png"
    data = DataConfig(dataset="mvtec-loco", data_path=str(tmp_path), input_size=32)
    for size, value, message in ((64, 99, "got 99"), (20, 252, "has another size than")):
        save(path, np.full((size, size), value, np.uint8), "L")
        with pytest.raises(UsageError, match=rf"001\.png: .*{message}"):
            build_datasets(data, ("pushpins",))
    save(path, np.zeros((64, 64), np.uint8), "L")
    build_datasets(data, ("pushpins",))
    emptied = next(item for item in items if item.mask_path == path.parent)
    assert len(SproProtocol(items, saturations).regions_of(emptied)) == 1, "a mask that marks nothing is no region"
    config.write_text(json.dumps([{"defect_name": row["defect_name"]} for row in rows]))
    with pytest.raises(UsageError, match=r"defects_config\.json: expected a list of pixel_value"):
        build_datasets(data, ("pushpins",))
    config.unlink()
    with pytest.raises(UsageError, match=r"no such file: .*defects_config\.json"):
        build_datasets(data, ("pushpins",))


def test_autovi_has_spro_where_it_has_saturations(tmp_path: Path) -> None:
    data = DataConfig(dataset="autovi", data_path=str(make_autovi(tmp_path)), input_size=32)
    items = build_datasets(data, ("tank_screw",))[1].items
    assert protocols(data, ("tank_screw",), items) == {}
    rows = [{"defect_name": "f", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": True}]
    (tmp_path / "tank_screw" / "defects_config.json").write_text(json.dumps(rows))
    made = protocols(data, ("tank_screw",), items)["tank_screw"]
    for item in items:
        made.add(str(item.path), item.label, float(item.label), torch.rand(16, 16))
    assert set(made.results()) == {f"AU-sPRO@{limit:g}" for limit in LIMITS}


def test_a_sample_is_as_strange_as_its_strangest_view() -> None:
    rng, made = np.random.default_rng(0), SampleProtocol()
    views: dict[str, list[tuple[int, float]]] = {}
    for sample in range(12):
        bad = sample % 3 == 0
        for view in range(1, 6):
            label, score = int(bad and view > 3), float(rng.normal() + bad)
            name = f"toy_brick_{sample:04d}_{'NG_AK' if bad else 'OK'}_C{view}_2023.jpg"
            made.add(f"/data/{name}", label, score, torch.zeros(2, 2))
            views.setdefault(name.rsplit("_C", 1)[0], []).append((label, score))
    labels, scores = zip(*((max(a for a, _ in v), max(b for _, b in v)) for v in views.values()), strict=True)
    assert sum(labels) == 4 and len(labels) == 12
    assert made.results() == {"S-AUROC": pytest.approx(roc_auc_score(labels, scores))}
    alone = SampleProtocol()
    alone.add("strange.jpg", 0, 1.0, torch.zeros(2, 2))
    assert np.isnan(alone.results()["S-AUROC"])


# --- tables


def results(result: ClassResult, dataset: str, **more: object) -> Results:
    return Results(
        classes={"01234": result, "56789": result}, best_on_test=None, intervals=None, unseen=True,
        config=make_config(dataset=dataset), **more,  # type: ignore[arg-type]
    )  # fmt: skip


WITHOUT_MASKS = ClassResult(
    image_auroc=0.9, image_ap=0.8, image_f1max=0.7, pixel_auroc=NAN, pixel_ap=NAN, pixel_f1max=NAN, aupro=NAN
)


def test_without_masks_there_are_no_pixel_metrics(tmp_path: Path) -> None:
    text = write_results(tmp_path, results(WITHOUT_MASKS, "cifar10"))
    table = text.split("\n\n")[0]
    assert "I-AUROC" in table and not any(title in table for title in ("P-AUROC", "AUPRO", "mAD", "P-AP"))
    content = json.loads((tmp_path / "results.json").read_text())
    assert set(content["mean"]) == set(content["classes"]["01234"]) == {"image_auroc", "image_ap", "image_f1max"}
    assert "84.4" in text and "79.6" in text and "86.5" in text, "UniAD's"


def test_metrics_of_the_data_set_have_a_table(tmp_path: Path) -> None:
    full = ClassResult(**dict.fromkeys(ClassResult.__dataclass_fields__, 0.5))
    extra = {"01234": {"S-AUROC": 0.75}, "56789": {"S-AUROC": 0.25}}
    text = write_results(tmp_path, results(full, "real-iad", extra=extra))
    assert "S-AUROC" in text and "As the data set's paper measures" in text
    assert json.loads((tmp_path / "results.json").read_text())["extra"]["mean"] == {"S-AUROC": 0.5}
    assert "S-AUROC" in (tmp_path / "results.md").read_text()
    assert "93.9" in text, "Dinomaly's AUPRO"


def test_metrics_of_the_data_set_are_gathered_over_runs(tmp_path: Path) -> None:
    config = make_config(dataset="real-iad", work_dir=str(tmp_path), seeds=(1, 2), name="iad")
    folders = [tmp_path / f"run{seed}" for seed in (1, 2)]
    for folder, value in zip(folders, (0.5, 0.7), strict=True):
        folder.mkdir()
        extra = {"01234": {"S-AUROC": value}, "56789": {"S-AUROC": NAN}}
        write_results(folder, results(WITHOUT_MASKS, "real-iad", extra=extra))
    shown = summarize_seeds(config, folders)
    summary = tmp_path / "iad-seeds1_2"
    table = shown.split("As the data set's paper measures\n")[1]
    assert re.search(r"^01234 +60\.0 ± 14\.1$", table, re.MULTILINE)
    assert re.search(r"^56789 +-$", table, re.MULTILINE)
    found = json.loads((summary / "results.json").read_text(encoding="utf-8"))
    assert found["extra"] == {
        "classes": {"01234": {"S-AUROC": 0.6}, "56789": {"S-AUROC": None}},
        "mean": {"S-AUROC": 0.6},
    }
    shown = gather_runs(make_config(mode="table", paths=(str(folders[0]), str(summary)), work_dir=str(tmp_path)))
    table = shown.split("As the data set's paper measures\n")[1]
    assert re.search(r"^run1 +50\.0$", table, re.MULTILINE)
    assert re.search(r"^iad-seeds1_2 +60\.0 ± 14\.1$", table, re.MULTILINE)
    rows = list(csv.DictReader((tmp_path / "table" / "table.csv").open(encoding="utf-8")))
    assert [float(row["S-AUROC"]) for row in rows] == [0.5, 0.6]


@pytest.mark.parametrize(
    "extra",
    [[], {}, {"mean": {}}, {"classes": {}, "mean": []}, {"classes": {"01234": 3}, "mean": {}},
     {"classes": {}, "mean": {"S-AUROC": "0.5"}}, {"classes": {"01234": {"S-AUROC": [0.5]}}, "mean": {"S-AUROC": 0.5}}],
)  # fmt: skip
def test_metrics_of_the_wrong_type_end_in_one_line(extra: object, tmp_path: Path) -> None:
    write_results(tmp_path, results(WITHOUT_MASKS, "real-iad", extra={"01234": {"S-AUROC": 0.5}}))
    path = tmp_path / "results.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    assert read_run(tmp_path).classes["01234"]["S-AUROC"] == 0.5
    path.write_text(json.dumps(content | {"extra": extra}), encoding="utf-8")
    with pytest.raises(UsageError, match=r"PATH: \S+results\.json cannot be read as results of a run"):
        read_run(tmp_path)


@pytest.mark.parametrize("dataset", ["btad", "mpdd", "real-iad", "cifar10"])
def test_published_figures_stand_beside(dataset: str, tmp_path: Path) -> None:
    text = write_results(tmp_path, results(WITHOUT_MASKS, dataset))
    assert "UniAD" in text and "one model for all classes" in text
