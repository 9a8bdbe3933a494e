"""Keyed noise: a sample's numbers are its own."""

import numpy as np
import pytest
import torch
from scipy import stats

from sdekit import Noise


@pytest.mark.parametrize("event", [(), (1,), (2, 3), (3, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_is_the_same_alone_and_in_any_batch(event, dtype):
    """PITFALL 23."""
    whole = Noise(torch.empty(6, *event, dtype=dtype), 5)
    one = Noise(torch.empty(1, *event, dtype=dtype), 5, ids=[4])
    some = Noise(torch.empty(3, *event, dtype=dtype), 5, ids=[4, 1, 0])
    for k in range(20):
        for source in (whole, one, some):
            source.enter(0.5, k / 40)
        for _ in range(3):
            z = whole.normal()
            assert torch.equal(one.normal()[0], z[4])
            assert torch.equal(some.normal(), z[[4, 1, 0]])


def test_a_draw_belongs_to_its_interval():
    """Whatever was drawn before in other intervals; forwards and backwards, and each draw within, are others."""
    like, intervals = torch.empty(3, 5), [(0.9, 0.5), (0.5, 0.1), (0.5, 0.9), (0.1, 0.1 + 1e-16)]
    first, again = Noise(like, 7), Noise(like, 7)
    found = {}
    for ends in intervals:
        first.enter(*ends)
        found[ends] = [first.normal() for _ in range(3)]
    for ends in intervals[::-1]:
        again.enter(*ends)
        assert all(torch.equal(again.normal(), z) for z in found[ends][:2])
    rows = torch.cat([z for draws in found.values() for z in draws])
    assert len(rows.unique(dim=0)) == len(rows)


def test_seeds_purposes_samples_and_draws_are_distinct():
    like = torch.empty(3, 64)
    draws = [Noise(like, seed, purpose=p).normal() for seed in (0, 1) for p in ("prior", "path", "probe")]
    source = Noise(like, 0)
    draws += [source.normal()[[1, 2, 0]], source.normal(), Noise(like, None).normal(), Noise(like, None).normal()]
    rows = torch.cat(draws)
    assert len({tuple(row.tolist()) for row in rows}) == len(rows) - 3  # the first "path" draw is there twice


def test_no_two_samples_of_a_batch_share_a_stream():
    """Not among 100,000, and not where one call draws for several of them; nor do ids wrap at 2^32."""
    x = Noise(torch.empty(100_000, 2), 1).normal()
    assert len(x.unique(dim=0)) == 100_000
    assert torch.equal(Noise(torch.empty(1, 2), 1, ids=[99_999]).normal()[0], x[-1])
    far = Noise(torch.empty(3, 2), 1, ids=[5, 5 + 2**32, 5 + 2**40]).normal()
    assert len(far.unique(dim=0)) == 3
    assert torch.equal(far[0], x[5])


def test_law_of_normals_and_increments():
    """z-tests at 6 sigma: p < 2e-9 each. Successive draws and neighbouring samples are uncorrelated."""
    n = 200
    source = Noise(torch.empty(n, 500, dtype=torch.float64), 0)
    a, b = source.normal(), source.normal()
    for x in (a, b):
        assert abs(float(x.mean())) < 6 / x.numel() ** 0.5
        assert abs(float(x.var()) - 1) < 6 * (2 / x.numel()) ** 0.5
    assert abs(float((a * b).mean())) < 6 / a.numel() ** 0.5
    assert abs(float((a[1:] * a[:-1]).mean())) < 6 / a[1:].numel() ** 0.5
    dW = source.increment(0.9, 0.4)
    assert abs(float(dW.var()) / 0.5 - 1) < 6 * (2 / dW.numel()) ** 0.5


@pytest.mark.parametrize("event", [(), (7,), (3, 40, 41)])
def test_the_whole_law(event):
    """Not its moments alone: the distribution function, the tails, and the two numbers that share a radius and an
    angle, in squares and signs too. Kolmogorov's test and z-tests at p < 1e-8 each; a cosine in float16, a uniform
    of 12 bits or one radius for all would show.
    """
    source, many = Noise(torch.empty(400, *event), 3), max(1, 4000 // int(np.prod(event)))
    rows = torch.cat([source.normal().reshape(400, -1) for _ in range(many)]).double().numpy()
    z = rows.ravel()
    assert stats.kstest(z, "norm").pvalue > 1e-8
    for limit in (3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(limit)
        assert stats.binomtest(int((abs(z) > limit).sum()), z.size, expected).pvalue > 1e-8
    assert len(np.unique(z)) > 0.9 * z.size  # float32 has about 5e7 of such numbers
    if event:
        half = (rows.shape[1] + 1) // 2
        a, b = rows[:, : rows.shape[1] - half].ravel(), rows[:, half:].ravel()
        for f in (np.asarray, np.square, np.sign, np.abs, lambda y: y**3):
            u, v = f(a) - f(z).mean(), f(b) - f(z).mean()
            assert abs(np.mean(u * v)) < 6 * np.sqrt(np.mean(u**2) * np.mean(v**2) / a.size)
        assert stats.kstest(np.arctan2(a, b), "uniform", (-np.pi, 2 * np.pi)).pvalue > 1e-8


def test_every_dtype_has_the_same_numbers():
    """So that a run in float64 is that of float32 without its rounding."""
    for event in ((5,), (3, 20, 20)):
        z = [Noise(torch.empty(3, *event, dtype=t), 2).normal() for t in (torch.float64, torch.float32, torch.bfloat16)]
        assert torch.equal(z[0].float(), z[1])
        assert torch.equal(z[0].bfloat16(), z[2])


def test_a_draw_is_not_overwritten_by_the_next():
    source = Noise(torch.empty(2, 4096), 0)
    first = source.normal()
    kept = first.clone()
    source.normal()
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"ids": [0]}, "got 1 for a batch of 2"),
        ({"ids": [0, -1]}, "ids must be at least 0"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Noise(torch.empty(2, 3), **kwargs)


@pytest.mark.parametrize(
    ("like", "ids", "message"),
    [
        (torch.zeros(()), None, "like must have shape"),
        (torch.zeros(2, 3, dtype=torch.int64), None, "like must be floating, got torch.int64"),
        (torch.zeros(1, 300), [2**64], "ids must be below 2\\^64"),
    ],
)
def test_a_like_or_an_id_that_cannot_be_used_is_named(like, ids, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Noise(like, 0, ids)


def test_times_that_differ_by_rounding_draw_the_same():
    """Another mathematics library, or the same grid by another formula, moves the last bits of a time."""
    x = torch.empty(3, 4)
    times = torch.linspace(1.0, 1e-5, 1001, dtype=torch.float64)
    other = (torch.linspace(1.0**0.5, 1e-5**0.5, 1001, dtype=torch.float64) ** 2)[::50]
    a, b = Noise(x, 7), Noise(x, 7)
    for t in (*times[::50].tolist(), *other.tolist()):
        a.enter(t, 0.9 * t)
        b.enter(t * (1 + 4e-16), 0.9 * t * (1 - 4e-16))
        assert torch.equal(a.normal(), b.normal())
    b.enter(t * (1 + 1e-6), 0.9 * t)
    a.enter(t, 0.9 * t)
    assert not torch.equal(a.normal(), b.normal())
    a.enter(0.5, 0.25), b.enter(0.25, 0.5)
    assert not torch.equal(a.normal(), b.normal())
