"""Each field of what is read back, of every wrong type, ends in one line: checkpoints, config.json, results.json."""

from __future__ import annotations

import copy
import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from default import Config, UsageError, from_dict, make_config, to_dict
from fake_data import METHOD, TINY, make_mvtec
from main import main
from models.official import load_official
from stage import Stage, image_readings, load_decision, load_detector, load_scorer, normalization_of, settled_config
from steps import Place
from utils.report.gather import gather_runs
from utils.run.checkpoint import read_checkpoint
from utils.run.fields import check_fields
from utils.run.upgrade import FORMAT

WRONG: tuple[Any, ...] = (
    None,
    True,
    -7,
    1.5,
    float("nan"),
    10**400,
    "x",
    b"x",
    [],
    [None],
    {},
    {"x": 1},
    torch.ones(2),
)
JSON = tuple(value for value in WRONG if not isinstance(value, (bytes, torch.Tensor)))
Path_ = tuple[Any, ...]


def places(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Where something stands in nested dictionaries and lists; of long lists, and of the settings, the first two."""
    yield path
    inner = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    for key, part in inner if len(inner) < 25 else inner[:2]:
        yield from places(part, (*path, key))


def changed(value: Any, path: Path_, wrong: Any) -> Any:
    """A copy with something else at one place."""
    if not path:
        return wrong
    made = copy.copy(value)
    made[path[0]] = changed(made[path[0]], path[1:], wrong)
    return made


def fuzzed(value: Any, wrongs: tuple[Any, ...]) -> Iterator[tuple[str, Any]]:
    """Every place with every wrong value, and without it."""
    for path in places(value):
        for wrong in wrongs:
            if path:
                yield f"{path} = {wrong!r:.40}", changed(value, path, wrong)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with everything that a checkpoint may hold."""
    folder = tmp_path_factory.mktemp("run")
    root = make_mvtec(folder / "data", classes=("bottle",), train=8, good=1, bad=1)
    argv = [*TINY, *METHOD, "--dataset", "mvtec", "--data-path", str(root), "--class-names", "bottle", "--no-report"]
    more = ["--holdout", "0.5", "--memory", "4", "--image-score", "surprise", "--name", "r", "--no-compare"]
    assert main([*argv, *more, "--work-dir", str(folder), "--pictures", "0"]) == 0
    return folder / "r-seed9826"


def use(content: Any, stage: Stage) -> None:
    """Everything that reads a checkpoint's dictionary, as a program does."""
    check_fields(content, "--eval_ckpt: c.pt")
    chosen = {"mode": "test", "eval_ckpt": "c.pt", "device": "cpu"}
    settled = settled_config(content, make_config(**chosen), chosen, "c.pt")
    normalization_of(content)
    image_readings(content, settled.data.class_names)
    load_scorer(content, settled.model, stage.extractor.channels, "c.pt")
    load_decision(content, settled, "c.pt")


def test_every_field_of_a_checkpoint(run: Path) -> None:
    whole = read_checkpoint(run / "last.pt")
    chosen = {"mode": "test", "eval_ckpt": "c.pt", "device": "cpu"}
    stage = Stage(settled_config(whole, make_config(**chosen), chosen, "c.pt"))
    use(whole, stage)
    light = {k: v for k, v in whole.items() if k not in ("config", "model")}
    light["place"] = asdict(Place(dropped=[["a.png"]]))
    light["usage"] = {"cpc": torch.zeros(4)}
    light["optimizer"] = light["optimizer"] | {"state": dict(list(light["optimizer"]["state"].items())[:1])}
    light["scorer"] = light["scorer"] | {"state": dict(list(light["scorer"]["state"].items())[-3:])}
    small = {"config": {part: {} for part in whole["config"]}}
    first = next(iter(whole["model"]))
    cases = [
        *fuzzed(light, WRONG), *fuzzed(small, WRONG), *(("model", {"model": wrong}) for wrong in WRONG),
        *((first, {"model": whole["model"] | {first: wrong}}) for wrong in WRONG[:-1]),
    ]  # fmt: skip
    refused = 0
    for text, parts in cases:
        try:
            use(whole | parts, stage)
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error), text
        except Exception as error:
            raise AssertionError(f"{text}: {type(error).__name__} {error}") from error
    assert refused > 0.7 * len(cases) > 500
    for parts in ({"extractor": "x"}, {"model": {first: WRONG[-1]}}):
        with pytest.raises(UsageError):
            load_detector(whole | parts, stage, "c.pt")


def test_every_setting_of_the_wrong_type() -> None:
    plain, refused, count = json.loads(json.dumps(to_dict(Config()))), 0, 0
    for text, values in fuzzed(plain, JSON):
        count += 1
        try:
            from_dict(values)
        except UsageError as error:
            refused += 1
            assert "\n" not in str(error), text
        except Exception as error:
            raise AssertionError(f"{text}: {type(error).__name__} {error}") from error
    assert refused > 0.7 * count


def test_types_of_settings_are_named() -> None:
    for name, wrong, line in (
        ("lr", "high", "--lr: expected a number, but got 'high'"),
        ("multi_class", 1, "--multi-class: expected on or off, but got 1"),
        ("batch_size", 2.0, "--batch-size: expected a whole number, but got 2.0"),
        ("class_names", "all", "--class-names: expected text or several of them, but got 'all'"),
        ("k_cpc", True, "--k-cpc: expected a whole number, but got True"),
    ):
        with pytest.raises(UsageError) as caught:
            make_config(**{name: wrong})
        assert str(caught.value) == line
    assert make_config(lr=1).train.lr == 1


