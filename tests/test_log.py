"""Optional loggers, where they are installed (`make test-floors` installs all)."""

from pathlib import Path

import pytest

from utils.run.log import RunLog


def test_weights_and_biases_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = RunLog(tmp_path, kept=0, config={"train": {"lr": 0.5}}, tensorboard=False, wandb=True)
    log.write({"epoch": 1, "train": {"loss": 0.25}, "name": "no number"})
    assert wandb.run.summary["train/loss"] == 0.25
    log.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
