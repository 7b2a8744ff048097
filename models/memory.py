"""A memory of normal features: how far a place is from the nearest one among images that look alike.

A second opinion beside the flow. A flow tells how likely a feature is under a smooth density; a memory tells whether
anything like it was ever seen. Their mistakes differ (EXPERIMENTS.md). Distances to stored normal features are
PatchCore's idea (arXiv 2106.08265, section 3), searching the most similar images only is SPADE's (arXiv 2005.02357,
section 3). No class label is needed for it: an image of another product is seldom among the most similar ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.run.device import exact_products, product_dtype

ROOM = 0.5  # of a device's free memory that vectors may take there
AT_ONCE = {"cpu": 1 << 10}  # descriptors compared at a time, in single precision: on a CPU they stay in its cache
MOST_AT_ONCE = 1 << 16  # elsewhere
ROWS = 256  # stored vectors compared at a time on a CPU: the products of more do not stay in its cache
SAME = 0.01  # of a descriptor's norm: closer to a stored one than this is the same image
RAMP = 0.05  # a place that is farther by this share than those that are searched no more is searched for its full worth


@dataclass(frozen=True, kw_only=True)
class View:
    """Two neighbouring levels on the grid of the finer one, `places` of them kept from each image, and how much the
    distances count beside other opinions (`weight`)."""

    levels: tuple[int, int]
    places: int
    weight: float


class Memory(nn.Module):
    """Vectors from random places of normal images, and a descriptor of each image: the mean of its top level.

    A vector holds the standardized features of a view's two levels, each averaged over its 3x3 neighbourhood. Buffers,
    in half precision: `descriptors` (N, C_3) and `vectors_v` (N, places, C_a + C_b) of N images.

    Args:
        channels: channels of the four levels.
        views: what is looked at.
        search: how many images, those most like an image first, it is compared with in each round; in each round with
            half as many of its places as before, those that are still the farthest from all that was found.

    Vectors may stay in main memory (`place`; auto: if they take more than `ROOM` of a GPU): of a million images only
    those that are searched are sent to the device, for each image that is judged. The descriptors, some thousandths of
    it all, say which, and lie on the device.
    """

    def __init__(self, *, channels: Sequence[int], views: Sequence[View], search: Sequence[int]) -> None:
        super().__init__()
        self.views, self.search, self.place = tuple(views), tuple(search), "auto"
        self.descriptors: Tensor
        self.register_buffer("descriptors", torch.zeros(0, channels[-1], dtype=torch.float16))
        for v, view in enumerate(self.views):
            width = sum(channels[level] for level in view.levels)
            self.register_buffer(f"vectors_{v}", torch.zeros(0, 0, width, dtype=torch.float16))

    def stays(self, size: int, device: torch.device) -> bool:
        """Whether vectors of so many bytes stay in main memory when all else goes to a device."""
        if self.place == "auto" and device.type == "cuda":
            return size > ROOM * torch.cuda.mem_get_info(device)[0]
        return self.place == "host"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Memory:
        """What moves a module to a device."""
        names = [f"vectors_{v}" for v in range(len(self.views))]
        size, device = sum(self.get_buffer(name).nbytes for name in names), fn(torch.zeros(0)).device
        staying = {n: self._buffers.pop(n) for n in names} if self.stays(size, device) else {}
        super()._apply(fn, recurse)
        self._buffers.update(staying)
        return self

    def make_room(self, state: dict[str, Tensor]) -> None:
        """Take on the number of images and places that the buffers in `state` (names as in `state_dict`) have."""
        for name, own in self.named_buffers():
            if name in state and state[name].ndim == own.ndim:
                setattr(self, name, own.new_zeros(*state[name].shape[:-1], own.shape[-1]))

    @staticmethod
    def embed(features: Sequence[Tensor], view: View) -> Tensor:
        """Features (B, c_l, H_l, W_l) of all levels -> a view's vectors (B, H W, C), row by row; linear in them."""
        grid = features[view.levels[0]].shape[-2:]
        local = [F.avg_pool2d(features[level].float(), 3, 1, 1) for level in view.levels]
        same = [h if h.shape[-2:] == grid else F.interpolate(h, size=grid, mode="bilinear") for h in local]
        return torch.cat(same, 1).flatten(2).transpose(1, 2)

    @torch.no_grad()
    def forward(self, features: Sequence[Tensor], *, own: bool = True) -> list[Tensor]:
        """Euclidean distance to the nearest vector that is found (see `search`) in the images most like each image.

        One map (B, H, W) per view, on the grid of its finer level. Without `own` an image's own vectors are left out,
        if it is one of those remembered: a stored image is at no distance from itself, a new one always is. With
        autocast places are compared in its precision (see `nearest`).
        """
        top = features[-1].float()
        dtype = product_dtype(top)
        with exact_products(top.device):
            near = self._most_alike(top.mean((2, 3)), own)
            found = [self._distances(features, v, near, dtype) for v in range(len(self.views))]
        return found

    def _most_alike(self, descriptor: Tensor, own: bool) -> Tensor:
        """Numbers of the stored images most like each one of `descriptor` (B, C_3): (B, at most sum(search))."""
        known = self.descriptors.split(AT_ONCE.get(descriptor.device.type, MOST_AT_ONCE))
        gaps = torch.cat([squared(descriptor, part.float()) for part in known], 1)
        if not own:
            closest = gaps.argmin(1)
            gone = (descriptor - self.descriptors[closest].float()).norm(dim=1) < SAME * descriptor.norm(dim=1)
            gaps[gone.nonzero().flatten(), closest[gone]] = torch.inf
        gap, near = gaps.topk(min(sum(self.search), len(self.descriptors)), largest=False)
        return near if own else torch.where(gap.isinf(), near[:, :1], near)  # another one in its place

    def _distances(self, features: Sequence[Tensor], v: int, near: Tensor, dtype: torch.dtype) -> Tensor:
        """A view's map (B, H, W) of distances to the vectors of the images `near` (B, M), compared in `dtype`."""
        view, vectors = self.views[v], getattr(self, f"vectors_{v}")
        places = self.embed(features, view).to(dtype)
        if torch.compiler.is_exporting():  # a traced batch has no length yet
            distance = nearest_in_rounds(places, self._rounds(vectors, near))
        else:
            pairs = zip(places.split(1), near.split(1), strict=True)
            distance = torch.cat([nearest_in_rounds(own, self._rounds(vectors, rows)) for own, rows in pairs])
        return distance.unflatten(1, features[view.levels[0]].shape[-2:])

    def _rounds(self, vectors: Tensor, near: Tensor) -> Iterator[Tensor]:
        """The vectors (B, R, C) of the images `near` (B, M), one round of the search after the other."""
        start = 0
        for count in self.search:
            if start < near.shape[1]:
                yield looked_up(vectors, near[:, start : start + count]).flatten(1, 2)
            start += count


