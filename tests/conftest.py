"""Shared fixtures: material that only some machines have."""

from pathlib import Path

import pytest

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
