"""The short form of `make torture`, and that it would notice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
def test_a_little_torture() -> None:
    argv = ["--kills", "2", "--commands", "100", "--files", "4", "--seed", "3"]
    done = subprocess.run([sys.executable, "tests/torture.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 2 and found["equal"] == found["trainings"] and found["wrong"] == 0
    assert sum(found["commands by status"].values()) == 100
    assert {name: sum(own.values()) for name, own in found["files by status"].items()} == {
        "config.json": 1, "metrics.jsonl": 1, "last.pt": 1, "results.json": 1,
    }  # fmt: skip
