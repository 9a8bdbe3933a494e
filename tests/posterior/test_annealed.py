"""Split Gibbs against the law that it is to have at a level, by closed forms and quadrature; DAPS against its chain."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from sdekit import VPSDE, GaussianMixture, HeatODE, RectifiedFlow, as_score
from sdekit.posterior import Observation, annealed_sample, downsample
from tests import oracle
from tests.posterior.test_particles import MODES, ROW, SEEN, STD, labelled, seen

SDE = VPSDE()
TWO = GaussianMixture([[-1.0], [0.8]], [[[0.2]], [[0.3]]], [0.4, 0.6])
BENT = {
    "square": (torch.square, 1.0, 0.1),
    "size": (torch.abs, 0.8, 0.05),
    "waves": (lambda x: torch.sin(4 * x), 0.5, 0.2),
}


@pytest.mark.parametrize("make", [VPSDE, HeatODE, RectifiedFlow])
def test_at_a_level_a_linear_observation_gives_the_posterior_of_more_noise(make):
    """3,000 chains of 30 sweeps at r = .6: modes, mean, covariance and two marginals; false alarms below 1e-6 in all.

    At first the weights are those of p(x), off by .1; the sampler's steps err by a hundredth.
    """
    sde, n, r = make(), 3000, 0.6
    wide = math.sqrt(STD**2 + r**2 * float((ROW**2).sum()))
    want = MODES.posterior(torch.from_numpy(ROW), SEEN, wide)
    out = annealed_sample(sde, MODES.score(sde), seen(), (n, 2), levels=[r] * 30, steps=20, seed=0, dtype=torch.float64)
    x, exact = out.x, want.sample(200_000, seed=1, dtype=torch.float64)
    near = lambda y: (y[:, None] - want.means).square().sum(-1).argmin(1).bincount(minlength=3) / len(y)  # noqa: E731
    assert float((near(x) - near(exact)).abs().max()) < 5.5 * 0.0092 + 0.01
    spread = exact.T.cov()
    assert (((x.mean(0) - exact.mean(0)).abs() / (spread.diagonal() / n).sqrt()) < 5.7).all()
    fourth = ((exact - exact.mean(0))[:, :, None] * (exact - exact.mean(0))[:, None]).std(0)
    assert ((x.T.cov() - spread).abs() < 5.7 * fourth / n**0.5 + 0.01).all()
    truth = oracle.Mixture(*(y.numpy() for y in (MODES.means, MODES.covs, MODES.weights))).posterior(ROW, SEEN, wide)[0]
    for u in np.eye(2):
        distance = oracle.ks_distance(x.numpy() @ u, truth.projected_cdf(u, 1.0, 0.0))
        assert distance < 0.01 + oracle.ks_threshold(n, 1e-7)
    assert (out.acceptance == 1).all()


def test_a_gaussian_has_its_posterior_after_the_levels():
    """Mean and covariance in three dimensions, two of them seen; the last level, .02, is lost in std. Below 1e-6."""
    mean, cov = torch.tensor([[0.3, -0.2, 0.5]]), torch.tensor([[[0.5, 0.2, 0.1], [0.2, 0.4, -0.1], [0.1, -0.1, 0.3]]])
    data, a, y, n = GaussianMixture(mean, cov), [[1.0, 0.5, 0.0], [0.0, 1.0, -1.0]], [0.8, -0.4], 4000
    want = data.posterior(torch.tensor(a), y, [0.2, 0.3])
    observation = Observation(torch.tensor(y), a, torch.tensor([0.2, 0.3]))
    x = annealed_sample(SDE, data.score(SDE), observation, (n, 3), levels=60, seed=0, dtype=torch.float64).x
    c = want.covs[0]
    assert ((x.mean(0) - want.means[0]).abs() < 5.5 * (c.diagonal() / n).sqrt() + 0.01).all()
    scatter = ((c.diagonal()[:, None] * c.diagonal() + c**2) / n).sqrt()
    assert ((x.T.cov() - c).abs() < 5.5 * scatter + 0.01).all()


def cdf_at_a_level(A, y, std, r):
    """Of p(x) int N(y; A z, std^2) N(z; x, r^2) dz on a grid, by quadrature."""
    grid = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
    likelihood = (-0.5 * ((y - A(grid)) / std) ** 2).exp()
    if r:
        offsets = torch.arange(-int(8000 * r), int(8000 * r) + 1, dtype=torch.float64) / 1000
        kernel = (-0.5 * (offsets / r) ** 2).exp()
        likelihood = functional.conv1d(likelihood[None, None], kernel[None, None], padding=len(kernel) // 2)[0, 0]
    mass = (TWO.log_prob(grid[:, None]).exp() * likelihood).cumsum(0)
    return lambda x: np.interp(x, grid.numpy(), (mass / mass[-1]).numpy())


@pytest.mark.parametrize("name", ["square", "waves", "exp"])
@pytest.mark.parametrize(("std", "r", "at"), [(0.3, 0.5, 0.5), (0.5, 1.0, 0.5)])
def test_the_step_of_the_likelihood_has_its_law_by_quadrature(name, std, r, at):
    """Data at one point, so that DAPS's x is that point: z ~ N(y; A z, std^2) N(z; x, r^2). KS, false alarm 1e-7."""
    A = {**BENT, "exp": (torch.exp,)}[name][0]
    z = annealed_sample(
        SDE, GaussianMixture([[at]], [[[1e-6]]]).score(SDE), Observation(torch.ones(1), A, std), (30_000, 1),
        method="daps", levels=[r], steps=3, proposals=150, seed=0, dtype=torch.float64,
    ).x  # fmt: skip
    grid = torch.linspace(-5, 5, 20_001, dtype=torch.float64)
    cdf = (-0.5 * ((A(grid) - 1) / std) ** 2 - 0.5 * ((grid - at) / r) ** 2).exp().cumsum(0)
    distance = oracle.ks_distance(z[:, 0].numpy(), lambda v: np.interp(v, grid.numpy(), (cdf / cdf[-1]).numpy()))
    assert distance < oracle.ks_threshold(30_000, 1e-7)