class Choice:
    """Which of `images` images that come one after the other are among `size` random ones, or all of them."""

    def __init__(self, *, images: int, size: int) -> None:
        self.chosen, self.seen = torch.zeros(images, dtype=torch.bool), 0
        self.chosen[torch.randperm(images)[:size]] = True

    def rows(self, batch: Tensor) -> Tensor:
        """Numbers of the chosen ones among the next len(batch) images, on the device of `batch`."""
        part = self.chosen[self.seen : self.seen + len(batch)]
        self.seen += len(batch)
        return part.nonzero().flatten().to(batch.device)


class Remembering:
    """Fills a memory in one pass over the images, before their channel statistics are known.

    `Memory.embed` is linear, so that what it makes of features as they are is standardized afterwards. Where vectors
    will stay in main memory they are gathered there.

    Args:
        images: how many will come.
        size: how many of them, chosen at random, are remembered.
    """

    def __init__(self, memory: Memory, *, images: int, size: int) -> None:
        self.memory, self.choice, self.size = memory, Choice(images=images, size=size), min(size, images)
        self.place: torch.device | None = None
        self.coverage: list[Tensor] = []
        self.descriptors: list[Tensor] = []
        self.vectors: list[list[tuple[Tensor, Tensor]]] = [[] for _ in memory.views]  # place numbers, vectors

    @torch.no_grad()
    def add(self, features: Sequence[Tensor]) -> None:
        """The next images' features (B, c_l, H_l, W_l), not standardized."""
        rows = self.choice.rows(features[0])
        if not len(rows):
            return
        picked = [h[rows].float() for h in features]
        self.coverage = self.coverage or self._coverage(picked)
        self.place = self.place or self._place(picked)
        self.descriptors.append(picked[-1].mean((2, 3)))
        for v, view in enumerate(self.memory.views):
            for vectors in self.memory.embed(picked, view):
                order = torch.randperm(len(vectors))[: view.places]
                self.vectors[v].append((order, vectors[order.to(vectors.device)].to(self.place)))

    def _place(self, features: Sequence[Tensor]) -> torch.device:
        """Where vectors are gathered, in single precision."""
        device, rows = features[0].device, zip(self.memory.views, self.coverage, strict=True)
        widths = [sum(features[level].shape[1] for level in view.levels) for view in self.memory.views]
        places = [min(view.places, len(coverage)) for view, coverage in rows]
        size = 4 * self.size * sum(w * n for w, n in zip(widths, places, strict=True))
        return torch.device("cpu") if self.memory.stays(size, device) else device

    def _coverage(self, features: Sequence[Tensor]) -> list[Tensor]:
        """What a view makes of ones in its two levels, (H W, 2): less than one at the border."""
        ones = [torch.ones_like(h[:1, :1]) for h in features]
        return [self.memory.embed(ones, view)[0] for view in self.memory.views]

    @torch.no_grad()
    def finish(self, means: Sequence[Tensor], stds: Sequence[Tensor]) -> None:
        """Give the memory what was gathered, standardized by each level's statistics (c_l,)."""
        self.memory.descriptors = ((torch.cat(self.descriptors) - means[-1]) / stds[-1]).half()
        for v, view in enumerate(self.memory.views):
            a, b = view.levels
            shift, scale = torch.stack([spread(means, a, b, 0), spread(means, a, b, 1)]), torch.cat([stds[a], stds[b]])
            gathered, self.vectors[v] = self.vectors[v], []
            stored = gathered[0][1].new_empty(len(gathered), *gathered[0][1].shape, dtype=torch.float16)
            for row, (order, x) in enumerate(gathered):
                stored[row] = (x.to(scale.device) - self.coverage[v][order.to(scale.device)] @ shift) / scale
            setattr(self.memory, f"vectors_{v}", stored)


