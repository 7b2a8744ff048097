"""VQ-Flow on the command line: argv -> Config -> one function per mode."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import os
import re
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import Field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from default import (
    FIXED,
    JUDGING,
    PARTS,
    PRESETS,
    Config,
    PlanConfig,
    UsageError,
    __version__,
    flag_of,
    make_config,
    settings_of,
    shown,
    to_dict,
    words_of,
)
from utils.run.offline import go_offline
from utils.run.stop import Stopped, heeding
from utils.run.text import one_line, printable
from utils.run.trouble import is_echo, trouble

DESCRIPTION = "Train one VQ-Flow anomaly detector for all classes, evaluate it, and reproduce the paper's tables."

# What a switch or choice needs to do anything: its field, the test, the advice.
_CODEBOOKS = (lambda c: c.model.quantize_enable, "does nothing without --quantize-enable; add that, or leave it out")
_PREDICTING = (lambda c: c.run.mode == "predict", "does nothing without --mode predict; leave it out")
_PLANNING = (lambda c: c.run.mode == "plan", "does nothing without --mode plan; add that, or leave it out")
_TRAINING = (lambda c: c.run.mode == "train", "does nothing without --mode train; leave it out")
NEEDS: dict[str, tuple[Callable[[Config], bool], str]] = {
    "quantize_type": _CODEBOOKS,
    "codebooks": _CODEBOOKS,
    "reassign_quantize": _CODEBOOKS,
    "overlap": (lambda c: c.data.tile is not None, "does nothing without --tile; add that, or leave it out"),
    "weights": (lambda c: c.model.pretrained, "contradicts --no-pretrained; leave one of them out"),
    "eval_ckpt": (
        lambda c: c.run.mode in JUDGING,
        "does nothing in --mode train; to go on with a run, use --resume",
    ),
    "output": (
        lambda c: c.run.mode in ("predict", "submit"),
        "does nothing without --mode predict or submit; leave it out",
    ),
    "engine": _PREDICTING,
    "save_maps": _PREDICTING,
    "save_masks": _PREDICTING,
    "fail_on": _PREDICTING,
    "watch": _PREDICTING,
    "precision": (lambda c: c.run.mode == "export", "does nothing without --mode export; add that, or leave it out"),
    "json": (
        lambda c: c.run.mode in ("inspect", "plan"),
        "does nothing without --mode inspect or plan; leave it out",
    ),
    "clear": (lambda c: c.run.mode == "cache", "does nothing without --mode cache; add that, or leave it out"),
    "resume": _TRAINING,
    "save_every": _TRAINING,
    "tensorboard": _TRAINING,
    "wandb_enable": _TRAINING,
} | {entry.name: _PLANNING for entry in fields(PlanConfig)}


KEPT = "what was finished before is kept; a training goes on with --resume"


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of printing the usage and leaving."""

    def error(self, message: str) -> Any:
        raise UsageError(message.removeprefix("argument "))


