"""deploy/run_onnx.py in a process that has neither PyTorch nor this program."""

import csv
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[1] / "deploy" / "run_onnx.py"
WITHOUT_TORCH = """
import runpy, sys
for name in ("torch", "torchvision", "timm", "onnx", "scipy", "cv2", "default", "datasets"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(model: Path, *paths: Path) -> tuple[list[dict[str, str]], int]:
    """The script's lines and status."""
    words = [str(SCRIPT), str(model), *map(str, paths)]
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, cwd="/")
    assert not done.stderr, done.stderr
    return list(csv.DictReader(done.stdout.splitlines())), done.returncode
