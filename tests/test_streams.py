"""What a terminal or a redirection cannot show ends no run: neither signs and names, nor a closed pipe."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from default import Config, to_dict
from utils.metrics import METRICS

ROOT = Path(__file__).resolve().parents[1]
ENCODINGS = ("ascii", "cp1252", "gbk", "shift_jis", "cp1251", "C")
NAMES = ("screw-片-болт-é", os.fsdecode(b"broken-\xff\xfe"))


def environment(encoding: str) -> dict[str, str]:
    """A machine whose streams have that encoding; C: the locale without one."""
    rest = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONIO", "PYTHONUTF8"))}
    own = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"} if encoding == "C" else {"PYTHONIOENCODING": encoding}
    return rest | own | {"PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}


def make_run(folder: Path) -> Path:
    """A run folder, as a summary of several seeds leaves it: its table has ± in it."""
    folder.mkdir(parents=True)
    row = dict.fromkeys(METRICS, 0.5)
    content = {"config": to_dict(Config()), "mean": row, "classes": {"螺丝": row}, "deviation": {"mean": row}}
    (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess[bytes]]]:
    """Per encoding the work folder and the program that wrote a table there; two run at a time."""
    place = tmp_path_factory.mktemp("streams")
    runs = [str(make_run(place / name)) for name in NAMES]

    def start(encoding: str) -> subprocess.Popen[bytes]:
        argv = ["--mode", "table", *runs, "--work-dir", str(place / encoding)]
        return subprocess.Popen(
            [sys.executable, "main.py", *argv], cwd=ROOT, env=environment(encoding), stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip

    done = {}
    for pair in zip(ENCODINGS[::2], ENCODINGS[1::2], strict=True):
        for encoding, process in [(encoding, start(encoding)) for encoding in pair]:
            out, err = process.communicate()
            finished = subprocess.CompletedProcess(process.args, process.returncode, out, err)
            done[encoding] = (place / encoding, finished)
    return done


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_table_is_written_and_shown_whatever_the_terminal_can_show(
    encoding: str, tables: dict[str, tuple[Path, subprocess.CompletedProcess[bytes]]]
) -> None:
    folder, done = tables[encoding]
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode("ascii" if encoding == "C" else encoding)
    assert "50.0 ± 50.0" in shown or "50.0 \\xb1 50.0" in shown
    assert "\\xff\\xfe" in shown
    assert "片" in shown or "\\u7247" in shown or encoding == "C", "there they are bytes, too"
    for suffix in ("csv", "md", "tex"):
        text = (folder / "table" / f"table.{suffix}").read_text(encoding="utf-8")
        assert "片" in text or encoding == "C"
        assert ("\\textbackslash{}xff" if suffix == "tex" else "\\xff") in text
    assert "50.0 ± 50.0" in (folder / "table" / "table.md").read_text(encoding="utf-8")


def test_an_error_names_what_it_cannot_show() -> None:
    argv = [sys.executable, "main.py", "--device", "手机"]
    done = subprocess.run(argv, cwd=ROOT, env=environment("ascii"), capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"main.py: error: --device: expected one of auto")


@pytest.mark.parametrize("words", [["--dry-run"], ["--help"], ["--version"]], ids=" ".join)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_the_program_quietly(words: list[str], unbuffered: str) -> None:
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "main.py", *words], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE,
        env=environment("utf-8") | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(reading)
    os.close(writing)
    assert process.communicate()[1] == b""
    assert process.returncode == 141 or (process.returncode == 0 and "--dry-run" not in words), "argparse prints alone"


# --- files


def text_calls() -> Iterator[tuple[str, int, ast.Call]]:
    """Every call in the program that opens a file, or reads or writes it as text."""
    parts = [
        ROOT.glob("*.py"),
        *((ROOT / name).rglob("*.py") for name in ("utils", "datasets", "models", "benchmarks")),
    ]
    for path in sorted(p for part in parts for p in part):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if name in ("read_text", "write_text", "open"):
                    yield path.relative_to(ROOT).as_posix(), node.lineno, node


def is_text(node: ast.Call) -> bool:
    """Whether it is not one of Image.open, os.open, tarfile.open, ..., and not in binary mode."""
    owner = node.func.value if isinstance(node.func, ast.Attribute) else None
    if isinstance(owner, ast.Name) and owner.id in ("Image", "os", "tarfile"):
        return False
    words = [w.value for w in (*node.args, *(k.value for k in node.keywords)) if isinstance(w, ast.Constant)]
    return not any(isinstance(w, str) and "b" in w and set(w) <= set("rwaxb+") for w in words)


def test_text_files_have_an_encoding_of_their_own() -> None:
    calls = [(path, line, node) for path, line, node in text_calls() if is_text(node)]
    assert len(calls) > 15
    without = [(path, line) for path, line, node in calls if "encoding" not in {k.arg for k in node.keywords}]
    assert not without
