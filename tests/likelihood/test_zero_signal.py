"""Likelihood, encoding and the variational bound of processes with alpha(T) = 0, where the prior is the marginal."""

import math

import numpy as np
import pytest
import torch

from sdekit import (
    CosineVP,
    GaussianMixture,
    RectifiedFlow,
    decode,
    encode,
    log_likelihood,
    round_trip_error,
    sample_with_log_prob,
    variational_bound,
)
from tests.zero import MEAN, STD, ZERO, Rounded, Stopped, mixture_network, moments, moved, network

TIGHT = {"rtol": 3e-7, "atol": 3e-7}


@pytest.fixture(scope="module")
def mixture():
    covs = [[[0.3, 0.1], [0.1, 0.2]], [[0.05, 0.0], [0.0, 0.4]]]
    return GaussianMixture([[0.8, -0.3], [-1.0, 0.5]], covs, [0.3, 0.7])


@pytest.mark.parametrize("name", ["flow", "flow_3", "cosine", "table", "rounded"])
def test_log_prob_is_the_marginal_s_and_nothing_is_lost_at_T(mixture, name):
    sde = ZERO[name]()
    x = sde.perturb(mixture.sample(4, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    found = log_likelihood(sde, mixture.score(sde), x, **TIGHT)
    torch.testing.assert_close(found.log_prob, mixture.at(sde, sde.t_min).log_prob(x), rtol=0, atol=1e-6)
    assert found.prior_mismatch.tolist() == found.prior_error.tolist() == [0.0] * 4
    assert float(found.solver_error.max()) < 1e-4


def test_the_prior_costs_nothing_where_it_is_exact(mixture):
    """As many evaluations as with a prior that is given; stopped before T there is one more, for the mismatch."""
    for sde, more in ((RectifiedFlow(), 0), (Rounded(), 0), (Stopped(), 1)):
        x = sde.perturb(mixture.sample(4, seed=0, dtype=torch.float64), sde.t_min, seed=1)
        own = log_likelihood(sde, mixture.score(sde), x)
        given = log_likelihood(sde, mixture.score(sde), x, prior_log_prob=sde.prior_log_prob)
        assert own.nfe == given.nfe + more
        assert torch.equal(own.log_prob, given.log_prob)
        assert bool((own.prior_mismatch.abs() > 1e-6).all()) == bool(more)


@pytest.mark.parametrize("predicts", ["x0", "v", "flow"])
def test_log_prob_whatever_the_network_says(mixture, predicts):
    sde = RectifiedFlow()
    x = sde.perturb(mixture.sample(3, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    found = log_likelihood(sde, mixture_network(mixture, sde, predicts), x, **TIGHT)
    torch.testing.assert_close(found.log_prob, mixture.at(sde, sde.t_min).log_prob(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["flow", "rounded"])
def test_samples_with_their_density(mixture, name):
    sde = ZERO[name]()
    x_T = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x, found = sample_with_log_prob(sde, mixture.score(sde), x_T.shape, x_T=x_T, **TIGHT)
    torch.testing.assert_close(found.log_prob, mixture.at(sde, sde.t_min).log_prob(x), rtol=0, atol=1e-6)
    assert found.prior_mismatch.tolist() == [0.0] * 4
    torch.testing.assert_close(x, decode(sde, mixture.score(sde), x_T, **TIGHT), rtol=0, atol=1e-6)
    torch.testing.assert_close(encode(sde, mixture.score(sde), x, **TIGHT), x_T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["flow", "flow_third", "cosine", "table", "rounded"])
def test_encode_and_decode(mixture, name):
    """Against the closed form for one Gaussian, and there and back for a mixture."""
    sde = ZERO[name]()
    m, v = moments(sde, sde.t_min)
    z = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = m + v**0.5 * z
    for predicts in ("x0", "v", "flow") if name == "flow" else ("v",):
        score = network(sde, predicts)
        torch.testing.assert_close(encode(sde, score, low, **TIGHT), z, rtol=0, atol=1e-6)
    torch.testing.assert_close(decode(sde, score, z, **TIGHT), moved(sde, z, sde.T, sde.t_min), rtol=0, atol=1e-6)
    if name == "flow":
        x = sde.perturb(mixture.sample(3, seed=0, dtype=torch.float64), sde.t_min, seed=1)
        assert float(round_trip_error(sde, mixture.score(sde), x, **TIGHT).max()) < 1e-6


def test_hutchinson_and_float32(mixture):
    sde = RectifiedFlow()
    x = sde.perturb(mixture.sample(3, seed=0), sde.t_min, seed=1)
    exact = mixture.at(sde, sde.t_min).log_prob(x)
    found = log_likelihood(sde, mixture.score(sde), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.log_prob, exact, rtol=0, atol=2e-4)
    probes = log_likelihood(sde, mixture.score(sde), x, divergence="hutchinson", probes=8, seed=0)
    assert bool(((probes.log_prob - exact).abs() < 6 * probes.stderr + 1e-3).all())
    assert probes.prior_mismatch.tolist() == [0.0] * 3


# Four points on a lattice of 16 x 16 levels. Their exact score makes the integral over all log-SNR their entropy
# (Guo, Shamai & Verdu 2005), and every chain's bound no less.
LEVELS = 16
POINTS, P = torch.tensor([[3, 5], [10, 2], [7, 7], [14, 12]]), torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
ENTROPY = -float((P * P.log()).sum())


def bound(sde, repeats, **how):
    """The mean over the data and its standard error; each point as often as ``repeats``."""
    values = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)[POINTS]
    data = GaussianMixture(values, np.broadcast_to(1e-10 * np.eye(2), (4, 2, 2)), P)
    x = POINTS.repeat_interleave(repeats, 0)
    found = variational_bound(sde, data.score(sde), x, levels=LEVELS, seed=0, dtype=torch.float64, **how)
    assert bool(torch.isfinite(found.nats).all())
    rows = found.nats.reshape(4, repeats)
    error = (P**2 * rows.var(1) / repeats).sum().sqrt()
    return float(P @ rows.mean(1)), float(error), found


@pytest.mark.parametrize("name", ["flow", "flow_3", "cosine", "table", "rounded"])
def test_the_bound_in_continuous_time_is_the_entropy(name):
    mean, error, found = bound(ZERO[name](), 800, samples=16)
    gain = float(P @ found.reconstruction.reshape(4, -1).mean(1))  # t_min of the table is no fine level
    assert abs(mean - gain - ENTROPY) < 4 * error < 0.25
    assert 0 < float(found.prior.max()) < 1e-6  # as of a start at sigma/alpha = 1,000


@pytest.mark.parametrize("steps", [2, 20, 200])
@pytest.mark.parametrize("name", ["flow", "cosine", "rounded"])
def test_a_chain_s_bound_from_T_is_one(name, steps):
    """Never below the entropy, the nearer to it the more steps; and that of a chain stopped at T = .999 is as good."""
    mean, error, found = bound(ZERO[name](), 400 if steps > 2 else 20, steps=steps)
    assert mean > ENTROPY - 4 * error
    assert float(found.prior.max()) < 1e-30
    if steps == 200:
        assert mean < ENTROPY + 0.3 + 4 * error
    if name == "flow":
        stopped, other, _ = bound(Stopped(), 400 if steps > 2 else 20, steps=steps)
        assert abs(mean - stopped) < 4 * math.hypot(error, other) + 1e-2 * mean


@pytest.mark.parametrize("steps", [2, 5, 40])
@pytest.mark.parametrize("grid", [None, "uniform"])
def test_a_user_s_zero_is_zero_for_the_chain(steps, grid):
    """cos(pi/2) = 6e-17: the first term is the error of x_0 there, not e^74 times that of eps, which is rounding."""
    _, _, mine = bound(Rounded(), 5, steps=steps, grid=grid)
    sde = CosineVP(0.0)
    sde.t_min = Rounded.t_min
    _, _, exact = bound(sde, 5, steps=steps, grid=grid)
    torch.testing.assert_close(mine.nats, exact.nats, rtol=1e-6, atol=1e-6)


def test_the_first_term_of_a_chain_in_closed_form():
    """Of Gaussian data the best x_0 at T is their mean: SNR(t_{N-1})/2 |x_0 - mean|^2, without any noise in it."""
    sde = RectifiedFlow()
    x = torch.tensor([[0, 15], [7, 9]])
    values = torch.linspace(-1, 1, LEVELS, dtype=torch.float64)[x]
    grid = torch.tensor([1.0, 0.3, 0.001], dtype=torch.float64)
    for predicts in ("x0", "v", "flow"):
        score = network(sde, predicts, MEAN, STD)
        found, rest = (
            variational_bound(s, score, x, levels=LEVELS, steps=len(g), grid=g, seed=0, dtype=torch.float64)
            for s, g in ((sde, grid), (Ended(), grid[1:]))
        )
        first = (0.7 / 0.3) ** 2 / 2 * (values - MEAN).square().sum(1)
        prior = 0.5 * (0.7 / 0.3) ** 2 * values.square().sum(1)  # what the chain from .3 has instead
        torch.testing.assert_close(found.nats - first, rest.nats - prior, rtol=1e-9, atol=1e-9)


class Ended(RectifiedFlow):
    """The rectified flow up to u = .3."""

    T = 0.3
