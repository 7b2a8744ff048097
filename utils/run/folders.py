"""Run folders under --work-dir: named after what they hold, never overwritten."""

from __future__ import annotations

import json
import re
from pathlib import Path

from default import Config, UsageError, to_dict

# What a resumed run may have otherwise than the run it goes on with.
FREE = {
    "data": {"workers", "data_path", "cache", "pre_extract"},
    "train": {"resume", "meta_epochs", "compile", "checkpoint_activations", "profile", "tensorboard", "wandb_enable"},
    "eval": {"bootstrap", "compare", "pictures", "loc_eval", "pro_eval", "pro_eval_interval"},
    "run": {"device", "work_dir", "mode", "runs", "seeds"},
}


def run_name(config: Config) -> str:
    """mvtec-convnextv2_base-multi-seed9826 or NAME-seed9826 with --name, -seeds1_2_3 at its end for several seeds, or
    with test- before it."""
    classes = "multi" if config.data.multi_class else "single"
    extractor = re.sub(r"[^\w.-]", "_", config.model.extractor)
    seeds = f"seeds{'_'.join(map(str, config.run.seeds))}" if config.run.seeds else f"seed{config.run.seed}"
    name = f"{config.run.name or f'{config.data.dataset}-{extractor}-{classes}'}-{seeds}"
    return f"test-{name}" if config.run.mode == "test" else name


def check_writable(work_dir: str | Path) -> Path:
    """The work folder, made if it is not there.

    Raises:
        UsageError: it cannot be made or written.
    """
    folder = Path(work_dir)
    probe = folder / ".write-test"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--work-dir: cannot write in {folder}: {error.strerror}") from error
    return folder


def existing_runs(work_dir: Path, name: str) -> dict[int, Path]:
    """Run folders of this name by their number, oldest first: name, name-2, name-3, ..."""
    found: dict[int, Path] = {}
    for path in work_dir.glob(f"{name}*"):
        match = re.fullmatch(re.escape(name) + r"(?:-(\d+))?", path.name)
        if match and path.is_dir():
            found[int(match[1] or 1)] = path
    return dict(sorted(found.items()))


def new_folder(work_dir: str | Path, name: str) -> Path:
    """An empty folder in the work folder: name, or name-2, name-3, ... where there are such folders."""
    parent = check_writable(work_dir)
    number = max(existing_runs(parent, name), default=0) + 1
    while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():  # a file of that name
        number += 1
    folder.mkdir()
    return folder


def new_run(config: Config) -> Path:
    """A fresh run folder with config.json in it."""
    folder = new_folder(config.run.work_dir, run_name(config))
    write_config(folder, config)
    return folder


def write_config(folder: Path, config: Config) -> None:
    (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")


def resumed_run(config: Config) -> Path | None:
    """The newest run folder of the same settings, None if there is no run of that name.

    The device, the number of meta epochs, where the data lie and how they are read may differ.

    Raises:
        UsageError: the newest run has other settings.
    """
    runs = existing_runs(check_writable(config.run.work_dir), run_name(config))
    if not runs:
        return None
    newest = list(runs.values())[-1]
    try:
        old = json.loads((newest / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume: cannot read {newest / 'config.json'}") from error
    new = json.loads(json.dumps(to_dict(config)))
    for part, values in new.items():
        for name, value in values.items():
            if name not in FREE.get(part, set()) and old.get(part, {}).get(name) != value:
                raise UsageError(
                    f"--resume: {newest} was made with {name} = {old.get(part, {}).get(name)!r}, not {value!r}; "
                    "give the same options, or leave --resume out to start a new run"
                )
    return newest
