"""Work that keeps behind a device: in order, bounded, its errors are not lost, and an evaluation's figures stay."""

import threading
from functools import partial

import pytest
import torch

import test
from default import EvalConfig
from test import evaluate
from tests.test_training import Rows, small_detector
from utils.run.behind import MOST, behind

CPU, OTHER = torch.device("cpu"), torch.device("meta")  # the latter stands for a device that computes by itself


@pytest.mark.parametrize("device", [CPU, OTHER])
def test_calls_are_made_one_after_the_other(device: torch.device) -> None:
    done: list[int] = []
    with behind(device) as later:
        for number in range(50):
            later(partial(done.append, number))
    assert done == list(range(50))


def test_the_caller_goes_on_but_not_too_far() -> None:
    gate, done, begun = threading.Event(), list[int](), list[int]()

    def slow(number: int) -> None:
        gate.wait(20)
        done.append(number)

    def calls() -> None:
        with behind(OTHER) as later:
            for number in range(5):
                later(partial(slow, number))
                begun.append(number)

    caller = threading.Thread(target=calls)
    caller.start()
    caller.join(0.5)
    assert begun == list(range(MOST)) and not done
    gate.set()
    caller.join(20)
    assert done == list(range(5))


@pytest.mark.parametrize("device", [CPU, OTHER])
@pytest.mark.parametrize("after", [0, 5])
def test_an_error_is_raised_in_the_caller(device: torch.device, after: int) -> None:
    with pytest.raises(ZeroDivisionError), behind(device) as later:
        later(lambda: 1 // 0)  # type: ignore[arg-type, return-value]
        for _ in range(after):
            later(lambda: None)


def test_an_evaluation_finds_the_same_behind_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    detector, config = small_detector().eval(), EvalConfig(image_score="likelihood", top_k=0.1)
    first = evaluate(detector, Rows()(), ["a", "b"], config)
    monkeypatch.setattr(test, "behind", lambda device: behind(OTHER))
    second = evaluate(detector, Rows()(), ["a", "b"], config)
    assert second.classes == first.classes and second.images == first.images
