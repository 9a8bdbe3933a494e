"""Twisted sequential Monte Carlo against exact posteriors, evidences, and the law of the sampler's own chain."""

import math

import numpy as np
import pytest
import torch

from sdekit import (
    SAMPLERS,
    VPSDE,
    GaussianMixture,
    HeatODE,
    RectifiedFlow,
    Sampler,
    as_score,
    calibrate,
    sample,
    solve,
)
from sdekit.posterior import Observation, posterior_sample, posterior_score
from sdekit.sampling.grids import make_grid
from sdekit.solvers.steppers import RULES
from tests import oracle

SDE = VPSDE()
ONE = GaussianMixture([[0.5]], [[[0.36]]])
MODES = GaussianMixture(
    [[-1.0, 0.0], [1.0, 0.2], [0.0, 1.2]], [np.eye(2) * 0.02, np.eye(2) * 0.05, np.eye(2) * 0.1], [0.5, 0.3, 0.2]
)
TRUTH = oracle.Mixture(*(y.numpy() for y in (MODES.means, MODES.covs, MODES.weights)))
ROW, SEEN, STD = np.array([[0.3, 1.0]]), np.array([0.35]), 0.3


def seen(y=SEEN, row=ROW, std=STD):
    return Observation(torch.as_tensor(y), torch.as_tensor(row), std)


def test_the_evidence_of_gaussians_to_a_thousandth():
    """400 steps, 64 x 1024 particles: the estimate's own standard error is 2e-4."""
    _, want = oracle.Mixture([[0.5]], [[[0.36]]]).posterior([[1.0]], np.array([0.9]), 0.7)
    out = posterior_sample(
        SDE, ONE.score(SDE), seen([0.9], [[1.0]], 0.7), (1024, 1), particles=64, steps=400, seed=0, dtype=torch.float64
    )
    assert abs(float(out.log_evidence.logsumexp(0)) - math.log(1024) - want) < 1e-3
    assert float(out.ess.min()) > 60


def chain_law(sde, rule, churn, times):
    """Mean and variance of what a rule makes of Gaussian data in these steps, denoised: it is affine in its noises."""
    noise, steps = oracle.UnitNoise(), len(times) - 1
    noise.rows = steps + 2
    x = torch.zeros(steps + 2, 1, dtype=torch.float64)
    x[-1] = float(sde.sigma(times[0]))
    normal = noise.normal
    noise.normal = lambda: normal()[:, None]
    out = solve(sde.reverse(ONE.score(sde), churn), x, times, rule, noise=noise, denoise=True).x[:, 0]
    return float(out[0]), float((out[1:] - out[0]).square().sum())


@pytest.mark.parametrize("method", ["mmps", "tmpd", "pigdm", "dps"])
@pytest.mark.parametrize(
    ("name", "resample"), [("ancestral", 0.0), ("sa_solver", 0.9), ("euler_maruyama", 0.5), ("dpmpp_3m_sde", 1.0)]
)
def test_the_weights_are_those_of_the_chain_whatever_the_twist(method, name, resample):
    """E exp(log_evidence) is p(y) of the sampler's own chain, exactly, for twenty steps and any proposal.

    Ancestral's has a variance of .20 here, Euler's .46, where the data have .36. False alarm below 1e-7 (5.5 standard
    errors).
    """
    row = SAMPLERS[name]
    times = make_grid(SDE, "karras", 20)
    mean, var = chain_law(SDE, row.rule, row.churn, times)
    y, std, n = 0.9, 1.0, 4000
    want = -0.5 * ((y - mean) ** 2 / (var + std**2) + math.log(2 * math.pi * (var + std**2)))
    out = posterior_sample(
        SDE, ONE.score(SDE), seen([y], [[1.0]], std), (n, 1), particles=4, method=method, sampler=name, steps=20,
        resample=resample, seed=1, dtype=torch.float64,
    )  # fmt: skip
    ratio = (out.log_evidence - want).exp()
    assert abs(float(ratio.mean()) - 1) < 5.5 * float(ratio.std()) / n**0.5
    assert float(ratio.std()) / n**0.5 < 0.004


def test_large_steps_are_moved_no_further_than_their_noise_reaches():
    """Eight ancestral steps of the chain: moved all the way to E[x_0|x_t, y] the estimates scatter by 5, not .07."""
    row, y, std = SAMPLERS["ancestral"], 0.9, 0.6
    mean, var = chain_law(SDE, row.rule, row.churn, make_grid(SDE, "karras", 8))
    want = -0.5 * ((y - mean) ** 2 / (var + std**2) + math.log(2 * math.pi * (var + std**2)))
    out = posterior_sample(
        SDE, ONE.score(SDE), seen([y], [[1.0]], std), (2000, 1), particles=4, sampler="ancestral", steps=8, seed=1,
        dtype=torch.float64,
    )  # fmt: skip
    ratio = (out.log_evidence - want).exp()
    assert float(ratio.std()) < 0.15
    assert abs(float(ratio.mean()) - 1) < 0.01
    assert float(out.ess.mean()) > 3.8


