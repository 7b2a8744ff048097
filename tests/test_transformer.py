"""The recipe on a transformer, whose levels share one size: a whole run, and its model read back."""

import json
from pathlib import Path

import timm
import torch

from fake_data import TINY, make_mvtec
from main import main


def test_a_run_on_a_transformer_and_its_evaluation_agree(tmp_path: Path) -> None:
    data, runs = str(make_mvtec(tmp_path / "data", ("bottle", "grid"))), str(tmp_path / "runs")
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.pth")
    words = ["--data-path", data, "--weights", str(tmp_path / "w.pth"), "--work-dir", runs, "--no-report"]
    small = ["--extractor", "test_vit", "--memory", "4", "--holdout", "0.3", "--dataset", "folder"]
    assert main(["--preset", "dinov2", *TINY, *words, *small, "--name", "a"]) == 0
    judged = ["--mode", "test", "--eval_ckpt", f"{runs}/a-seed9826", "--name", "b", "--device", "cpu"]
    assert main([*judged, *words]) == 0
    found = [json.loads(Path(runs, n, "results.json").read_text()) for n in ("a-seed9826", "test-b-seed9826")]
    mean, again = (results["mean"] for results in found)
    assert mean == again and all(0 <= value <= 1 for value in mean.values())
    content = torch.load(f"{runs}/a-seed9826/last.pt", weights_only=True)
    assert len(content["scorer"]["state"]["mean"]) == 3 + 4 + 3  # flow, context, memory