@pytest.mark.parametrize("name", BENT)
def test_at_a_level_an_observation_that_is_not_linear_gives_the_law_by_quadrature(name):
    """Two modes and more, 2,000 chains at r = .8; Kolmogorov-Smirnov, false alarm 1e-7, .01 for the sampler's steps."""
    A, y, std = BENT[name]
    out = annealed_sample(
        SDE, TWO.score(SDE), Observation(torch.tensor([y]), A, std), (2000, 1), levels=[0.8] * 20, steps=20,
        proposals=60, seed=0, dtype=torch.float64,
    )  # fmt: skip
    distance = oracle.ks_distance(out.x[:, 0].numpy(), cdf_at_a_level(A, y, std, 0.8))
    assert distance < 0.01 + oracle.ks_threshold(2000, 1e-7)
    assert 0.5 < float(out.acceptance.mean()) < 1


@pytest.mark.parametrize("method", ["split_gibbs", "daps"])
def test_annealed_draws_are_near_the_posterior_of_an_observation_that_is_not_linear(method):
    """What is left are the modes' weights: .02 in the first method, .06 in the second; scatter .015."""
    A, y, std = BENT["square"]
    x = annealed_sample(
        SDE, TWO.score(SDE), Observation(torch.tensor([y]), A, std), (2000, 1), method=method, seed=0,
        dtype=torch.float64,
    ).x  # fmt: skip
    assert oracle.ks_distance(x[:, 0].numpy(), cdf_at_a_level(A, y, std, 0.0)) < 0.09
    assert float((x.square() - y).std()) == pytest.approx(0.1, abs=0.02)


