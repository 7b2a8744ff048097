"""What the soak calls growth, what an audit looks up, and the table of licences."""

import json
import os
import runpy
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from benchmarks.soak import LIMITS, Usage, growth, rows, sampled

ROOT = Path(__file__).resolve().parents[1]


def samples(memory: float, files: float) -> list[Usage]:
    """100 seconds: all grows during the first 20, and then by so much a second."""
    return [
        Usage(
            time=float(t), memory=500 + 10 * min(t, 20) + memory * t, files=round(5 + min(t, 20) + files * t), threads=4
        )
        for t in range(101)
    ]


def test_growth_is_that_after_the_warm_up() -> None:
    assert growth(samples(0.5, 0.0), "memory") == pytest.approx(0.5 * 70)
    assert growth(samples(0.0, 0.0), "memory") == pytest.approx(0)
    lines, flat = rows("steps", samples(0.5, 0.0), 1000)
    assert not flat and lines[0] == "| steps | memory MiB | 725 | 750 | +35.00 | +50.00 |"
    assert rows("steps", samples(0.1, 0.0), 1000)[1], f"below {LIMITS['memory']} MiB"
    assert not rows("steps", samples(0.0, 0.1), 1000)[1], "files stay open"
    with pytest.raises(SystemExit, match="too few"):
        growth(samples(0.0, 0.0)[:2], "files")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc")
def test_what_is_open_is_counted(tmp_path: Path) -> None:
    before = Usage.now()
    with (tmp_path / "a").open("w"), sampled() as found:
        during = Usage.now()
    assert (during.files, during.threads) == (before.files + 1, before.threads + 1)
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert Usage.now().memory - during.memory == pytest.approx(64, abs=8)
    assert found[0].files == before.files + 1


ASKED = """
import json, sys
from pathlib import Path
service = sys.argv[sys.argv.index("--vulnerability-service") + 1]
with Path("asked.txt").open("a") as file:
    file.write(service + (" jinja2" if "-r" in sys.argv else " all") + "\\n")
answers = json.loads(Path("answers.json").read_text())
if "-r" in sys.argv:
    assert Path(sys.argv[sys.argv.index("-r") + 1]).read_text() == "jinja2==2.10\\n"
    print(answers[service])
sys.exit(3)
"""
SOME, NONE = (json.dumps({"dependencies": [{"name": "jinja2", "vulns": found}]}) for found in ([{"id": "CVE"}], []))


@pytest.mark.parametrize(
    ("answers", "asked", "status"),
    [
        ({"pypi": SOME}, ["pypi jinja2", "pypi all"], 3),
        ({"pypi": NONE, "osv": SOME}, ["pypi jinja2", "osv jinja2", "osv all"], 3),
        ({"pypi": NONE, "osv": ""}, ["pypi jinja2", "osv jinja2"], 1),
    ],
)
def test_an_audit_that_could_ask_nobody_says_so(answers: dict, asked: list[str], status: int, tmp_path: Path) -> None:
    """With a program in pip-audit's place that knows what `answers` say, and leaves with status 3."""
    (tmp_path / "pip_audit.py").write_text(ASKED)
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "audit.py")], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, (tmp_path / "asked.txt").read_text().splitlines()) == (status, asked)
    said = "make audit: nothing was looked up: neither pypi nor osv, as reached from here, knows a weakness of jinja2"
    assert done.stderr.startswith(said) if status == 1 else not done.stderr


def test_licences_are_what_packages_say(tmp_path: Path) -> None:
    licence = runpy.run_path(str(ROOT / ".ci" / "licences.py"))["licence"]
    for number, (lines, expected) in enumerate(
        {
            "License-Expression: MIT\nLicense: old": "MIT",
            "Classifier: License :: OSI Approved :: BSD License\nLicense: text": "BSD License",
            "License: Apache-2.0\n  and more": "Apache-2.0",
            "License: UNKNOWN": "not said",
            "Summary: nothing": "not said",
        }.items()
    ):
        folder = tmp_path / f"p{number}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: p{number}\nVersion: 1\n{lines}\n")
        assert licence(Distribution.at(folder)) == expected
