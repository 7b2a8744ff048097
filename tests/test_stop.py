"""A training that is stopped or breaks off goes on to the same bits; steps without a finite loss are left out."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datasets.features import FeatureBatch
from default import Config, UsageError, make_config
from models.detector import Detector
from models.official import load_strictly
from resume import farthest
from steps import Ledger, Tally, take_step, training_steps
from supply import Supply
from test import evaluate
from tests.test_end_to_end import same
from tests.test_training import Rows, small_detector
from trainer import Trainer
from utils.run.checkpoint import read_checkpoint
from utils.run.keeper import BEST, LAST, MIDDLE, PREVIOUS
from utils.run.log import read_lines
from utils.run.stop import Stopped, asked, heeding, held, released

IMAGES = 12  # three batches
CONFIG = make_config(
    meta_epochs=2, sub_epochs=2, batch_size=4, noise=0.3, quantize_enable=True, reassign_quantize=True, warmup=0.5,
    pool_type="none", memory=4, lr=1e-2, schedule="cosine",
)  # fmt: skip
EVENTS = 2 * (2 * 3 + 1)  # in each meta epoch six batches and an evaluation


class Feed:
    """Batches in an order of each sub epoch's own. `happen` is called before the batch or evaluation number `when`."""

    def __init__(self, when: int = -1, happen: Callable[[], None] = lambda: None) -> None:
        self.rows, self.when, self.happen, self.count = Rows(IMAGES), when, happen, 0

    def event(self) -> None:
        if self.count == self.when:
            self.happen()
        self.count += 1

    def training(self, sub: int, skipped: int) -> Iterator[FeatureBatch]:
        everything = list(self.rows())
        order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(sub)).tolist()
        for number in order[skipped:]:
            self.event()
            yield everything[number]


def trainer(folder: Path, feed: Feed, config: Config = CONFIG) -> Trainer:
    """A new one, as a new process would make it."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    detector = small_detector(memory=4)

    def evaluation(detector: Detector) -> Any:
        feed.event()
        return evaluate(detector, Rows(8)(), ["a", "b"], config.eval)

    supply = Supply(
        training=feed.training, batches=3, everything=feed.rows, images=IMAGES, sample=Rows(4), units=Rows(4),
        deciding=Rows(8),
    )  # fmt: skip
    return Trainer(config, detector, supply=supply, evaluate=evaluation, folder=folder, identity={})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    trainer(folder, Feed()).fit()
    return folder


def logged(folder: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl tells, but for seconds."""
    entries = read_lines(folder / "metrics.jsonl")
    return [entry | {"train": entry["train"] | {"seconds": 0}} for entry in entries]


def assert_equal(folder: Path, unbroken: Path) -> None:
    """All that the runs left, bit for bit."""
    for name in (LAST, PREVIOUS, BEST):
        first, second = read_checkpoint(unbroken / name), read_checkpoint(folder / name)
        assert first.keys() == second.keys()
        for part in first:
            assert part == "config" or same(first[part], second[part]), (name, part)
    assert logged(folder) == logged(unbroken)
    assert not (folder / MIDDLE).exists()


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("when", [0, 5, 6, 13])  # the short form of tests/torture.py
def test_a_stopped_run_goes_on_to_the_same_bits(when: int, unbroken: Path, tmp_path: Path) -> None:
    with heeding(), pytest.raises(Stopped) as caught:
        trainer(tmp_path, Feed(when, terminated)).fit()
    assert (caught.value.number, caught.value.status) == (signal.SIGTERM, 143)
    epoch, position = divmod(when, 7)
    assert f"{tmp_path / MIDDLE} holds the run up to here, meta epoch {epoch + 1} of 2; the same" in caught.value.text
    saved = farthest(tmp_path)
    assert saved is not None and saved.path.name == MIDDLE
    assert saved.content["decision"] is None, "it would be of other weights"
    if position < 6:
        assert f", after batch {position % 3 + 1} of its sub epoch {position // 3 + 1}" in saved.line(2) or not (
            (position + 1) % 3
        )
    else:
        assert f"goes on with meta epoch {epoch + 1} of 2, before its evaluation" in saved.line(2)
    feed = Feed()
    trainer(tmp_path, feed).fit(saved)
    assert feed.count == EVENTS - when - (position < 6), "no batch twice"
    assert_equal(tmp_path, unbroken)


def test_a_run_that_breaks_off_goes_on_from_its_last_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    config, saved = replace(CONFIG, train=replace(CONFIG.train, save_every=2)), None
    for when, events in ((4, 4), (6, 10)):  # of each process, and of the run
        with pytest.raises(ZeroDivisionError):
            trainer(tmp_path, Feed(when, broken), config).fit(saved)
        saved = farthest(tmp_path)
        assert saved is not None and saved.path.name == MIDDLE
        assert saved.done == (events > 6)
    trainer(tmp_path, Feed(), config).fit(saved)
    assert_equal(tmp_path, unbroken)


