"""What says something at once loads nothing heavy; --offline asks nobody."""

import subprocess
import sys
from pathlib import Path

import pytest

from default import make_config
from main import main

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "torchvision", "timm", "numpy", "scipy", "PIL", "cv2", "FrEIA", "huggingface_hub", "safetensors",
         "sklearn", "skimage", "tifffile", "matplotlib", "jinja2", "tqdm")  # fmt: skip


@pytest.mark.parametrize(
    "words",
    ["--help", "--version", "--preset cpu --dry-run", "--mode predict --eval_ckpt a.pt b.png --dry-run", "--lr x"],
)
def test_what_is_said_at_once_loads_nothing_heavy(words: str) -> None:
    code = f"""
import sys, main
try:
    status = main.main({words.split()!r})
except SystemExit as left:
    status = left.code
print("\\nloaded:", status, *(n for n in {HEAVY!r} if n in sys.modules), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"loaded: {2 if words == '--lr x' else 0}"


OFFLINE = """
import os, socket, sys
from pathlib import Path
import main
server = socket.create_server(("127.0.0.1", 0))
argv = ["--offline", "--dry-run"]
assert main.main(argv) == 0
socket.create_connection(server.getsockname()).close()
for call in (
    lambda: socket.getaddrinfo("example.invalid", 443),
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9)),
    lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
):
    try:
        call()
    except OSError as error:
        assert str(error).startswith("--offline: "), error
    else:
        raise AssertionError(call)
sys.exit(main.main(sys.argv[1:]))
"""


def test_offline_asks_nobody_and_says_so_in_a_line(tmp_path: Path) -> None:
    """The weights that the model would download are not there; example addresses are those of RFC 5737 and 3849."""
    from fake_data import make_mvtec

    root = make_mvtec(tmp_path / "data", ("bottle",), train=2, good=1, bad=1)
    words = ["--offline", "--extractor", "resnet18", "--dataset", "mvtec", "--data-path", str(root), "--class-names"]
    words += ["bottle", "--input-size", "64", "--device", "cpu", "--work-dir", str(tmp_path / "runs")]
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *words], cwd=ROOT, capture_output=True, text=True,
        env={"HF_HOME": str(tmp_path / "hub"), "TORCH_HOME": str(tmp_path / "torch"), "PATH": "", "HOME": str(tmp_path),
             "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("main.py: error: --extractor: no weights for 'resnet18' (")
    assert "--weights FILE" in lines[0]


def test_offline_is_the_users_to_say() -> None:
    assert make_config().run.offline is False
    assert main(["--no-offline", "--dry-run"]) == 0