@pytest.mark.parametrize("make", [VPSDE, HeatODE, RectifiedFlow])
def test_mode_weights_and_draws_of_a_mixture(make):
    """16 particles bring what is off by .25 in MMPS alone to .05, and the law along two directions with it.

    3,000 draws: a weight's standard error is below .0092, and the particles' bias .03; false alarm below 1e-7.
    """
    sde, n = make(), 3000
    posterior, evidence = TRUTH.posterior(ROW, SEEN, STD)
    out = posterior_sample(sde, MODES.score(sde), seen(), (n, 2), particles=16, steps=50, seed=0, dtype=torch.float64)
    weights = lambda x: np.bincount(((x[:, None] - posterior.m) ** 2).sum(-1).argmin(1), minlength=3) / n  # noqa: E731
    exact = weights(posterior.sample(20_000, np.random.default_rng(0))[:n])
    assert np.abs(weights(out.x.numpy()) - exact).max() < 0.05 + 5.5 * 0.013
    assert abs(float(out.log_evidence.logsumexp(0)) - math.log(n) - evidence) < 0.06
    if make is VPSDE:
        alone = sample(sde, posterior_score(sde, MODES.score(sde), seen()), (n, 2), "sa_solver", steps=50, seed=0)
        assert np.abs(weights(alone.numpy()) - exact).max() > 0.2
    for u in ([1.0, 0.0], [0.0, 1.0]):
        u = np.array(u)
        # all particles by their weights, too: the same law with less scatter
        distance = oracle.ks_distance(out.x.numpy() @ u, posterior.projected_cdf(u, 1.0, 0.0))
        assert distance < 0.05 + oracle.ks_threshold(n, 1e-7)


def test_more_particles_err_less():
    posterior, _ = TRUTH.posterior(ROW, SEEN, STD)
    errors = []
    for k in (2, 8, 32):
        out = posterior_sample(SDE, MODES.score(SDE), seen(), (1500, 2), particles=k, steps=30, seed=0)
        near = ((out.particles[:, :, None] - torch.from_numpy(posterior.m)) ** 2).sum(-1).argmin(-1)
        share = torch.stack([(out.weights * (near == j)).sum(1).mean() for j in range(3)])
        errors.append(float((share - torch.from_numpy(posterior.w)).abs().sum()) / 2)
    slope = np.polyfit(np.log([2, 8, 32]), np.log(errors), 1)[0]
    print(f"mode weights: {errors}, slope {slope:.2f}")
    assert slope < -0.4


def labelled(x, t, labels):
    """N(labels, .36) in each entry; eps."""
    time = t.double()
    a, s = (y.reshape(-1, 1) for y in (SDE.alpha(time), SDE.sigma(time)))
    return s * (x - a * labels.to(x)[:, None]) / (a**2 * 0.36 + s**2)


@pytest.mark.parametrize("name", ["sa_solver", "ancestral", "heun_sde", "pc"])
def test_a_sample_is_what_it_is_alone_and_in_chunks(name):
    """Its own y and condition, its particles its own: PITFALLS 45."""
    labels, y = torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor([[0.1], [0.5], [-0.5], [1.5]], dtype=torch.float64)
    row = torch.tensor([[1.0, 1.0]])

    def draw(rows, **kw):
        score = as_score(labelled, SDE, "eps").given(labels[rows])
        return posterior_sample(
            SDE, score, Observation(y[rows], row, 0.3), (len(labels[rows]), 2), particles=3, sampler=name, steps=12,
            seed=5, dtype=torch.float64, **kw,
        )  # fmt: skip

    out = draw(slice(None))
    for i in (1, 3):
        alone = draw(slice(i, i + 1), ids=[i])
        torch.testing.assert_close(out.x[i : i + 1], alone.x, rtol=0, atol=1e-6)
        torch.testing.assert_close(out.log_evidence[i : i + 1], alone.log_evidence, rtol=0, atol=1e-6)
    chunks = draw(slice(None), chunk=5)
    torch.testing.assert_close(out.x, chunks.x, rtol=0, atol=1e-6)
    torch.testing.assert_close(out.weights, chunks.weights, rtol=0, atol=1e-6)
    assert chunks.nfe > out.nfe
    assert chunks.rows == out.rows
    torch.testing.assert_close(out.weights.sum(1), torch.ones(4, dtype=torch.float64))
    assert out.particles.shape == (4, 3, 2)
    assert ((out.ess >= 1) & (out.ess <= 3)).all()
    assert (out.x[:, None] == out.particles).all(2).any(1).all()


