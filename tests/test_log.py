"""Optional loggers, where they are installed (`make test-floors` installs all)."""

from pathlib import Path

import pytest

from utils.run.log import RunLog


def test_weights_and_biases_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    log = RunLog(tmp_path, kept=0, config={"train": {"lr": 0.5}}, tensorboard=False, wandb=True)
    log.write({"epoch": 1, "train": {"loss": 0.25}, "name": "no number"})
    log.write({"epoch": 2, "train": {"loss": 0.5}})  # a step is counted when the next one begins
    found = wandb.run.summary
    assert (found["epoch"], found["train/loss"], wandb.run.config["train"]) == (1, 0.25, {"lr": 0.5})
    log.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