def squared(descriptor: Tensor, known: Tensor) -> Tensor:
    """Squared distances (B, N) of `descriptor` (B, C) to `known` (N, C), up to a constant of each row."""
    return known.square().sum(1) - 2 * descriptor @ known.T


def looked_up(vectors: Tensor, rows: Tensor) -> Tensor:
    """Some rows of vectors that may lie elsewhere, where `rows` lies."""
    return vectors[rows.to(vectors.device)].to(rows.device)


def spread(values: Sequence[Tensor], a: int, b: int, part: int) -> Tensor:
    """Channels of the levels a and b, one after the other, with zeros in place of the other part's."""
    kept = [values[a], torch.zeros_like(values[b])] if part == 0 else [torch.zeros_like(values[a]), values[b]]
    return torch.cat(kept)


def nearest_in_rounds(places: Tensor, rounds: Iterable[Tensor]) -> Tensor:
    """Distance (B, L) of `places` (B, L, C) to the nearest vectors in some `rounds` of them, (B, R, C) each.

    All places are compared with the first round's vectors, and in each later round those that are farthest until then,
    half as many as in the round before. So a map's high places, which scores are made of, end with the distance to the
    nearest of all, and the others with no less. A place that is hardly among the farthest gets but a part of what a
    round brings (`RAMP`): distances are continuous in the places, and engines that round in other ways agree.
    """
    found: Tensor | None = None
    for number, vectors in enumerate(rounds):
        if found is None:
            found = nearest(places, vectors)
            continue
        far, where = found.topk((places.shape[1] >> number) + 1, dim=1)
        own = places.gather(1, where[:, :, None].expand(-1, -1, places.shape[2]))
        limit = far[:, -1:]
        part = ((far - limit) / (RAMP * limit).clamp(min=1e-6)).clamp(max=1)
        found = found.scatter(1, where, far - part * (far - nearest(own, vectors)).clamp(min=0))
    assert found is not None
    return found


def nearest(places: Tensor, vectors: Tensor) -> Tensor:
    """Euclidean distance of `places` (B, L, C) to the nearest of `vectors` (B, R, C), (B, L), in single precision.

    Products of bfloat16 places are computed in bfloat16, of both as they are rounded to it (see `joined_norms`).
    """
    at_once = ROWS if places.device.type == "cpu" else vectors.shape[1]
    if places.dtype == torch.bfloat16:
        mine, theirs = joined_norms(places), joined_norms(vectors.to(places.dtype), of_vectors=True)
        gap = reduce(torch.minimum, [rounded_gap(mine, part) for part in theirs.split(at_once, 1)])
    else:
        gap = reduce(torch.minimum, [exact_gap(places, part.float()) for part in vectors.split(at_once, 1)])
        gap = gap + places.square().sum(2)
    return gap.float().clamp(min=0).sqrt()


def exact_gap(places: Tensor, vectors: Tensor) -> Tensor:
    """The least squared distance (B, L) of `places` (B, L, C) to `vectors` (B, R, C), without the places' norms."""
    norms = vectors.square().sum(2)[:, None]
    return torch.baddbmm(norms, places, vectors.transpose(1, 2), alpha=-2).amin(2)


def rounded_gap(places: Tensor, vectors: Tensor) -> Tensor:
    """The least squared distance (B, L) in bfloat16, both with their norms (see `joined_norms`).

    The bits of numbers that are not negative are integers of the same order, whose least one a CPU finds nine times as
    fast; of negative ones, which rounding makes of 0, it finds any.
    """
    gap = torch.bmm(places, vectors.transpose(1, 2))
    return gap.view(torch.int16).amin(2).view(gap.dtype)


def joined_norms(x: Tensor, *, of_vectors: bool = False) -> Tensor:
    """bfloat16 (B, N, C) -> (B, N, C + 4), so that the product of a place's row with a vector's is their squared
    distance: added up in single precision and rounded once, to 0.4 %, and not a difference of rounded numbers.

    A norm is the sum of two numbers that are rounded to bfloat16.
    """
    norm = x.float().square().sum(2, keepdim=True)
    high = norm.to(x.dtype)
    norms, ones = [high, (norm - high.float()).to(x.dtype)], [torch.ones_like(high)] * 2
    return torch.cat([-2 * x, *ones, *norms] if of_vectors else [x, *norms, *ones], 2)