def build_parser() -> Parser:
    """One flag per field of the configuration; defaults stand in default.py alone."""
    parser = Parser(prog="main.py", description=DESCRIPTION, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-4 is a value, too, and its flag refuses it
    parser.add_argument("--version", action="version", version=f"VQ-Flow {__version__}")
    parser.add_argument("--preset", metavar="NAME", help=f"a row of settings that flags override: {', '.join(PRESETS)}")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration as JSON and leave")
    for part, kind in PARTS.items():
        group = parser.add_argument_group(part, (kind.__doc__ or "").splitlines()[0])
        for entry in fields(kind):  # type: ignore[arg-type]
            add_flag(group, entry)
    return parser


def add_flag(group: Any, entry: Field) -> None:
    """The flag of one field, with its default in the help text."""
    kind, meta = str(entry.type), entry.metadata
    if entry.name == "paths":
        group.add_argument(entry.name, nargs="*", metavar="PATH", help=meta["help"])
        return
    text = meta["help"] + (f" (default: {shown(entry.default)})" if entry.default not in (None, ()) else "")
    names = list(dict.fromkeys([flag_of(entry.name), "--" + entry.name.replace("_", "-")]))
    if kind.startswith("bool"):
        group.add_argument(*names, action=argparse.BooleanOptionalAction, help=text)
        return
    of: Any = int if "int" in kind else float if "float" in kind else str
    if words_of(kind):
        of = partial(number_or_word, words_of(kind))
    choices = "{" + ",".join(map(str, meta["choices"])) + "}" if meta["choices"] else entry.name.split("_")[-1].upper()
    group.add_argument(
        *names, type=of, nargs="+" if "tuple" in kind else None, metavar=choices, help=text, dest=entry.name
    )


def number_or_word(words: Sequence[str], text: str) -> int | str:
    """What a flag that takes a whole number takes, or one of some words.

    Raises:
        argparse.ArgumentTypeError: neither.
    """
    try:
        return text if text in words else int(text)
    except ValueError:
        choices = " or ".join(words)
        raise argparse.ArgumentTypeError(f"expected a whole number or {choices}, but got {text!r}") from None


def parse(argv: Sequence[str]) -> tuple[Config, dict[str, Any], bool]:
    """The configuration, what the preset and the user chose by name, and whether this is a dry run.

    Of a preset, what a checkpoint fixes counts as chosen only where there is no checkpoint: it brings its own.

    Raises:
        UsageError: unknown flag, preset or value.
    """
    parser, words = build_parser(), [hyphenated(word) for word in argv]
    namespace, unknown = parser.parse_known_args(words)
    typed = vars(namespace)
    if typed.get("mode") not in ("table", "predict"):
        refuse_surplus(parser, words)
    if unknown:
        raise UsageError(unknown_flag(unknown[0]))
    dry, preset = typed.pop("dry_run", False), typed.pop("preset", None)
    asked: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in typed.items()}
    if "seed" in asked and "seeds" in asked:
        raise UsageError("--seed: --seeds was given too; use one of them")
    config = make_config(preset, **asked)
    refuse_void(config, typed)
    fixed = settings_of(*FIXED) if config.run.mode in JUDGING else ()
    row = {n: value for n, value in PRESETS[preset].items() if n not in fixed} if preset else {}
    return config, row | asked, dry


def refuse_surplus(parser: Parser, words: Sequence[str]) -> None:
    """Raise `UsageError` for a flag that is followed by more values than it takes."""
    flag, values = "", []
    for word in [*words, "--"]:
        if not word.startswith("-") or parser._negative_number_matcher.match(word):
            values.append(word)
            continue
        action = parser._option_string_actions.get(flag)
        room = 1 if action and action.nargs is None else 0
        if action and action.nargs in (None, 0) and len(values) > room:
            expected = "one value" if room else "no value"
            raise UsageError(f"{flag}: expected {expected}, but got {' '.join(values)}")
        flag, equals, value = word.partition("=")
        values = [value] if equals else []


def unknown_flag(word: str) -> str:
    """Says which flag may have been meant."""
    name = word.partition("=")[0]
    if not name.startswith("-"):
        return f"expected a flag, but got {word!r}; --help lists all of them"
    known = ["--preset", "--dry-run", "--version", *(flag_of(e.name) for k in PARTS.values() for e in fields(k))]  # type: ignore[arg-type]
    close = difflib.get_close_matches(name, known, n=1)
    return f"{name}: no such flag; " + (f"did you mean {close[0]}?" if close else "--help lists all of them")


def refuse_void(config: Config, typed: dict[str, Any]) -> None:
    """Raise `UsageError` for a switch or choice that the user typed but that would do nothing beside the others.

    Sizes and weights of a part that is switched off are accepted, so that one switch can be taken out of a command.
    """
    for name, (satisfied, advice) in NEEDS.items():
        value = typed.get(name)
        if value is not None and value is not False and not satisfied(config):
            raise UsageError(f"{flag_of(name)}: {advice}")


