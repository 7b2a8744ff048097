"""README.md is true: its commands run, its table of flags is that of default.py, its file tree names every file."""

import re
import shlex
from dataclasses import Field, fields
from pathlib import Path

import pytest

from default import PARTS, flag_of
from main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if "python main.py" in line]
METHOD = (
    "--class-names all --multi-class --quantize-enable --quantize-type residual --concat-pos --mixed-gaussian "
    "--extractor convnextv2_base"
)
PAPER = [
    f"CUDA_VISIBLE_DEVICES=0 python main.py --mode train --dataset mvtec {METHOD}",
    f"CUDA_VISIBLE_DEVICES=0 python main.py --mode train --dataset visa {METHOD}",
    f"CUDA_VISIBLE_DEVICES=0 python main.py --mode test --dataset mvtec {METHOD} --eval_ckpt $CKPT_PATH",
]


def flag_row(entry: Field) -> str:
    """A flag's line in README.md."""
    default, meta = entry.default, entry.metadata
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
    shown = {"True": "on", "False": "off", "None": ""}.get(shown, f"{default:.3g}" if type(default) is float else shown)
    choices = f" ({', '.join(meta['choices'])})" if meta["choices"] else ""
    name = "PATH ..." if entry.name == "paths" else flag_of(entry.name)
    return f"| `{name}` | {shown} | {meta['help'].replace('%%', '%')}{choices} |"


def flag_table() -> str:
    """The section "Flags" of README.md: one table for each part of the configuration."""
    lines = []
    for part, kind in PARTS.items():
        lines += [f"### {part.capitalize()}", "", "| flag | default | meaning |", "|---|---|---|"]
        lines += [*(flag_row(entry) for entry in fields(kind)), ""]  # type: ignore[arg-type]
    return "\n".join(lines)


def test_flags_are_those_of_default() -> None:
    assert flag_table() in README, f"the section Flags should be:\n{flag_table()}"


def test_the_papers_commands_are_there() -> None:
    assert set(PAPER) <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_resolve(command: str, capsys: pytest.CaptureFixture) -> None:
    words = shlex.split(command.replace("$CKPT_PATH", "last.pt"))
    assert main([*words[words.index("main.py") + 1 :], "--dry-run"]) == 0
    assert '"extractor"' in capsys.readouterr().out


def test_every_file_is_in_the_tree() -> None:
    tree = README.split("## Files")[1].split("```")[1]
    for folder in (".", "models", "datasets", "utils"):
        for path in (ROOT / folder).glob("*.py" if folder == "." else "**/*.py"):
            assert path.name == "__init__.py" or path.name in tree, path
