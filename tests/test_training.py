"""What feeds what: who is trained on, who calibrates, which map each metric is made of, what is logged and kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datasets import build_datasets, split_holdout
from datasets.features import FeatureBatch
from default import Config, EvalConfig, TrainConfig, from_dict, make_config
from fake_data import METHOD, TINY, make_mvtec
from main import main
from models.decision import split_in_two
from models.detector import Detector
from models.first_look import first_look
from models.loss import loss_terms
from models.scorer import Scorer, ScoreRule, image_scores
from models.vqflow import VQFlow
from show import look_at
from stage import Stage, load_detector
from steps import train_epoch
from supply import Supply
from test import evaluate
from tests.test_vqflow import CHANNELS, build
from trainer import Trainer
from utils.metrics import evaluate_maps
from utils.run.checkpoint import read_checkpoint
from utils.run.log import RunLog, read_lines
from utils.run.upgrade import OLD

FLAGS = [
    *TINY, *METHOD, "--class-names", "bottle", "grid", "--noise", "0.3", "--memory", "100", "--holdout", "0.3",
    "--image-score", "surprise", "--eval-size", "40", "--no-report", "--pictures", "0",
]  # fmt: skip


def only(work: Path) -> Path:
    return next(p for p in work.iterdir() if p.name != "cache")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mvtec(tmp_path_factory.mktemp("tree"), train=7)


@pytest.fixture(scope="module")
def folder(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training with held-out images and a memory."""
    work = tmp_path_factory.mktemp("work")
    assert main([*FLAGS, "--dataset", "mvtec", "--data-path", str(tree), "--work-dir", str(work)]) == 0
    return only(work)


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Stage, Detector]:
    content = read_checkpoint(folder / "last.pt")
    stage = Stage(from_dict(content["config"]))
    return stage, load_detector(content, stage, "last.pt")


def splits(config: Config) -> tuple[Any, Any, Any]:
    train, test = build_datasets(config.data, ("bottle", "grid"), config.score_size)
    return *split_holdout(train, config.data.holdout), test


def features_of(stage: Stage, dataset: Any, numbers: list[int] | None = None) -> list[list[torch.Tensor]]:
    return [batch.features for batch in stage.ordered_features(dataset, numbers).epoch(0)]


# --- who is trained on, and who calibrates

UNITS = split_in_two([0, 0, 1, 1])[0]  # of the four held-out images


def test_held_out_images_are_neither_trained_on_nor_remembered(folder: Path, trained: tuple[Stage, Detector]) -> None:
    stage, detector = trained
    kept, held, _ = splits(stage.config)
    assert (len(kept), len(held)) == (10, 4)
    assert read_lines(folder / "metrics.jsonl")[0]["train"]["images"] == 8, "two batches of the ten that are kept"
    memory = detector.scorer.memory
    assert memory is not None and len(memory.descriptors) == 10
    for dataset, near in ((kept, True), (held, False)):
        for features in features_of(stage, dataset):
            means = detector.flow.standardize(features)[-1].mean((2, 3))
            gap = torch.cdist(means, memory.descriptors.float()).amin(1) / means.norm(dim=1)
            assert ((gap < 0.01) == near).all()