def hyphenated(word: str) -> str:
    """--batch_size=4 as --batch-size=4: underscores and hyphens are the same in a flag's name."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def run(argv: Sequence[str]) -> int:
    """Do what the command line says; the status."""
    config, chosen, dry = parse(argv)
    if config.run.offline:
        go_offline()
    if dry:
        print(json.dumps({"version": __version__} | to_dict(config), indent=2))
    elif config.run.mode in ("table", "export", "plan") and several():
        raise UsageError(f"--mode {config.run.mode}: is the work of one process; leave torchrun out")
    elif config.run.mode == "train":
        for_each_seed(config, train)
    elif config.run.mode == "table":
        from utils.report.gather import gather_runs

        print(gather_runs(config))
    elif config.run.mode == "inspect":
        from inspect_data import run_inspect

        return run_inspect(config)
    elif config.run.mode == "plan":
        from plan import run_plan

        run_plan(config)
    elif config.run.mode == "cache":
        from datasets.tidy import tend

        print(printable(tend(config)))
    elif config.run.mode == "predict":
        from predict import run_predict

        return run_predict(config, chosen)
    elif config.run.mode == "submit":
        from submit import run_submit

        run_submit(config, chosen)
    elif config.run.mode == "export":
        from export import run_export

        run_export(config, chosen)
    else:
        from test import run_test

        run_test(config, chosen)
    return 0


def train(config: Config) -> Path:
    """Train, then judge the test images without labels; the run folder."""
    from predict import predict_unlabelled
    from train import run_training

    folder = run_training(config)
    predict_unlabelled(config, folder)
    return folder


def for_each_seed(config: Config, train: Callable[[Config], Path]) -> None:
    """Train once, or once with each of --seeds and summarize the run folders."""
    if not config.run.seeds:
        train(config)
        return
    folders = [train(replace(config, run=replace(config.run, seed=s, seeds=()))) for s in config.run.seeds]
    from utils.report.gather import summarize_seeds
    from utils.run.distributed import from_first

    print(from_first(lambda: summarize_seeds(config, folders)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the status: see `guarded`, and 141 for a reader of our output who left."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what its encoding lacks is shown as \xb2 or \u7247
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            return guarded(sys.argv[1:] if argv is None else argv)
        finally:
            print(end="", flush=True)  # here, not while the interpreter shuts down
    except BrokenPipeError:  # main.py ... | head
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141


def guarded(argv: Sequence[str]) -> int:
    """Run; the status: 2 for a mistake of the user's, 1 for what the system refuses, 130 for Ctrl-C, 143 for SIGTERM,
    each with one line, and 70 for a bug of ours, with all that helps to mend it."""
    warnings.filterwarnings("ignore", message="Mapping deprecated model name")
    try:
        with heeding(), connected():
            return run(argv)
    except UsageError as error:
        return said(f"error: {error}", 2)
    except Stopped as stop:
        return said(f"stopped: {stop.text or KEPT}", stop.status, echo=True)
    except KeyboardInterrupt:
        return said(f"stopped: {KEPT}", 130, echo=True)
    except BrokenPipeError:
        raise
    except Exception as error:
        text = trouble(error)
        return said(f"error: {text}", 1, echo=is_echo(error)) if text is not None else reported(argv)


def several() -> bool:
    """Whether torchrun started more than this process."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def connected() -> contextlib.AbstractContextManager:
    """Meanwhile the processes that torchrun started work together; PyTorch is loaded here only if there are several."""
    if not several():
        return contextlib.nullcontext()
    from utils.run.distributed import together

    return together()


def said(line: str, status: int, *, echo: bool = False) -> int:
    """Print how the program ends; the status. What only follows from the end of another process is an `echo`."""
    line = one_line(f"main.py: {line}")
    if "utils.run.distributed" in sys.modules:
        sys.modules["utils.run.distributed"].say(line, echo=echo)
    else:
        print(line, file=sys.stderr)
    return status


def reported(argv: Sequence[str]) -> int:
    """Print the error that is being handled, and what a report of it should tell."""
    traceback.print_exc()
    settings = "not resolved"
    with contextlib.suppress(Exception):
        settings = json.dumps(to_dict(parse(argv)[0]))
    print(printable(
        "main.py: this is a bug of VQ-Flow. Please report it with all of the lines above and below, as an issue of the "
        f"repository that this copy comes from.\nversion: {__version__}, Python {sys.version.split()[0]}, "
        f"{sys.platform}\ncommand: main.py {shlex.join(argv)}\nconfig: {settings}"
    ), file=sys.stderr)  # fmt: skip
    return 70


if __name__ == "__main__":
    sys.exit(main())
