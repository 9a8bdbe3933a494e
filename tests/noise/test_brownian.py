"""One path: the same whatever is asked for and when; its law; the orders of convergence that it makes visible."""

import functools
import itertools

import numpy as np
import pytest
import torch

from sdekit import VPSDE, BrownianPath, System, solve
from tests.conftest import gaussian_score

LIKE = torch.empty(5, 3, dtype=torch.float64)


def path(like=LIKE, seed=0, ids=None, start=0.0, end=2.0):
    return BrownianPath(like, seed, ids, start=start, end=end)


def test_one_path_at_every_number_of_steps_and_in_any_order():
    """Increments add up, to rounding, and a value does not depend on what was asked for before, bit for bit."""
    times = [*np.random.default_rng(0).uniform(0, 2, 30), *np.random.default_rng(1).permutation(17) / 8]
    fresh = {t: path().increment(0.0, t) for t in times}
    used = path()
    for t in times[::-1]:
        assert torch.equal(used.increment(0.0, t), fresh[t])
    whole = path().increment(0.0, 2.0)
    for n in (1, 3, 8, 50):
        grid = np.linspace(0, 2, n + 1).tolist()
        for ends in (grid, grid[::-1]):
            one = path()
            total = sum(one.increment(t, s) for t, s in itertools.pairwise(ends))
            torch.testing.assert_close(total, whole if ends is grid else -whole, rtol=0, atol=1e-13)


def test_integrals_are_those_of_the_increments():
    """Chen's relation: J(a, c) = J(a, b) + J(b, c) + (c - b) W(a, b), for any a, b, c in any order."""
    one = path()
    for a, b, c in np.random.default_rng(1).uniform(0, 2, (20, 3)).tolist():
        (w, left), (_, right), (_, whole) = (one.increment_and_integral(*ends) for ends in ((a, b), (b, c), (a, c)))
        torch.testing.assert_close(whole, left + right + (c - b) * w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("event", [(), (1,), (7,), (3, 20, 20)])
def test_a_sample_has_its_own_path_alone_and_in_any_batch_and_dtype(event):
    """PITFALL 23. Neighbours that are drawn by one call are told apart."""
    whole = path(torch.empty(300 if len(event) < 3 else 4, *event, dtype=torch.float64))
    ids = [2, 0, 3]
    for t, s in ((0.3, 0.9), (1.7, 0.2)):
        z = whole.increment(t, s)
        assert torch.equal(path(torch.empty(3, *event, dtype=torch.float64), ids=ids).increment(t, s), z[ids])
        assert torch.equal(path(torch.empty(1, *event), ids=[3]).increment(t, s), z[3:4].float())
        assert len(z.flatten().unique()) == z.numel()
    assert not torch.equal(path(seed=1).increment(0.0, 1.0), path(seed=2).increment(0.0, 1.0))


def test_times_and_rows_per_sample_are_those_of_the_whole():
    """Every sample at times of its own, any of them, in any order and again."""
    one, rng = path(), np.random.default_rng(2)
    for rows in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [3], [2, 0]):
        t, s = torch.from_numpy(rng.uniform(0, 2, (2, len(rows))))
        w, j = one.increment_and_integral(t, s, torch.tensor(rows))
        for k, i in enumerate(rows):
            expected = path().increment_and_integral(float(t[k]), float(s[k]))
            torch.testing.assert_close(w[k], expected[0][i], rtol=0, atol=0)
            torch.testing.assert_close(j[k], expected[1][i], rtol=0, atol=1e-15)


def test_the_law_of_tiny_steps():
    """Down to 2^-36 of the interval: what lies between two nodes of a coarser tree must not be drawn twice.

    z-tests at 6.5 sigma of the variance: a false alarm in less than 3e-10 of all runs.
    """
    n = 20_000
    one = path(torch.empty(n, dtype=torch.float64), start=0.0, end=1.0)
    for h in (2.0**-22, 2.0**-28, 2.0**-36):
        assert abs(float(one.increment(0.3, 0.3 + h).var()) / h - 1) < 6.5 * (2 / n) ** 0.5 + 2.0**-40 / h