def test_the_length_of_a_vector_gives_the_law_by_quadrature_in_the_plane():
    """y = |x| + .1 eps of N((1, 0), .25): one angle, one radius, on a grid of the plane; r = .5, KS, alarm 1e-7."""
    data, y, std, r, n = GaussianMixture([[1.0, 0.0]], [np.eye(2) * 0.25]), 1.2, 0.1, 0.5, 2000
    observation = Observation(torch.tensor([y]), lambda x: x.norm(dim=1, keepdim=True), std)
    x = annealed_sample(
        SDE, data.score(SDE), observation, (n, 2), levels=[r] * 15, steps=20, proposals=24, seed=0,
        dtype=torch.float64,
    ).x  # fmt: skip
    g = torch.linspace(-4, 4, 401, dtype=torch.float64)
    plane = torch.cartesian_prod(g, g)
    likelihood = (-0.5 * ((y - plane.norm(dim=1)) / std) ** 2).exp().reshape(401, 401)
    smooth = (-0.5 * ((g[:, None] - g) / r) ** 2).exp()
    mass = data.log_prob(plane).exp().reshape(401, 401) * (smooth @ likelihood @ smooth)
    for axis in (0, 1):
        cdf = mass.sum(1 - axis).cumsum(0)
        distance = oracle.ks_distance(x[:, axis].numpy(), lambda v, c=cdf: np.interp(v, g.numpy() + 0.01, c / c[-1]))
        assert distance < 0.01 + oracle.ks_threshold(n, 1e-7)


def test_daps_has_the_law_of_its_own_chain_which_is_not_the_posterior():
    """Of N(.5, .6^2) the flow is affine, and so is each step: mean and variance by hand, 6 standard errors."""
    m, c, y, std, a, n, rs = 0.5, 0.6, 1.4, 0.5, 1.5, 6000, [4.0, 2.0, 1.0, 0.5, 0.25]
    data = GaussianMixture([[m]], [[[c**2]]])
    x = annealed_sample(
        SDE, data.score(SDE), Observation(torch.tensor([y]), [[a]], std), (n, 1), method="daps", levels=rs, steps=40,
        seed=0, dtype=torch.float64,
    ).x  # fmt: skip
    low = float(SDE.sigma(SDE.t_min) / SDE.alpha(SDE.t_min))
    mean, var = 0.0, 0.0
    for r in rs:
        gain = c**2 / math.sqrt((c**2 + r**2) * (c**2 + low**2))  # the flow down to t_min, and E[x_0|x]
        left = 1 / (1 + (a * r / std) ** 2)
        mean = left * (m + gain * (mean - m)) + (1 - left) * y / a
        var = left**2 * gain**2 * (var + r**2) + left * r**2
    assert abs(float(x.mean()) - mean) < 6 * (var / n) ** 0.5 + 1e-3
    assert abs(float(x.var()) / var - 1) < 6 * (2 / n) ** 0.5 + 1e-3
    exact = data.posterior(torch.tensor([[a]]), [y], std)
    assert abs(float(exact.means) - mean) > 0.02
    assert var / float(exact.eigenvalues) > 1.1


@pytest.mark.parametrize("method", ["split_gibbs", "daps"])
@pytest.mark.parametrize("A", [lambda x: x**2, lambda x: x[:, :1] * 3], ids=["square", "linear"])
def test_a_small_std_makes_nothing_diverge(method, A):
    """Of 1e-4, in float32, from r = 10 on: draws fit what was seen to what the last level leaves, .02 times a slope."""
    observation = Observation(A(torch.tensor([[0.7, -0.4]]))[0], A, 1e-4)
    out = annealed_sample(SDE, MODES.score(SDE), observation, (50, 2), method=method, levels=30, seed=0)
    assert out.x.dtype == torch.float32
    off = (observation.of(out.x) - observation.y).abs()
    assert float(off.median()) < 0.1
    assert float(out.x.abs().max()) < 5


