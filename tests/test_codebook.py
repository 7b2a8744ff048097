"""The quantizer against brute force and an EMA computed by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.codebook import Codebook, usage_statistics


def brute_force_nearest(x: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return np.array([np.argmin([np.sum((row - code) ** 2) for code in codes]) for row in x])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 9), st.integers(0, 10**6))
def test_nearest_code_is_that_of_brute_force(rows: int, codes: int, dim: int, seed: int) -> None:
    torch.manual_seed(seed)
    book = Codebook(codes=codes, dim=dim).double().eval()
    x = torch.randn(rows, dim, dtype=torch.float64)
    out = book(x)
    assert out.indices.tolist() == brute_force_nearest(x.numpy(), book.embed.numpy()).tolist()
    torch.testing.assert_close(out.quantized, book.embed[out.indices])
    torch.testing.assert_close(out.commitment, (book.embed[out.indices] - x).square().mean())


def test_gradient_is_straight_through_plus_commitment() -> None:
    book = Codebook(codes=4, dim=3).double().eval()
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64)
    out = book(x)
    (out.quantized * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)
    x.grad = None
    book(x).commitment.backward()
    torch.testing.assert_close(x.grad, 2 * (x - book.embed[out.indices]).detach() / x.numel())


def test_ema_step_by_hand() -> None:
    book = Codebook(codes=2, dim=1, decay=0.9, eps=1e-5).double()
    book.embed.copy_(torch.tensor([[0.0], [10.0]]))
    book.embed_avg.copy_(book.embed)
    book(torch.tensor([[1.0], [2.0], [11.0]], dtype=torch.float64))
    count = [0.9 * 1 + 0.1 * 2, 0.9 * 1 + 0.1 * 1]
    total = [0.9 * 0 + 0.1 * 3, 0.9 * 10 + 0.1 * 11]
    n = sum(count)
    smooth = [(c + 1e-5) / (n + 2e-5) * n for c in count]
    expected = torch.tensor([[total[0] / smooth[0]], [total[1] / smooth[1]]], dtype=torch.float64)
    torch.testing.assert_close(book.embed, expected)
    assert book.usage.tolist() == [2, 1]


def test_released_codes_explode_and_ours_do_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8) * 0.1 + 5
    released, ours = Codebook(codes=16, dim=8, released=True), Codebook(codes=16, dim=8)
    ours.seed(x)
    for book in (released, ours):
        book(x)
    assert released.embed.norm(dim=1).max() > 1e4
    assert ours.embed.norm(dim=1).max() < 2 * x.norm(dim=1).max()


def test_dead_codes_are_revived_and_used() -> None:
    torch.manual_seed(0)
    book = Codebook(codes=8, dim=2, decay=0.9)
    book.embed[4:] = 1e3
    book.embed_avg.copy_(book.embed)
    clusters = torch.randn(8, 2) * 10
    for _ in range(300):
        book(clusters[torch.randint(8, (64,))] + 0.1 * torch.randn(64, 2))
    book.reset_usage()
    book.eval()
    indices = book(clusters.repeat_interleave(20, 0) + 0.1 * torch.randn(160, 2)).indices
    assert len(indices.unique()) >= 6
    assert book.embed.abs().max() < 100


@pytest.mark.parametrize("samples", [3, 40, 500])
def test_seeding_puts_codes_into_the_data(samples: int) -> None:
    torch.manual_seed(1)
    book = Codebook(codes=16, dim=4)
    x = torch.randn(samples, 4) + 100
    book.seed(x)
    assert torch.isfinite(book.embed).all()
    assert (book.embed - 100).abs().max() < 6
    assert len(book.embed.unique(dim=0)) > min(samples, 15)  # more codes than samples: with a little noise
    if samples == 500:
        book.eval()
        random = Codebook(codes=16, dim=4).eval()
        random.embed.copy_(x[:16])
        assert book(x).commitment < random(x).commitment


def test_few_codes_start_far_apart() -> None:
    """One of seven small groups beside a large one would hardly be drawn by a uniform choice, nor found by Lloyd."""
    torch.manual_seed(0)
    places = 1000 * torch.randn(8, 3)
    samples = torch.cat([places[:1].expand(2000, -1), places[1:].repeat_interleave(3, 0)]) + torch.randn(2021, 3)
    book = Codebook(codes=8, dim=3)
    book.seed(samples)
    assert torch.cdist(places, book.embed).amin(1).max() < 5


def test_seeding_starts_the_averages_anew() -> None:
    torch.manual_seed(0)
    book, x = Codebook(codes=4, dim=2), torch.randn(50, 2)
    book(x)
    book.seed(x)
    assert book.cluster_size.tolist() == [1, 1, 1, 1]
    assert torch.equal(book.embed_avg, book.embed)


def test_codes_are_those_that_quantized() -> None:
    """Not those after the update: what is convolved with them is what the input became."""
    torch.manual_seed(0)
    book, x = Codebook(codes=4, dim=2), torch.randn(50, 2)
    out = book(x)
    torch.testing.assert_close(out.codes[out.indices], out.quantized)
    assert not torch.equal(out.codes, book.embed)


def test_reassign_moves_unused_codes_to_the_most_used() -> None:
    torch.manual_seed(0)
    book = Codebook(codes=4, dim=2)
    book.embed.copy_(torch.tensor([[0.0, 1.0], [5.0, 5.0], [50.0, 50.0], [90.0, 90.0]]))
    book.usage.copy_(torch.tensor([10.0, 3.0, 0.0, 0.0]))
    book.cluster_size.copy_(torch.tensor([8.0, 4.0, 1.0, 1.0]))
    book.reassign()
    torch.testing.assert_close(book.embed[2], book.embed[0], atol=0.1, rtol=0)
    torch.testing.assert_close(book.embed[3], book.embed[1], atol=0.5, rtol=0)
    assert book.cluster_size.tolist() == [4, 2, 4, 2]
    torch.testing.assert_close(book.embed_avg, book.embed * book.cluster_size[:, None])


def test_usage_statistics() -> None:
    assert usage_statistics(torch.tensor([1.0, 1.0, 1.0, 1.0]))["perplexity"] == pytest.approx(4)
    assert usage_statistics(torch.tensor([7.0, 0.0, 0.0, 0.0])) == pytest.approx({"perplexity": 1.0, "used": 0.25})


def test_more_codes_than_samples_start_beside_them() -> None:
    torch.manual_seed(0)
    samples = torch.randn(7, 3) * torch.tensor([1.0, 20.0, 0.01])
    start = Codebook(codes=100, dim=3)._start(samples)
    gaps, nearest = torch.cdist(start / samples.std(0), samples / samples.std(0)).min(1)
    assert 0 < gaps.max() < 0.1, "noise of a hundredth of the spread"
    assert torch.bincount(nearest, minlength=7).min() >= 14, "each sample stands for as many codes"
    assert len(start.unique(dim=0)) == 100