def test_calls_are_counted():
    rows = []

    def says(x, t):
        rows.append(len(x))
        return x * 0.5

    score = as_score(says, SDE, "eps")
    observation = Observation(torch.zeros(1), torch.ones(1, 2), 0.5)
    for sampler, each in (("sa_solver", 1), ("ancestral", 1), ("heun_sde", 2)):
        rows.clear()
        out = posterior_sample(SDE, score, observation, (2, 2), particles=3, sampler=sampler, steps=5, seed=0)
        assert out.nfe == len(rows) == 5 * each + 1
        assert out.rows == sum(rows) == 6 * out.nfe


def test_chunks_bound_every_call_of_the_network():
    """Also those of a rule's second stage, and of the last step."""
    rows = []

    def says(x, t):
        rows.append(len(x))
        return x * 0.5

    seen = Observation(torch.zeros(1), torch.ones(1, 2), 0.5)
    for name in ("heun_sde", "sa_solver"):
        posterior_sample(SDE, as_score(says, SDE, "eps"), seen, (2, 2), particles=3, sampler=name, steps=3, chunk=4)
    assert max(rows) == 4


def test_few_steps_by_the_grids_for_them():
    """The evidence is p(y) of the chain that starts below T, within 5.5 standard errors (false alarm below 1e-7)."""
    row, steps, y, std, n = SAMPLERS["ancestral"], 12, 0.9, 0.6, 4000
    mean, var = chain_law(SDE, row.rule, row.churn, make_grid(SDE, "inner_karras", steps))
    want = -0.5 * ((y - mean) ** 2 / (var + std**2) + math.log(2 * math.pi * (var + std**2)))
    out = posterior_sample(
        SDE, ONE.score(SDE), seen([y], [[1.0]], std), (n, 1), particles=4, sampler="ancestral", steps=steps,
        grid="inner_karras", seed=1, dtype=torch.float64,
    )  # fmt: skip
    ratio = (out.log_evidence - want).exp()
    assert abs(float(ratio.mean()) - 1) < 5.5 * float(ratio.std()) / n**0.5
    assert float(ratio.std()) / n**0.5 < 0.004


def test_a_list_of_times_may_end_in_0_as_elsewhere():
    listed = make_grid(SDE, "karras", 5)
    one, other = (
        posterior_sample(SDE, ONE.score(SDE), seen([0.9], [[1.0]], 0.7), (4, 1), seed=0, **kw)
        for kw in ({"grid": [*listed.tolist(), 0.0]}, {"steps": 5})
    )
    assert torch.equal(one.x, other.x)


def test_pictures_dtypes_and_many_entries():
    """Beyond 128 entries of y there is no determinant, and conjugate gradients take over."""
    d = 150
    data = GaussianMixture(torch.zeros(1, d), 0.3 * torch.eye(d)[None])
    y = torch.linspace(-1, 1, d - 10).double()
    observation = Observation(y, torch.eye(d)[:-10], 0.5)
    out = posterior_sample(SDE, data.score(SDE), observation, (2, 1, 15, 10), particles=4, steps=20, seed=0)
    assert out.x.shape == (2, 1, 15, 10)
    assert out.x.dtype == torch.float32
    assert out.x.isfinite().all()
    mean = 0.3 / (0.3 + 0.25) * y
    assert float((out.particles.reshape(8, d)[:, :-10].mean(0).double() - mean).abs().mean()) < 0.3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"particles": 1}, "particles must be at least 2: one has no other.*posterior_score"),
        ({"particles": 2.5}, "particles must be a whole number"),
        ({"sampler": "unipc_2"}, "sampler must be one with noise.*'unipc_2' draws none"),
        ({"sampler": calibrate(SDE, MODES.score(SDE), (8, 2), nfe=4, seed=0)}, "this Calibration draws none"),
        ({"sampler": Sampler(RULES["ancestral"], churn=0.5)}, "would ignore the system's churn"),
        ({"sampler": "sa"}, "unknown sampler 'sa'"),
        ({"method": "map"}, "unknown method 'map'"),
        ({"resample": 1.5}, r"resample must lie in \[0, 1\], got 1.5"),
        ({"ids": [0]}, "ids must hold one number per sample: got 1 for a batch of 3"),
        ({"chunk": -1}, "chunk must be at least 1"),
        ({"gamma": 1.0}, "method 'mmps'.*gamma"),
        ({"observation": Observation(torch.zeros(2, 1), torch.ones(1, 2), 0.5)}, "given for 2 samples, and x has 3"),
        ({"score": lambda x, t: x * math.nan}, "not finite"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, message):
    given = {"score": MODES.score(SDE), "observation": seen(), "steps": 4, "seed": 0, **arguments}
    with pytest.raises((ValueError, TypeError, FloatingPointError), match=message):
        posterior_sample(SDE, given.pop("score"), given.pop("observation"), (3, 2), **given)