def test_units_and_thresholds_come_from_different_held_out_images(
    folder: Path, trained: tuple[Stage, Detector]
) -> None:
    stage, detector = trained
    held = splits(stage.config)[1]
    units, deciding = split_in_two([item.class_index for item in held.items])
    assert len(units) == len(deciding) == 2
    (kept,), decision = features_of(stage, held, deciding), detector.decision
    assert decision is not None and decision.calibrated.unseen
    maps = detector.judge(kept).maps
    scores = image_scores(maps.surprise, stage.config.eval.top_k)
    np.testing.assert_allclose(sorted(decision.calibrated.scores), sorted(scores), rtol=1e-4)
    np.testing.assert_allclose(sorted(decision.calibrated.peaks), sorted(maps.surprise.amax((1, 2))), rtol=1e-4)
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))["decision"]
    assert found["threshold"] == pytest.approx(float(decision.thresholds[0]))
    assert (found["calibration_images"], found["false_alarms"]["of"], found["found"]["of"]) == (2, 6, 12)
    features = features_of(stage, held, units)
    assert int(detector.scorer.calibrated) == 2
    said = [detector.scorer.raw_opinions(detector.judge(f).output, detector.flow.standardize(f)) for f in features]
    for i, own in enumerate(zip(*said, strict=True)):
        values = torch.cat([v.flatten() for v in own]).double()
        torch.testing.assert_close(detector.scorer.mean[i].double(), values.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(detector.scorer.std[i].double(), values.std(unbiased=False), rtol=1e-4, atol=1e-5)


def test_logged_likelihoods_are_those_of_eval_mode_without_noise(folder: Path, trained: tuple[Stage, Detector]) -> None:
    stage, detector = trained
    entry = read_lines(folder / "metrics.jsonl")[-1]
    kept, held, _ = splits(stage.config)
    for kind, dataset, numbers in (("train", kept, None), ("held_out", held, UNITS)):
        outputs = [detector.judge(f).output for f in features_of(stage, dataset, numbers)]
        nats = torch.cat([o.nll.double() / o.dims for o in outputs]).mean() + 0.5 * np.log(2 * np.pi)
        assert entry["bits_per_dim"][kind] == pytest.approx(float(nats) / np.log(2), rel=1e-4)


class Rows:
    """Random features as training data: `count` images in batches of four."""

    def __init__(self, count: int = 8) -> None:
        torch.manual_seed(5)
        self.levels = [torch.randn(count, c, 32 // s, 32 // s) for c, s in zip(CHANNELS, (2, 4, 8, 8), strict=True)]

    def __call__(self, *_: int) -> Iterator[FeatureBatch]:
        for rows in torch.arange(len(self.levels[0])).split(4):
            masks = torch.zeros(len(rows), 16, 16, dtype=torch.bool)
            masks[rows % 2 == 1, 4:9, 4:9] = True
            yield FeatureBatch(
                features=[h[rows] for h in self.levels], mask=masks, label=rows % 2, class_index=rows // 4,
                path=tuple(f"{int(i)}.png" for i in rows),
            )  # fmt: skip


def small_detector(**options: object) -> Detector:
    flow = build(concat_pos=True, mixed_gaussian=True, pool_type="none", **options)
    return Detector(flow, Scorer(channels=CHANNELS, memory=bool(options.get("memory"))), size=16)


@pytest.mark.parametrize("held_out", [True, False])
@pytest.mark.parametrize("memory", [0, 8])
def test_every_checkpoint_is_calibrated(tmp_path: Path, held_out: bool, memory: int) -> None:
    """Also those of epochs without an evaluation, and those without --holdout."""
    config = make_config(
        meta_epochs=3, sub_epochs=1, eval_interval=3, batch_size=4, memory=memory, holdout=0.2 * held_out,
        pool_type="none", quantize_enable=True,
    )  # fmt: skip
    rows, evaluated, detector = Rows(), [], small_detector(memory=memory)
    supply = Supply(
        training=rows,
        batches=2,
        everything=rows,
        images=8,
        sample=rows,
        units=Rows(4) if held_out else None,
        deciding=Rows(8) if held_out else None,
    )
    trainer = Trainer(
        config, detector, supply=supply, evaluate=evaluated.append, folder=tmp_path, identity={}  # type: ignore[arg-type]
    )  # fmt: skip
    log = RunLog(tmp_path, kept=0, config={}, tensorboard=False, wandb=False)
    if memory:
        first_look(detector, lambda: (batch.features for batch in rows()), images=8, batch_size=4)
    for epoch in range(2):
        trainer._meta_epoch(epoch, log)
        trainer.keeper.wait()
        state = read_checkpoint(tmp_path / "last.pt")["scorer"]["state"]
        assert int(state["calibrated"]) == (4 if held_out else 8)
        stored = read_checkpoint(tmp_path / "last.pt")["decision"]
        assert len(stored["scores"]) == 8 and stored["unseen"] == held_out
        assert all(torch.equal(state[k], getattr(detector.scorer, k)) for k in ("mean", "std"))
        assert not torch.equal(state["std"], torch.ones_like(state["std"]))
    assert not evaluated
    kinds = set(read_lines(tmp_path / "metrics.jsonl")[1]["bits_per_dim"])
    assert kinds == ({"train", "held_out"} if held_out else {"train"})


# --- noise


def test_noise_is_added_to_standardized_features() -> None:
    flow, batch = build(concat_pos=True).eval(), next(Rows()())
    seen: list[torch.Tensor] = []
    flow.hierarchy.register_forward_pre_hook(lambda _, args: seen.extend(args[0][:1]))
    for noise in (0.0, 0.5):
        flow(batch.features, noise=noise)
    added = seen[1] - seen[0]
    assert float(added.std()) == pytest.approx(0.5, rel=0.1)
    assert abs(float(added.mean())) < 0.05


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_training_step_adds_the_noise_that_was_asked_for(noise: float) -> None:
    def first_loss() -> float:
        flow, optimizer = small_flow()
        torch.manual_seed(3)
        config = TrainConfig(noise=noise, batch_size=4)
        return train_epoch(flow, [next(Rows()())], optimizer, config, start=0.0, step=0.5).nll

    flow, _ = small_flow()
    torch.manual_seed(3)
    expected = loss_terms(flow.train()(next(Rows()()).features, noise=noise), 1.0).nll
    assert first_loss() == pytest.approx(float(expected.detach()), rel=1e-6)


def small_flow() -> tuple[VQFlow, torch.optim.Optimizer]:
    flow = build(concat_pos=True)
    return flow, torch.optim.SGD(flow.parameters(), lr=1e-9)


# --- which map each metric is made of


@pytest.mark.parametrize(("pixel", "pro"), [("add", "mul"), ("likelihood", "add")])
def test_each_metric_is_made_of_its_own_map(pixel: str, pro: str) -> None:
    detector = small_detector().eval()
    config = EvalConfig(image_score="likelihood", pixel_score=pixel, pro_score=pro, top_k=0.1)
    found = evaluate(detector, Rows()(), ["a", "b"], config)
    for number, name in enumerate(("a", "b")):
        batch = list(Rows()())[number]
        maps = detector.judge(batch.features).maps
        scores = image_scores(maps.likelihood, 0.1)
        first, second = (evaluate_maps(batch.label, scores, batch.mask, getattr(maps, which)) for which in (pixel, pro))
        assert found.classes[name].image_auroc == pytest.approx(first.image_auroc)
        for metric in ("pixel_auroc", "pixel_ap", "pixel_f1max"):
            assert getattr(found.classes[name], metric) == pytest.approx(getattr(first, metric))
        assert found.classes[name].aupro == pytest.approx(second.aupro)
        assert first.pixel_auroc != second.pixel_auroc and first.aupro != second.aupro
        assert [i.score for i in found.images if i.class_name == name] == pytest.approx(scores.tolist())


def test_evaluation_and_pictures_show_one_score(trained: tuple[Stage, Detector]) -> None:
    """At --eval-size, which is not the size of the images."""
    stage, detector = trained
    test = splits(stage.config)[2]
    batches = stage.ordered_features(test).epoch(0)
    result = evaluate(detector, batches, ["bottle", "grid"], stage.config.eval)
    views = look_at(stage, detector, test)(range(len(test)))
    assert views.heat.shape == (len(test), 40, 40)
    np.testing.assert_allclose(views.scores, [image.score for image in result.images], rtol=1e-4)
    for number, kept in result.maps.items():
        np.testing.assert_allclose(views.heat[number], kept, rtol=2e-3, atol=1e-3)
    for image, heat, sample in zip(result.images, views.heat, test, strict=True):
        assert image.peak_value == pytest.approx(heat.max(), rel=1e-4)
        column, row = (int(share * 40) for share in image.peak)
        assert heat[row, column] == pytest.approx(heat.max(), rel=1e-4)
        assert image.hit == (bool(sample.mask[row, column]) if sample.mask.any() else None)


# --- checkpoints: constants, units, those of version 1.0


def test_a_checkpoint_keeps_the_constants_of_its_scores(folder: Path) -> None:
    content = read_checkpoint(folder / "last.pt")
    assert ScoreRule.of(content["scorer"]["rule"]) == ScoreRule()
    other = content | {"scorer": content["scorer"] | {"rule": ScoreRule(level_weight=0.9, flow_weight=3.0).plain()}}
    stage = Stage(from_dict(content["config"]))
    detector = load_detector(other, stage, "")
    assert detector.scorer.rule.level_weight == 0.9
    assert detector.scorer.weights[0] == pytest.approx(3 / 14)


def old_style(content: dict[str, Any], **units: torch.Tensor) -> dict[str, Any]:
    """The same checkpoint as version 1.0 would have written it."""
    state = dict(content["scorer"]["state"])
    del state["calibrated"]
    state = {k if k.startswith("memory.") else f"surprise_{k}": v for k, v in state.items()}
    state |= {f"surprise_{k}": v for k, v in units.items()}
    kept = {k: v for k, v in content.items() if k not in ("scorer", "normalization")}
    return kept | {"format": OLD, "model": content["model"] | state}


def test_checkpoints_of_version_1_score_as_they_did(folder: Path, tmp_path: Path) -> None:
    """With ImageNet's normalization, their own units, and a fingerprint of the weights alone."""
    content = read_checkpoint(folder / "last.pt")
    stage = Stage(from_dict(content["config"]), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    old = old_style(content) | {"extractor": stage.extractor.fingerprint(normalized=False)}
    torch.save(old, tmp_path / "old.pt")
    read = read_checkpoint(tmp_path / "old.pt")
    detector = load_detector(read, stage, "old.pt")
    scorer = content["scorer"] | {"rule": read["scorer"]["rule"]}  # its opinions count as they did
    now = load_detector(content | {"extractor": stage.fingerprint, "scorer": scorer}, stage, "new.pt")
    kept = stage.extract(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(detector.judge(kept).maps.surprise, now.judge(kept).maps.surprise)


@pytest.mark.parametrize("score", ["surprise", "contrast"])
def test_scores_without_units_are_refused(
    folder: Path, tree: Path, tmp_path: Path, score: str, capsys: pytest.CaptureFixture
) -> None:
    content = read_checkpoint(folder / "last.pt")
    bare = content["scorer"]["state"]["mean"]
    old = old_style(content, mean=torch.zeros_like(bare), std=torch.ones_like(bare))
    stage = Stage(from_dict(content["config"]))
    torch.save(old | {"extractor": stage.extractor.fingerprint(normalized=False)}, tmp_path / "bare.pt")
    asked = ["--mode", "test", "--eval_ckpt", str(tmp_path / "bare.pt"), "--work-dir", str(tmp_path / "w")]
    capsys.readouterr()
    assert main([*asked, "--image-score", "mul", "--pro-score", score]) == 2
    error = capsys.readouterr().err
    assert f"--pro-score: '{score}' is in units of normal images, which" in error and "choose from mul, add" in error


def test_the_released_objective_is_not_called_bits_per_dimension(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [*TINY, *METHOD, "--class-names", "grid", "--dataset", "mvtec", "--data-path", str(tree)]
    argv += ["--objective", "released", "--work-dir", str(tmp_path), "--no-report", "--pictures", "0"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "objective/dim" in out and "bits" not in out
    line = json.loads((only(tmp_path) / "metrics.jsonl").read_text(encoding="utf-8"))
    assert "bits_per_dim" not in json.dumps(line) and line["objective_per_dim"]["train"] > 0


def test_a_memory_of_one_image_needs_others_to_calibrate(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    argv = [*TINY, *METHOD, "--class-names", "grid", "--dataset", "mvtec", "--data-path", str(tree), "--memory", "1"]
    assert main([*argv, "--work-dir", str(tmp_path)]) == 2
    assert "--memory: an image alone cannot be compared with others" in capsys.readouterr().err


def test_verdicts_follow_the_stored_thresholds(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """At the rate that is asked for; other scores than the thresholds are of get none."""
    asked = ["--mode", "test", "--eval_ckpt", str(folder), "--no-report", "--pictures", "0", "--work-dir"]
    stored = read_checkpoint(folder / "last.pt")["decision"]
    for rate, name in (("0.4", "often"), ("0.001", "seldom")):
        assert main([*asked, str(tmp_path / name), "--false-alarm-rate", rate]) == 0
        found = json.loads((only(tmp_path / name) / "results.json").read_text(encoding="utf-8"))["decision"]
        assert found["false_alarm_rate"] == float(rate)
        assert found["threshold"] == pytest.approx(max(stored["scores"]))
    out = capsys.readouterr().out
    assert "decision at a false-alarm rate of 40.00%" in out and "guaranteed for images like the 2 normal images" in out
    assert "an estimate from the tail of 2 normal images; 999 would give a guarantee" in out
    assert main([*asked, str(tmp_path / "other"), "--image-score", "likelihood"]) == 0
    assert "its thresholds are for another image_score, shown_score than asked for; no verdicts" in (
        capsys.readouterr().out
    )
    assert "decision" not in json.loads((only(tmp_path / "other") / "results.json").read_text(encoding="utf-8"))