def test_every_field_of_results(run: Path, tmp_path: Path) -> None:
    whole = json.loads((run / "results.json").read_text(encoding="utf-8"))
    small = {name: whole[name] for name in ("classes", "mean")} | {
        "config": {"run": whole["config"]["run"]}, "deviation": {"mean": dict(whole["mean"])},
    }  # fmt: skip
    folder = tmp_path / "other"
    folder.mkdir()
    config = make_config(mode="table", paths=(str(run), str(folder)), work_dir=str(tmp_path))
    (folder / "results.json").write_text(json.dumps(small), encoding="utf-8")
    gather_runs(config)
    for text, values in fuzzed(small, JSON):
        (folder / "results.json").write_text(json.dumps(values), encoding="utf-8")
        try:
            gather_runs(config)
        except UsageError as error:
            assert "results.json cannot be read as results of a run" in str(error)
        except Exception as error:
            raise AssertionError(f"{text}: {type(error).__name__} {error}") from error


# --- sizes


def test_stretched_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    torch.save({"format": FORMAT, "model": {"w": torch.ones(1).expand(1 << 40)}}, path)
    with pytest.raises(UsageError, match=r"c\.pt: it holds a tensor of shape \(1099511627776,\) that is not stored"):
        read_checkpoint(path)
    torch.save({"format": FORMAT, "model": {"w": torch.empty(1 << 40, device="meta")}}, path)
    with pytest.raises(UsageError, match="not stored element by element"):
        read_checkpoint(path)
    torch.save({"format": FORMAT, "model": {"w": torch.ones(4)[1:3], "b": torch.ones(2, 3).T}}, path)
    assert read_checkpoint(path)["model"]["b"].shape == (3, 2)


def test_compressed_entries_are_refused(tmp_path: Path) -> None:
    plain, path = io.BytesIO(), tmp_path / "c.pt"
    torch.save({"format": FORMAT, "model": {"w": torch.zeros(1 << 20)}}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    with pytest.raises(UsageError, match=r"it claims to hold \d+ bytes, but the file has \d+$"):
        read_checkpoint(path)


def test_settings_that_claim_a_huge_model_take_no_memory(run: Path) -> None:
    whole = read_checkpoint(run / "last.pt")
    whole["config"]["model"] |= {"k_cspc": 1 << 20, "dim_cpc": 65536}
    chosen = {"mode": "test", "eval_ckpt": "c.pt", "device": "cpu"}
    stage = Stage(settled_config(whole, make_config(**chosen), chosen, "c.pt"))
    with pytest.raises(UsageError, match=r"c\.pt: made with other options than asked for: \S+ is \("):
        load_detector(whole, stage, "c.pt")


def test_an_official_checkpoint_that_holds_itself() -> None:
    endless: list[Any] = []
    endless.append(endless)
    content = {"parallel_flows": endless, "fusion_flow": {}}
    for part in ("semantic_encoder", "semantic_mlp", "feature_mlps", "upsamplers"):
        content[part] = endless
    with pytest.raises(UsageError, match="not a whole checkpoint of the released code"):
        load_official(content, make_config("cpu").model, (24, 40, 112, 320))


WEIGHT = torch.zeros(2, 2)
PARTS: dict[str, Any] = {part: {} for part in ("parallel_flows", "semantic_encoder", "semantic_mlp", "feature_mlps")}


@pytest.mark.parametrize(
    "wrong",
    [
        {"upsamplers": {}, "fusion_flow": {"weight": WEIGHT}},  # a name of fewer words
        {"upsamplers": {"weight": WEIGHT}, "fusion_flow": {}},
        {"upsamplers": 3, "fusion_flow": {}},
        {"upsamplers": "weights", "fusion_flow": {}},
        {"fusion_flow": {}},
    ],
    ids=["fusion", "upsamplers", "number", "text", "missing"],
)
def test_an_official_checkpoint_of_another_make(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="not a whole checkpoint of the released code"):
        load_official(PARTS | wrong, make_config("cpu").model, (24, 40, 112, 320))


# --- what a checkpoint may not say


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "hf_hub:someone/model", "local-dir:/tmp/model", "a/b"])
def test_an_extractor_from_elsewhere_has_to_be_named_by_the_user(name: str) -> None:
    content = {
        "format": FORMAT, "config": to_dict(make_config(extractor=name)), "classes": ["a"], "model": {}, "scorer": {},
        "extractor": "",
    }  # fmt: skip
    chosen = {"mode": "test", "eval_ckpt": "c.pt"}
    with pytest.raises(UsageError, match=f"--extractor: c.pt wants '{name}' from outside of timm"):
        settled_config(content, make_config(**chosen), chosen, "c.pt")
    chosen["extractor"] = name
    assert settled_config(content, make_config(**chosen), chosen, "c.pt").model.extractor == name


def test_a_checkpoint_does_not_say_what_is_written_where(run: Path) -> None:
    whole = read_checkpoint(run / "last.pt")
    whole["config"]["predict"] |= {"output": os.sep + "tmp", "save_masks": True, "watch": "x"}
    chosen = {"mode": "predict", "eval_ckpt": "c.pt"}
    assert settled_config(whole, make_config(**chosen), chosen, "c.pt").predict == Config().predict
    with pytest.raises(UsageError, match="field 'classes'"):
        check_fields(whole | {"classes": ["../elsewhere"]}, "c.pt")
