"""How far a pass is: plain lines, few of them, with the time that is left."""

import io
import sys
import time
from collections.abc import Iterator

import pytest

from utils.run.progress import progress, remaining


class Clock:
    """A clock that moves with the items."""

    def __init__(self) -> None:
        self.now = 100.0

    def items(self, count: int, seconds: float) -> Iterator[int]:
        for number in range(count):
            self.now += seconds
            yield number


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    return made


def test_a_long_pass_says_every_tenth(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(clock.items(100, 2.0), total=100, text="prediction", unit="images")) == list(range(100))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert lines[0] == "prediction: 10 of 100 images, 0.5 images/s, 3 min left"
    assert lines[-1] == "prediction: 90 of 100 images, 0.5 images/s, 20 s left"


def test_a_short_pass_says_nothing_and_a_slow_one_every_minute(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(list(progress(clock.items(50, 0.1), total=50, text="evaluation"))) == 50
    assert capsys.readouterr().err == ""
    list(progress(clock.items(100, 20.0), total=10_000, text="evaluation"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 33
    assert lines[0] == "evaluation: 3 of 10000 batches, 0.05 batches/s, 55.5 h left"


def test_a_part_of_a_run_tells_what_is_left_of_the_whole(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    list(progress(clock.items(20, 1.0), total=20, text="sub epoch 1/3", more=2))
    assert capsys.readouterr().err.splitlines() == [
        "sub epoch 1/3: 10 of 20 batches, 1 batches/s, 50 s of the run left"
    ]


def test_a_terminal_has_a_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(progress(range(5), total=5, text="sub epoch 1/2", more=1)) == [0, 1, 2, 3, 4]
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "sub epoch 1/2" in shown
    assert shown.rsplit("\r", 1)[0].split("\r")[-1].strip() == ""


@pytest.mark.parametrize(("seconds", "text"), [(99, "99 s"), (600, "10 min"), (9000, "2.5 h")])
def test_times_as_people_say_them(clock: Clock, seconds: int, text: str) -> None:
    assert remaining(clock.now - 1, 1, seconds + 1, 0) == text