@pytest.mark.parametrize("method", ["split_gibbs", "daps"])
@pytest.mark.parametrize("A", [torch.square, lambda x: x.sum(1, keepdim=True)], ids=["square", "linear"])
def test_a_sample_is_what_it_is_alone(method, A):
    """Its own y, std and condition with it."""
    labels, y = torch.tensor([-1.0, 0.0, 1.0, 2.0]), torch.tensor([[0.1], [0.5], [0.5], [1.5]], dtype=torch.float64)
    y = y.expand(4, A(torch.zeros(1, 2)).shape[1])
    std = torch.tensor([[0.3], [0.1], [0.2], [0.4]], dtype=torch.float64).expand_as(y)

    def draw(rows, ids):
        score = as_score(labelled, SDE, "eps").given(labels[rows])
        return annealed_sample(
            SDE, score, Observation(y[rows], A, std[rows]), (len(ids), 2), method=method, levels=[2.0, 0.5, 0.5, 0.1],
            steps=4, seed=5, ids=ids, dtype=torch.float64,
        )  # fmt: skip

    out = draw(slice(None), range(4))
    for i in (1, 3):
        alone = draw(slice(i, i + 1), [i])
        torch.testing.assert_close(out.x[i : i + 1], alone.x, rtol=0, atol=1e-6)
        torch.testing.assert_close(out.acceptance[i : i + 1], alone.acceptance)
    assert not torch.equal(out.x, draw(slice(None), range(4, 8)).x)


def test_every_process_takes_pictures_and_bent_ones(sde):
    data = GaussianMixture(torch.zeros(1, 16), 0.3 * torch.eye(16)[None])
    y = torch.linspace(-0.5, 0.5, 4).reshape(1, 2, 2)
    for observation in (downsample(2, y, 0.1), Observation(y, lambda x: functional.avg_pool2d(x, 2).tanh(), 0.1)):
        out = annealed_sample(sde, data.score(sde), observation, (40, 1, 4, 4), levels=12, steps=6, seed=0)
        assert out.x.shape == (40, 1, 4, 4)
        assert out.x.dtype == torch.float32
        off = observation.of(out.x) - y.reshape(1, 4)
        assert float(off.square().mean().sqrt()) < 0.2


def test_sweeps_at_one_level_draw_anew_and_calls_are_counted():
    rows = []

    def says(x, t):
        rows.append(len(x))
        return x * 0.5

    score, observation = as_score(says, SDE, "eps"), Observation(torch.zeros(1), torch.ones(1, 2), 0.5)
    for method, sampler, each in (("split_gibbs", "heun_sde", 2), ("daps", "unipc_2", 1), ("split_gibbs", None, 1)):
        rows.clear()
        out = annealed_sample(
            SDE, score, observation, (3, 2), method=method, sampler=sampler, levels=[1.0, 1.0], steps=5, seed=0
        )
        assert out.nfe == len(rows) == 2 * (5 * each + 1)
        assert set(rows) == {3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "gibs"}, "unknown method 'gibs': did you mean 'split_gibbs'"),
        ({"sampler": "unipc_2"}, "sampler must be one with noise for split_gibbs.*'unipc_2' draws none"),
        ({"levels": 0}, "levels must be at least 2"),
        ({"levels": [0.1, 0.2]}, r"do not increase, within this process's own \(0.0\d+, 15\d"),
        ({"levels": [1e4, 0.2]}, "within this process's own"),
        ({"levels": [0.5, 1e-3]}, "within this process's own"),
        ({"levels": "many"}, "levels must be a whole number or numbers"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"proposals": 1.5}, "proposals must be a whole number"),
        ({"ids": [0]}, "ids must hold one number per sample"),
        ({"observation": Observation(torch.zeros(2, 1), torch.ones(1, 2), 0.5)}, "given for 2 samples, and x has 3"),
        ({"observation": 3}, "observation must be an Observation"),
        ({"observation": Observation(torch.zeros(2), lambda x: x.log(), 0.5)}, "not finite: A is not"),
        ({"observation": Observation(torch.zeros(2), lambda x: x.detach() ** 2, 0.5)}, "A must be differentiable"),
        ({"score": lambda x, t: x * math.nan}, "NaN or infinite"),
    ],
)  # fmt: skip
def test_bad_input_is_named(arguments, message):
    given = {"score": MODES.score(SDE), "observation": seen(), "levels": 3, "steps": 3, "seed": 0, **arguments}
    with pytest.raises((ValueError, TypeError, FloatingPointError), match=message):
        annealed_sample(SDE, given.pop("score"), given.pop("observation"), (3, 2), **given)
