"""What a setting is part of (`binds`), and who keeps to it: checkpoints, resumed runs, tables."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from test_cli import OTHER

from default import PARTS, PRESETS, Bind, Config, UsageError, flag_of, flat, make_config, settings_of, shown, to_dict
from main import parse
from stage import FORMAT, settled_config
from utils.report.gather import Run
from utils.run.checkpoint import write_checkpoint
from utils.run.folders import new_run, resumed_run

NAMES = [entry.name for kind in PARTS.values() for entry in fields(kind)]  # type: ignore[arg-type]
SAVED: dict[str, Any] = {
    "dataset": "mvtec", "class_names": ("bottle", "grid"), "multi_class": True, "quantize_enable": True,
    "holdout": 0.2, "name": "theirs",
}  # fmt: skip
FIXED = {
    "dataset",
    "class_names",
    "multi_class",
    "input_size",
    "limit",
    "holdout",
    "resize",
    "center_crop",
    "tile",
    "extractor",
    "pool_type",
    "k_cpc",
}
FREE_IN_TEST = {
    "data_path", "workers", "cache", "device", "work_dir", "name", "bootstrap", "compare", "pictures", "report",
    "batch_size", "amp_enable", "image_score", "pixel_score", "pro_score", "top_k", "eval_size", "weights", "seed",
    "false_alarm_rate",
}  # fmt: skip
FREE_IN_RESUME = {
    "data_path", "workers", "cache", "device", "meta_epochs", "compile", "deterministic", "pictures", "report",
    "weights",
}  # fmt: skip


def other(name: str) -> Any:
    """A value that neither the default nor SAVED has."""
    value = {"multi_class": False, "quantize_enable": False}.get(name, OTHER[name][1])
    return tuple(value) if isinstance(value, list) else value


def content(**more: Any) -> dict[str, Any]:
    """A checkpoint, as far as its settings go."""
    config = to_dict(make_config(**SAVED | more))
    return {
        "format": FORMAT,
        "config": config,
        "classes": ["bottle", "grid"],
        "extractor": "",
        "model": {},
        "scorer": {},
    }


def settled(saved: dict[str, Any] | None = None, **asked: Any) -> Config:
    """The settings of a test of that checkpoint, where the user typed what is `asked`."""
    chosen = {"mode": "test", "eval_ckpt": "c.pt"} | asked
    return settled_config(saved or content(), make_config(**chosen), chosen, "c.pt")


# --- the table itself


def test_every_setting_says_what_it_is_part_of() -> None:
    assert len(NAMES) == len(set(NAMES))
    assert sorted(settings_of(*get_args(Bind))) == sorted(NAMES)
    assert set(settings_of("model", "data")) >= FIXED
    assert not FREE_IN_TEST & set(settings_of("model", "data"))
    assert not FREE_IN_RESUME & set(settings_of("model", "data", "run"))
    assert {"lr", "batch_size", "seed", "image_score", "top_k", "eval_size"} <= set(settings_of("run"))


# --- test and export


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("mode", "paths", "seeds", "class_names", "eval_ckpt")])
def test_a_checkpoint_fixes_what_is_part_of_its_model_and_data(name: str) -> None:
    asked, has = other(name), flat(content()["config"])[name]
    assert asked != has
    assert settled(**{name: has}) == settled() or name not in settings_of("model", "data")
    if name not in settings_of("model", "data"):
        assert flat(to_dict(settled(**{name: asked})))[name] == asked
        return
    with pytest.raises(UsageError) as caught:
        settled(**{name: asked})
    assert str(caught.value).startswith(f"{flag_of(name)}: c.pt was made with {shown(has)}, not with {shown(asked)} ")


def test_another_tree_of_the_same_classes_is_no_other_data() -> None:
    assert settled(data_path="elsewhere").data.data_path == "elsewhere"
    found = settled(content(dataset="sample"), dataset="folder", data_path="elsewhere").data
    assert (found.dataset, found.class_names) == ("folder", ("bottle", "grid"))
    with pytest.raises(UsageError, match=r"--dataset: c\.pt was made with folder, not with visa as asked for"):
        settled(content(dataset="folder"), dataset="visa")


def test_the_classes_are_those_of_the_checkpoint() -> None:
    assert settled(class_names=("all",)).data.class_names == ("bottle", "grid")
    assert settled(class_names=("grid",)).data.class_names == ("grid",)
    assert settled(class_names=("grid", "bottle")).data.class_names == ("bottle", "grid")
    with pytest.raises(UsageError, match=r"--class-names: c\.pt is no model of 'wood'; choose from all, bottle, grid"):
        settled(class_names=("grid", "wood"))


def test_where_to_compute_is_not_the_checkpoints_matter() -> None:
    saved = content(device="mps", work_dir="theirs", workers=7, compile=True, pre_extract=True, resume=True)
    found = settled(saved)
    assert (found.run.device, found.run.work_dir, found.data.workers) == ("auto", "work_dirs", None)
    assert not (found.train.compile or found.data.pre_extract or found.train.resume)


def test_of_a_preset_a_checkpoint_heeds_only_what_it_does_not_fix() -> None:
    words = ["--preset", "cpu", "--mode", "test", "--eval_ckpt", "c.pt", "--k-cspc", "512"]
    config, chosen, _ = parse(words)
    assert config.model.k_cpc == PRESETS["cpu"]["k_cpc"], "for checkpoints that bring no settings"
    assert {"k_cspc", "top_k", "image_score"} <= chosen.keys()
    assert {"k_cspc"} == chosen.keys() & set(settings_of("model", "data"))
    found = settled_config(content(), config, chosen, "c.pt")
    assert (found.model.k_cpc, found.data.input_size, found.eval.top_k) == (32, 384, PRESETS["cpu"]["top_k"])
    with pytest.raises(UsageError, match=r"--k-cspc: c\.pt was made with 512, not with 128"):
        config, chosen, _ = parse([*words, "--k-cspc", "128"])
        settled_config(content(), config, chosen, "c.pt")
    assert parse(["--preset", "cpu"])[1] == PRESETS["cpu"]


# --- resume and tables


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("paths", "mode", "eval_ckpt")])
def test_a_resumed_run_keeps_what_its_results_are_made_of(name: str, tmp_path: Path) -> None:
    saved = SAVED | {"work_dir": str(tmp_path)} | ({"semantics": "pooled"} if name == "context" else {})
    folder = new_run(make_config(**saved))
    if name == "work_dir":
        assert resumed_run(make_config(**saved)) == folder
        return
    config = make_config(**saved | {name: other(name)})
    if name in ("name", "seed", "seeds"):
        assert resumed_run(config) is None, "a run of another name"
    elif name in settings_of("model", "data", "run"):
        with pytest.raises(UsageError, match=f"--resume: .* was made with {name} = "):
            resumed_run(config)
    else:
        assert resumed_run(config) == folder


def test_a_run_of_an_older_version_lacks_newer_settings(tmp_path: Path) -> None:
    config = make_config(**SAVED, work_dir=str(tmp_path))
    folder = new_run(config)
    old = to_dict(config)
    del old["train"]["clip_norm"], old["predict"]
    old["run"]["runs"] = []  # version 1.0's name of `paths`
    (folder / "config.json").write_text(json.dumps(old), encoding="utf-8")
    assert resumed_run(config) == folder


@pytest.mark.parametrize("text", ["{", "", "[1]", '{"train": {"lr": -1}}', '{"train": 3}', "[" * 10000])
def test_a_run_folder_that_says_nothing_is_passed_over(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = make_config(**SAVED, work_dir=str(tmp_path))
    first, second = new_run(config), new_run(config)
    (second / "config.json").write_text(text, encoding="utf-8")
    assert resumed_run(config) == first
    assert (
        f"--resume: {second} is passed over: it has neither a config.json nor a checkpoint" in capsys.readouterr().out
    )
    (second / "config.json").unlink()
    assert resumed_run(config) == first, "another program may be making it right now"
    write_checkpoint(second / "last.pt", {"config": to_dict(config)})
    assert resumed_run(config) == second
    assert f"config.json cannot be read; the settings are those of {second / 'last.pt'}" in capsys.readouterr().out


def test_tables_tell_runs_apart_by_what_changes_results() -> None:
    config = to_dict(Config())
    run = Run(name="a", path=Path("a"), seed=1, config=config, classes={}, mean={}, deviation={})
    expected = set(settings_of("model", "data", "run", "result")) - {"seed"}
    assert run.settings.keys() == expected
    assert {"data_path", "meta_epochs", "lr", "k_cpc"} <= expected
