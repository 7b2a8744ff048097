"""Run folders under --work-dir: named after what they hold, never overwritten."""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from pathlib import Path
from typing import Any

from default import KEPT, Config, UsageError, flat, from_dict, settings_of, to_dict
from utils.run.checkpoint import read_checkpoint
from utils.run.keeper import LAST, MIDDLE, PREVIOUS
from utils.run.writer import write_whole


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
    """Write config.json: other programs may be reading it."""
    write_whole(folder / "config.json", (json.dumps(to_dict(config), indent=2) + "\n").encode())


def resumed_run(config: Config) -> Path | None:
    """The newest run folder of the same settings, None if there is no run of that name; which are passed over is said.

    How far it goes, where its files lie and what changes no result may differ (see `default.Bind`).

    Raises:
        UsageError: the newest run has other settings.
    """
    new = flat(to_dict(config))
    for folder in reversed(existing_runs(check_writable(config.run.work_dir), run_name(config)).values()):
        old = read_settings(folder)
        if old is None:  # another program may be making one right now
            print(f"--resume: {folder} is passed over: it has neither a config.json nor a checkpoint that can be read")
            continue
        for name in settings_of(*KEPT):
            if old[name] != new[name]:
                raise UsageError(
                    f"--resume: {folder} was made with {name} = {old[name]!r}, not {new[name]!r}; "
                    "give the same options, or leave --resume out to start a new run"
                )
        return folder
    return None


def read_settings(folder: Path) -> dict[str, Any] | None:
    """What a run folder's config.json says, by names, or else its checkpoints; what is not named there has its default.
    None if neither can be read."""
    path = folder / "config.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, RecursionError):
        return flat(to_dict(from_dict(json.loads(path.read_text(encoding="utf-8")))))
    names = [where + name for name in (LAST, MIDDLE, PREVIOUS) for where in ("", "*/")]
    for path in (path for name in names for path in sorted(folder.glob(name))):
        with contextlib.suppress(UsageError, AttributeError, TypeError, KeyError):
            settings = flat(to_dict(from_dict(read_checkpoint(path, "--resume")["config"])))
            print(f"--resume: {folder / 'config.json'} cannot be read; the settings are those of {path}")
            return settings
    return None
