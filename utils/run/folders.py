"""Run folders under --work-dir: named after what they hold, never overwritten."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from default import KEPT, Config, UsageError, flat, from_dict, settings_of, to_dict


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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # of a name of its own: others may be asking at the same time
            pass
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
    number = max(existing_runs(parent, name), default=0)
    while True:
        number += 1
        folder = parent / (name if number == 1 else f"{name}-{number}")
        with contextlib.suppress(FileExistsError):  # a file of that name, or another program was faster
            folder.mkdir()
            return folder


def new_run(config: Config) -> Path:
    """A fresh run folder with config.json in it."""
    folder = new_folder(config.run.work_dir, run_name(config))
    write_config(folder, config)
    return folder


def write_config(folder: Path, config: Config) -> None:
    """Write config.json, whole or not at all: other programs may be reading it."""
    part = folder / "config.json.part"
    part.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
    part.replace(folder / "config.json")


def resumed_run(config: Config) -> Path | None:
    """The newest run folder of the same settings, None if there is no run of that name.

    How far it goes, where its files lie and what changes no result may differ (see `default.Bind`).

    Raises:
        UsageError: the newest run has other settings.
    """
    runs = [
        path
        for path in existing_runs(check_writable(config.run.work_dir), run_name(config)).values()
        if (path / "config.json").is_file()
    ]  # another program may be making one right now
    if not runs:
        return None
    old, new = read_settings(runs[-1]), flat(to_dict(config))
    for name in settings_of(*KEPT):
        if old[name] != new[name]:
            raise UsageError(
                f"--resume: {runs[-1]} was made with {name} = {old[name]!r}, not {new[name]!r}; "
                "give the same options, or leave --resume out to start a new run"
            )
    return runs[-1]


def read_settings(folder: Path) -> dict[str, Any]:
    """What a run folder's config.json says, by names; what it does not name has its default.

    Raises:
        UsageError: it cannot be read.
    """
    path = folder / "config.json"
    try:
        return flat(to_dict(from_dict(json.loads(path.read_text(encoding="utf-8")))))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--resume: cannot read {path}") from error