def test_a_damaged_checkpoint_leaves_the_one_before(unbroken: Path, tmp_path: Path) -> None:
    trainer(tmp_path, Feed()).fit()
    (tmp_path / LAST).write_bytes((tmp_path / LAST).read_bytes()[:1000])
    saved = farthest(tmp_path)
    assert saved is not None and saved.path.name == PREVIOUS and saved.damaged == (tmp_path / LAST,)
    assert saved.line(2).endswith("goes on with meta epoch 2 of 2; last.pt cannot be read and is now last.pt.damaged")

    def broken() -> None:
        assert (tmp_path / "last.pt.damaged").stat().st_size == 1000
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path, Feed(6, broken)).fit(saved)
    saved = farthest(tmp_path)
    assert saved is not None and saved.path.name == PREVIOUS, "it is still there"
    trainer(tmp_path, Feed()).fit(saved)
    for part in ("model", "optimizer", "random", "scorer", "best_on_test"):
        assert same(read_checkpoint(unbroken / LAST)[part], read_checkpoint(tmp_path / LAST)[part])
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError, match=r"--resume: cannot read .*last\.pt: it is truncated"):
        farthest(tmp_path)


def test_a_signal_is_noted_once_and_acted_upon_where_it_may() -> None:
    with heeding(), pytest.raises(Stopped):
        terminated()
    with heeding(), pytest.raises(Stopped) as caught, held():
        terminated()
        assert asked() == signal.SIGTERM
        with pytest.raises(Stopped) as second:
            signal.raise_signal(signal.SIGINT)
        assert second.value.status == 130, "a second one ends at once"
        with pytest.raises(Stopped), released():
            raise AssertionError("not reached")
    assert caught.value.status == 143, "the noted one ends what is held"
    assert asked() == 0


# --- losses that are no numbers


def spoiled(batch: FeatureBatch, value: float) -> FeatureBatch:
    """With a place that holds NaN or infinity."""
    features = [level.clone() for level in batch.features]
    features[1][0, 0, 0, 0] = value
    return replace(batch, features=features)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_without_a_finite_loss_changes_nothing(value: float, wait: bool) -> None:
    flow = small_detector().flow.train()
    optimizer = torch.optim.AdamW([p for p in flow.parameters() if p.requires_grad], lr=0.1, fused=True)

    def learnt(group: list[FeatureBatch]) -> bool:
        return bool(take_step(flow, group, optimizer, CONFIG.train, wait=wait).isfinite().all())

    batches = list(Rows(8)())
    assert learnt(batches[:1])
    before = {n: v.clone() for n, v in [*flow.named_parameters(), *flow.named_buffers()]}
    assert not learnt([batches[0], spoiled(batches[1], value)])
    now = dict([*flow.named_parameters(), *flow.named_buffers()])
    assert [name for name, v in before.items() if not torch.equal(v, now[name])] == []
    assert learnt(batches[1:])
    assert any(not torch.equal(v, now[name]) for name, v in before.items() if name in dict(flow.named_buffers()))


def test_dropped_steps_are_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flow, tally = small_detector().flow, Tally()
    optimizer, batches = torch.optim.SGD(flow.parameters(), lr=1e-3), list(Rows(12)())
    fed = [batches[0], spoiled(batches[1], float("nan")), batches[2]]
    ledger, found = Ledger(tally), []
    for _ in training_steps(flow, fed, optimizer, CONFIG.train, start=0.0, step=0.1, ledger=ledger):
        found += ledger.known()
    assert found == [(), batches[1].path, ()]
    assert (tally.batches, tally.counted, tally.images) == (3, 2, 8)
    nothing = asdict(Tally(batches=3).stats(0.1))
    assert nothing["loss"] != nothing["loss"] and nothing["images"] == 0

    feed = Feed()
    feed.training = lambda sub, skipped: iter([batches[0], spoiled(batches[1], float("inf")), batches[2]][skipped:])  # type: ignore[method-assign]
    result = trainer(tmp_path, feed).fit()
    assert result.last.mean.image_auroc >= 0
    for entry in read_lines(tmp_path / "metrics.jsonl"):
        assert entry["dropped"] == [list(batches[1].path)] * 2, "once in each sub epoch"
        assert entry["train"]["images"] == 8
    said = capsys.readouterr().err.splitlines()
    assert said == ["warning: a step without a finite loss was left out: 4.png, 5.png, 6.png, 7.png"] * 4


def test_a_run_without_finite_losses_stops_at_its_last_good_checkpoint(tmp_path: Path) -> None:
    feed = Feed()
    whole = feed.training
    feed.training = lambda sub, skipped: (spoiled(b, float("nan")) if sub > 1 else b for b in whole(sub, skipped))  # type: ignore[method-assign]
    config = replace(CONFIG, train=replace(CONFIG.train, max_dropped=5))
    with pytest.raises(UsageError) as caught:
        trainer(tmp_path, feed, config).fit()
    assert str(caught.value) == (
        "--lr: training diverged (5 steps in a row had no finite loss) with a learning rate of 0.01; lower it; "
        f"the last good checkpoint is {tmp_path / LAST}"
    )
    assert read_checkpoint(tmp_path / LAST)["epoch"] == 1
    load_strictly(small_detector().flow, read_checkpoint(tmp_path / LAST)["model"], "last.pt")


def test_a_model_that_is_no_more_is_neither_written_nor_read(tmp_path: Path) -> None:
    feed = Feed()
    broken = trainer(tmp_path, feed)

    def happen() -> None:
        next(broken.flow.parameters()).data.fill_(float("nan"))

    feed.when, feed.happen = 5, happen
    with pytest.raises(
        UsageError, match=r"--lr: training diverged \(\S+ is not finite\) .* there is no checkpoint yet"
    ):
        broken.fit()
    assert not list(tmp_path.glob("*.pt"))
    state = broken.flow.state_dict()
    with pytest.raises(UsageError, match=r"^c\.pt: \S+ holds NaN or infinity: the training that wrote it"):
        load_strictly(small_detector().flow, state, "c.pt")
