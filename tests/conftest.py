"""One thread for every test and for every program that a test starts; material that only some machines have."""

import os
from pathlib import Path

# Before PyTorch is imported. Many small sums gain nothing by threads, a busy machine makes them wait for each other,
# and in another order sums differ in their last bits.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
    os.environ[name] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture
def parity() -> Path:
    """Folder with recorded inputs and outputs of the released model."""
    if not (SHARED / "parity").is_dir():
        pytest.skip("the recorded outputs of the released model are not on this machine")
    return SHARED / "parity"


@pytest.fixture
def real_images() -> Path:
    """Folder with real images in MVTec layout."""
    if not (SHARED / "data" / "dev").is_dir():
        pytest.skip("the development images are not on this machine")
    return SHARED / "data" / "dev"