def test_law_of_increments_and_integrals():
    """Variances h, h^3/3 and covariance h^2/2 on dyadic and other times, independence of what does not overlap.

    z-tests at 6.5 sigma over fewer than 40 numbers: a false alarm in less than 4e-9 of all runs.
    """
    n = 40_000
    one = path(torch.empty(n, dtype=torch.float64), start=0.0, end=2.0)
    cuts = [0.0, 0.25, 0.3711, 0.5, 1.1234, 1.9999, 2.0]
    found = []
    for t, s in itertools.pairwise(cuts):
        h = s - t
        w, j = one.increment_and_integral(t, s)
        w, j = w / h**0.5, j / h**1.5
        found += [w, 12**0.5 * (j - w / 2)]  # two independent standard normals, if the law is right
        back, reverse = one.increment_and_integral(s, t)  # the integral of W_u - W_s, du < 0
        torch.testing.assert_close(back, -w * h**0.5)
        torch.testing.assert_close(reverse, (w - j) * h**1.5)
    z = torch.stack(found)
    moments = z @ z.T / n - torch.eye(len(z), dtype=torch.float64)
    limit = 6.5 * (torch.ones_like(moments) + torch.eye(len(z), dtype=torch.float64)).sqrt() / n**0.5
    assert bool((moments.abs() < limit).all())
    assert float(z.mean(1).abs().max()) < 6.5 / n**0.5


class OrnsteinUhlenbeck(System):
    """dx = -x dt + 0.7 dW, in either direction of time."""

    def drift(self, x, t):
        return -x

    def diffusion(self, t):
        return 0.7


class Wells(OrnsteinUhlenbeck):
    """dx = sin(2 x) dt + 0.7 dW: what a linear drift would hide, from order 1.5 on, shows."""

    def drift(self, x, t):
        return torch.sin(2 * x)


SYSTEMS = {
    "Ornstein-Uhlenbeck": (OrnsteinUhlenbeck, 0.0, 1.0),
    "Ornstein-Uhlenbeck, back": (OrnsteinUhlenbeck, 1.0, 0.0),
    "wells": (Wells, 0.0, 1.0),
    "wells, back": (Wells, 1.0, 0.0),
    "reverse": (lambda: VPSDE().reverse(gaussian_score(VPSDE(), 0.5)), 0.9, 0.3),
}


@functools.cache
def run(name, rule, n):
    """The end of 200 samples by n steps of a rule, all on one path."""
    make, start, end = SYSTEMS[name]
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)
    grid = torch.linspace(start, end, n + 1, dtype=torch.float64)
    return solve(make(), x, grid, rule, noise=path(x, 3, start=start, end=end)).x


@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.parametrize(("rule", "order"), [("euler_maruyama", 1.0), ("heun", 1.0), ("rk4", 1.0), ("sra1", 1.5)])
def test_strong_order_on_one_path(rule, order, name):
    """PITFALL 14: both ways in time, and on a reverse SDE, within 0.15 of the claim. sra1 has order 2 where the drift
    is linear; heun and rk4 may be better than their claim.
    """
    counts, best = (32, 64, 128, 256), run(name, "sra1", 4096)
    errors = [float((run(name, rule, n) - best).square().mean().sqrt()) for n in counts]
    found = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert found > order - 0.15, errors
    if rule == "euler_maruyama" or (rule == "sra1" and name.startswith("wells")):
        assert found < order + 0.15, errors


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="start and end must be two finite times, got 1 and 1"):
        path(start=1.0, end=1.0)
    with pytest.raises(ValueError, match=r"known on \[0, 2\], asked for at t = 2.5"):
        path().increment(0.0, 2.5)
    with pytest.raises(ValueError, match="seed must be at least 0"):
        path(seed=-1)
    with pytest.raises(ValueError, match=r"rows must be different samples, got \[2, 2\]"):
        path().increment(0.0, torch.tensor([0.5, 1.0]), torch.tensor([2, 2]))
