"""Flow and scorer together: features of images in, what they say of the images out. The one scoring path."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from default import EvalConfig
from models.decision import Calibrated, Decision, Verdict, scoring_of
from models.scorer import ScoreMaps, Scorer, Units, image_scores
from models.vqflow import VQFlow, VQFlowOutput
from utils.run.device import autocast
from utils.run.distributed import interleaved, summed

Row = tuple[float, float, int]  # of a calibration image: score, the map's peak, concept


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What is said of a batch: the flow's `output`, and `maps` at one size."""

    output: VQFlowOutput
    maps: ScoreMaps


class Detector(nn.Module):
    """All that judges an image, without the extractor; `decision` is None until there are calibrated thresholds.

    Args:
        flow: trained, or about to be.
        scorer: its units and its memory.
        size: side of score maps.
        amp: bfloat16 where the device has units for it.
    """

    def __init__(self, flow: VQFlow, scorer: Scorer, *, size: int, amp: bool = False) -> None:
        super().__init__()
        self.flow, self.scorer, self.size, self.amp = flow, scorer, size, amp
        self.decision: Decision | None = None

    @torch.no_grad()
    def judge(self, kept: Sequence[Tensor], *, own: bool = True) -> Judgement:
        """Features as `VQFlow.keep` gives them -> `Judgement`; put it into eval mode first.

        Without `own` an image's own features in the memory do not count (see `Memory.forward`).
        """
        with autocast(kept[0].device, self.amp):
            output = self.flow(kept)
        opinions = partial(self._opinions, output, kept, own)
        maps = ScoreMaps(output.latents, self.size, output.local_log_det, opinions, self.scorer.rule)
        return Judgement(output=output, maps=maps)

    @torch.no_grad()
    def _opinions(self, output: VQFlowOutput, kept: Sequence[Tensor], own: bool) -> list[Tensor]:
        with autocast(kept[0].device, self.amp):
            return self.scorer.opinions(output, self.flow.standardize(kept), own=own)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Sequence[Tensor]], *, own: bool = True) -> float:
        """Learn from batches of kept features of normal images, unseen ones at best, what opinions are usual.

        Without `own` they are images that the memory holds, which they must not meet in it. Of several processes each
        passes its share.

        Returns their mean negative log-likelihood per dimension, in nats, without the constant 1/2 ln(2 pi).
        """
        units, nll = Units(len(self.scorer.weights)), []
        for kept, output in self._looked_at(batches):
            with autocast(kept[0].device, self.amp):
                units.add(self.scorer.raw_opinions(output, self.flow.standardize(kept), own=own))
            nll.append(output.nll_per_dim.tolist())
        units.images = int(summed(torch.tensor(units.images)))
        units.sums, units.squares, units.counts = map(summed, (units.sums, units.squares, units.counts))
        self.scorer.set_units(units)
        return mean(interleaved(nll))

    def decide(self, judgement: Judgement, scores: Tensor) -> Verdict:
        """What follows from image scores (B,) of a batch; there must be a `decision`."""
        assert self.decision is not None
        return self.decision(scores, judgement.output.concept)

    @torch.no_grad()
    def learn_decision(
        self, batches: Iterable[Sequence[Tensor]], config: EvalConfig, *, own: bool = True, unseen: bool = True,
        images: Sequence[int] | None = None,
    ) -> None:  # fmt: skip
        """Thresholds from batches of kept features of normal images, after `calibrate`, of other images than that saw.

        Args:
            config: which scores, and the false-alarm rate.
            own: as in `calibrate`.
            unseen: nothing was fitted to the images.
            images: the image that each row belongs to, where rows are tiles: the tile with the highest score counts.
        """
        was_training = self.training
        self.eval()
        found: list[list[Row]] = []
        for kept in batches:
            judgement = self.judge(kept, own=own)
            scores = image_scores(getattr(judgement.maps, config.image_score), config.top_k).tolist()
            peaks = getattr(judgement.maps, config.shown_score).amax((1, 2)).tolist()
            concept = judgement.output.concept
            concepts = [-1] * len(scores) if concept is None else concept.tolist()
            found.append(list(zip(scores, peaks, concepts, strict=True)))
        self.train(was_training)
        rows = interleaved(found)
        if images is not None:
            rows = [worst([rows[n] for n in group]) for group in groups_of(images)]
        calibrated = Calibrated(
            scores=tuple(s for s, _, _ in rows), peaks=tuple(p for _, p, _ in rows),
            concepts=tuple(c for _, _, c in rows), unseen=unseen,
            scoring=scoring_of(config, self.size),
        )  # fmt: skip
        self.decision = Decision(calibrated, config.false_alarm_rate).to(self.scorer.mean.device) if rows else None

    @torch.no_grad()
    def nll_per_dim(self, batches: Iterable[Sequence[Tensor]]) -> float:
        """Mean negative log-likelihood per dimension of images, as `calibrate` returns it: in eval mode, no noise."""
        nll = [output.nll_per_dim.tolist() for _, output in self._looked_at(batches)]
        return mean(interleaved(nll))

    def _looked_at(self, batches: Iterable[Sequence[Tensor]]) -> Iterator[tuple[Sequence[Tensor], VQFlowOutput]]:
        """Each batch with the flow's output in eval mode; afterwards the mode is as it was."""
        was_training = self.training
        self.eval()
        for kept in batches:
            with autocast(kept[0].device, self.amp):
                output = self.flow(kept)
            yield kept, output
        self.train(was_training)


def worst(rows: Sequence[Row]) -> Row:
    """Of an image's tiles: score and concept of that with the highest score, and the highest peak of all."""
    score, _, concept = max(rows, key=lambda row: row[0])
    return score, max(peak for _, peak, _ in rows), concept


def groups_of(owners: Sequence[int]) -> list[list[int]]:
    """The rows that belong to each image, by the images that rows belong to."""
    rows: dict[int, list[int]] = {}
    for row, owner in enumerate(owners):
        rows.setdefault(owner, []).append(row)
    return list(rows.values())


def mean(values: Sequence[float]) -> float:
    """In double precision."""
    return float(torch.tensor(values, dtype=torch.float64).mean())
