"""--conditioning auto: measured on a copy, decided before training, said."""

import re
from pathlib import Path

import pytest
import torch
from test_condition import CHANNELS, build

from fake_data import METHOD, TINY, make_mvtec
from main import main
from models.form import quicker_form

LINE = r"--conditioning auto: (structured|direct) \(structured (\S+) s a step, direct (\S+) s\)"


def decided(text: str) -> str:
    """The form of the line, which must be the one that took less time."""
    (found,) = re.findall(LINE, text)
    form, structured, direct = found
    assert float(structured) > 0 and float(direct) > 0
    assert form == ("direct" if float(direct) < float(structured) else "structured") or structured == direct
    return form


def test_the_measurement_leaves_no_trace() -> None:
    flow = build("structured", "residual", True, torch.float32)
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    levels = [torch.rand(2, c, side, side) for c, side in zip(CHANNELS, (16, 8, 4, 2), strict=True)]
    random = torch.get_rng_state()
    direct, line = quicker_form(flow, flow.keep(levels), amp=False)
    assert decided(line) == ("direct" if direct else "structured")
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert flow.training and not flow.hierarchy.direct and all(p.grad is None for p in flow.parameters())


@pytest.mark.parametrize("more", [[], ["--deterministic"]])
def test_a_training_says_what_it_found(more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset", "folder", "--data-path", str(make_mvtec(tmp_path / "data", ("bottle",))), "--no-report"]
    small = ["--extractor", "test_efficientnet", "--no-pretrained", "--work-dir", str(tmp_path / "runs")]
    assert main([*TINY, *METHOD, *words, *small, "--conditioning", "auto", *more]) == 0
    text = capsys.readouterr().out
    assert "--conditioning" not in text if more else decided(text)
