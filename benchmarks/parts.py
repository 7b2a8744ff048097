"""How fast single parts are in their plain and in their quick form, in turn in one process.

    python -m benchmarks.parts extractor --name convnextv2_base --side 384 --batch 4
    python -m benchmarks.parts convolution --shape 48 1152 128 --batch 4

One thread, processor time, the smallest of the rounds, random weights and inputs.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from models.extractor import FrozenExtractor
from models.winograd import Winograd, transposed, weight_gradient

Work = Callable[[], object]


def compare(name: str, plain: Work, quick: Work, rounds: int) -> None:
    """Prints a row of milliseconds."""
    seconds: dict[Work, list[float]] = {plain: [], quick: []}
    for _ in range(rounds + 1):  # the first one warms up
        for work, found in seconds.items():
            began = time.process_time()
            work()
            found.append(time.process_time() - began)
    a, b = (1e3 * min(found[1:]) for found in seconds.values())
    print(f"| {name} | {a:.4g} | {b:.4g} | {a / b:.2f} |", flush=True)


def extractor(args: argparse.Namespace) -> None:
    plain = FrozenExtractor(args.name, input_size=args.side, pretrained=False)
    quick = copy.deepcopy(plain).quicken(args.side)
    image = torch.rand(args.batch, 3, args.side, args.side).contiguous(memory_format=torch.channels_last)
    for net in (plain, quick):
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compare(f"{args.name}, {args.side}, batch {args.batch}", lambda: plain(image), lambda: quick(image), args.rounds)


def convolution(args: argparse.Namespace) -> None:
    side, channels, out = args.shape
    x, weight, grad = (
        torch.randn(*shape).contiguous(memory_format=torch.channels_last)
        for shape in ((args.batch, channels, side, side), (out, channels, 3, 3), (args.batch, out, side, side))
    )
    works: dict[str, tuple[Work, Work]] = {
        "forward": (lambda: F.conv2d(x, weight, padding=1), lambda: Winograd.apply(x, weight, None)),
        "input's gradient": (
            lambda: F.conv_transpose2d(grad, weight, padding=1), lambda: transposed(grad, weight),
        ),
        "weight's gradient": (
            lambda: conv2d_weight(x, weight.shape, grad, padding=1), lambda: weight_gradient(x, grad),
        ),
    }  # fmt: skip
    for name, (plain, quick) in works.items():
        compare(f"{side}², {channels} to {out}, {name}", plain, quick, args.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("extractor", "convolution"))
    parser.add_argument("--name", default="convnextv2_base")
    parser.add_argument("--side", type=int, default=384)
    parser.add_argument("--shape", type=int, nargs=3, default=(48, 1152, 128), metavar=("SIDE", "IN", "OUT"))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("| part | plain, ms | quick, ms | times |\n|---|---|---|---|")
    with torch.no_grad():
        {"extractor": extractor, "convolution": convolution}[args.part](args)


if __name__ == "__main__":
    main()
