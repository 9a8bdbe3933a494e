"""Poisson flow against its own formulas: radii, a point set's field, the kernel's densities, the heat limit."""

import math

import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits

from sdekit import (
    SAMPLERS,
    HeatODE,
    PointSet,
    PoissonFlow,
    RectifiedFlow,
    as_score,
    calibrate,
    log_likelihood,
    ode_sample,
    pc_sample,
    sample,
    sde_sample,
)
from sdekit.training import Preconditioned, build, load_checkpoint, save_checkpoint, train
from sdekit.training.objectives import _noised
from tests import oracle

PLANE = PointSet(torch.tensor([[-1.0, 0.3], [0.8, 0.8], [0.2, -1.1], [1.2, -0.4]], dtype=torch.float64))
DIGITS = PointSet(torch.tensor(load_digits().data[:200], dtype=torch.float64) / 8 - 1)
EXTRA = [1, 2.5, 128, 2048]
quiet = [name for name, row in SAMPLERS.items() if not row.stochastic]


@pytest.mark.parametrize("d", EXTRA)
@pytest.mark.parametrize("n", [1, 2, 64])
def test_radii_follow_the_beta_law_and_directions_the_sphere(d, n):
    """R^2/(R^2 + r^2) ~ Beta(N/2, D/2)  (Xu et al. 2023, appendix B). Kolmogorov, false alarm below 1e-9 in all."""
    sde, t, m = PoissonFlow(d), 2.0, 20_000
    x = sde.perturb(torch.zeros(m, n, dtype=torch.float64), t, seed=3)
    r2, big = t**2 * d, x.square().sum(1)
    law = stats.beta(n / 2, d / 2)
    assert oracle.ks_distance((big / (big + r2)).numpy(), law.cdf) < oracle.ks_threshold(m, 5e-11)
    if n == 2:
        angle = torch.atan2(x[:, 1], x[:, 0]).numpy()
        assert oracle.ks_distance(angle, stats.uniform(-math.pi, 2 * math.pi).cdf) < oracle.ks_threshold(m, 5e-11)


def field(points, x, sigma, d):
    """E[(x - x_0)/r | x, r], written out: weights (|x - x_0|^2 + r^2)^(-(N + D)/2)."""
    r2, off = sigma**2 * d, x[:, None] - points
    w = (off.square().sum(2) + r2).log() * (-(points.shape[1] + d) / 2)
    return (w.softmax(1)[..., None] * off).sum(1) / r2**0.5


@pytest.mark.parametrize("d", EXTRA)
def test_the_flow_is_the_field_of_the_charges(d):
    """dx/dr = E[(x - x_0)/r], in sigma: dx/dsigma = sqrt(D) dx/dr."""
    for data in (PLANE, DIGITS):
        sde, x = PoissonFlow(d), data.points[:5] + 0.3
        for t in (0.05, 1.0, 30.0):
            drift = sde.probability_flow(data.score(sde)).drift(x, t)
            torch.testing.assert_close(drift, d**0.5 * field(data.points, x, t, d), rtol=1e-9, atol=1e-9)


def two_samples(a, b, seed):
    """The largest distance of two samples' distribution functions, on three directions and the radius."""
    u = torch.randn(a.shape[1], 3, generator=torch.Generator().manual_seed(seed), dtype=a.dtype)
    parts = zip([*(a @ u).T, a.norm(dim=1)], [*(b @ u).T, b.norm(dim=1)], strict=True)
    return max(stats.ks_2samp(p.numpy(), q.numpy()).statistic for p, q in parts)


@pytest.mark.parametrize("d", EXTRA)
def test_the_flow_carries_the_law_at_T_to_every_other(d):
    """Of 64 dimensions, from x_0's kernel at T (so without the prior's own error) down to t: x_0's kernel at t.

    Two samples of 600 differ by less than sqrt(21.4/600) = .19 but for one time in 1e-9 each. (In the plane, against
    exact distribution functions: test_conformance.)
    """
    sde, n, t, data = PoissonFlow(d), 600, 0.6, DIGITS
    pick = torch.arange(n) % len(data.points)
    x_T = sde.perturb(data.points[pick], sde.T, seed=1)
    got = sample(sde, data.score(sde), x_T.shape, "dpmpp_2m", grid=torch.linspace(80 ** (1 / 7), t ** (1 / 7), 25) ** 7,
                 x_T=x_T, denoise=False)  # fmt: skip
    want = sde.perturb(data.points[pick], t, seed=2)
    limit = math.sqrt(-math.log(1e-9 / 2) / n)
    assert two_samples(got, want, 0) < limit
    other = HeatODE().perturb(data.points[pick], t, seed=2)  # what a Gaussian kernel would have made
    if d == 1:
        assert two_samples(got, other, 0) > limit


@pytest.mark.parametrize("d", EXTRA)
def test_samples_from_the_prior_are_the_points_equally_often(d):
    """Shares of four points, 2,000 samples: chi^2 of 3 degrees, one false alarm in 1e9; the prior's error is in it."""
    sde = PoissonFlow(d)
    x = sample(sde, PLANE.score(sde), (2_000, 2), "unipc_2", nfe=60, seed=0, dtype=torch.float64)
    off = torch.cdist(x, PLANE.points)
    assert float(off.min(1).values.quantile(0.9)) < 1e-2  # of D = 1 some begin at r = 1e9
    counts = torch.bincount(off.argmin(1), minlength=4).double()
    assert float(((counts - 500) ** 2 / 500).sum()) < stats.chi2(3).isf(1e-9)


@pytest.mark.parametrize("d", [1, 3, 128])
def test_likelihood_in_one_dimension_is_the_kernels_density(d):
    """log p at t of three points, in closed form (Student's density), with that at T for the prior; 1e-5 nats."""
    points = torch.tensor([[-1.0], [0.2], [1.5]], dtype=torch.float64)
    sde = PoissonFlow(d)
    sde.t_min = 0.3

    def log_p(x, t):
        return torch.from_numpy(stats.t(d, points.T.numpy(), t).pdf(x.numpy())).mean(1).log()

    x = torch.linspace(-4, 4, 9, dtype=torch.float64)[:, None]
    out = log_likelihood(sde, PointSet(points).score(sde), x, rtol=1e-8, atol=1e-8,
                         prior_log_prob=lambda z: log_p(z, sde.T))  # fmt: skip
    torch.testing.assert_close(out.log_prob, log_p(x, 0.3), rtol=0, atol=1e-5)
    assert all(torch.isnan(y).all() for y in out.interval())
    grid = torch.linspace(-4000, 4000, 80_001, dtype=torch.float64)[:, None]
    assert d == 1 or abs(float(torch.trapezoid(sde.prior_log_prob(grid).exp(), grid[:, 0])) - 1) < 1e-3


def test_many_dimensions_are_the_heat_equation():
    """D = 2^20 to 1e-4 and infinity to the bit: samples, likelihoods; noise, whose length varies by 1/sqrt(2 D)."""
    heat, x = HeatODE(), DIGITS.points[:8]
    for d, atol in ((2.0**20, 1e-4), (math.inf, 0.0)):
        sde = PoissonFlow(d)
        sde.t_min = heat.t_min = 0.3
        noise = [s.perturb(x, 0.5, seed=0) - x for s in (sde, heat)]
        spread = 0.0 if math.isinf(d) else 6.5 / (2 * d) ** 0.5
        torch.testing.assert_close(*noise, rtol=spread, atol=0)
        draws = [sample(s, DIGITS.score(s), x.shape, nfe=12, x_T=heat.prior_sample(x.shape, seed=1, dtype=x.dtype))
                 for s in (sde, heat)]  # fmt: skip
        torch.testing.assert_close(*draws, rtol=0, atol=atol)
        y = x + 0.05
        one, two = (log_likelihood(s, PLANE.score(s), y[:, :2], rtol=1e-8, atol=1e-8).log_prob for s in (sde, heat))
        torch.testing.assert_close(one, two, rtol=max(1e-4, atol) if atol else 0, atol=1e-2 if atol else 0)


@pytest.mark.parametrize("name", quiet)
def test_every_sampler_without_noise_takes_it(name):
    sde = PoissonFlow(128)
    x = sample(sde, PLANE.score(sde), (40, 2), name, steps=60, seed=0, dtype=torch.float64)
    assert float(torch.cdist(x, PLANE.points).min(1).values.median()) < 0.05


def test_adaptive_calibrated_and_under():
    sde = PoissonFlow(3)
    score = PLANE.score(sde)
    x = ode_sample(sde, score, (20, 2), seed=0, dtype=torch.float64)
    assert float(torch.cdist(x, PLANE.points).min(1).values.max()) < 0.02
    made = calibrate(sde, score, (64, 2), nfe=6, seed=0)
    assert sample(sde, score, (20, 2), made, seed=0).isfinite().all()


def test_what_needs_a_brownian_motion_is_refused():
    sde = PoissonFlow(128)
    score = PLANE.score(sde)
    for name in set(SAMPLERS) - set(quiet):
        with pytest.raises(ValueError, match="no reverse SDE"):
            sample(sde, score, (2, 2), name, steps=5, seed=0)
    for run in (lambda: sde_sample(sde, score, (2, 2)), lambda: pc_sample(sde, score, (2, 2), steps=3)):
        with pytest.raises(ValueError, match="no reverse SDE"):
            run()
    for d in (0.5, -1, math.nan, "many"):
        with pytest.raises(ValueError, match="D, the number of dimensions added, must be at least 1"):
            PoissonFlow(d)


def test_the_trainer_draws_from_the_kernel():
    """Of all predictions of x_0 the field's own has the least loss, by E|difference|^2: D = 1, 20,000 draws.

    The Gaussian kernel's is worse by .02 of a variance of 1, sixty standard errors.
    """
    sde, n = PoissonFlow(1.0), 20_000
    x_0 = PLANE.points[torch.arange(n) % 4]
    t = torch.full((n,), 0.7, dtype=torch.float64)
    draw = torch.Generator().manual_seed(0)
    x, eps = _noised(sde, x_0, t, lambda: torch.randn(x_0.shape, generator=draw, dtype=x_0.dtype))
    torch.testing.assert_close(x, x_0 + 0.7 * eps)
    own, other = (s.output(x, t) for s in (PLANE.score(sde), PLANE.score(HeatODE())))
    worse = (other - x_0).square().sum(1) - (own - x_0).square().sum(1)
    want = (other - own).square().sum(1)
    assert float(want.mean()) > 0.02
    assert abs(float((worse - want).mean())) < 6 * float((worse - want).std()) / n**0.5
    assert float(worse.mean()) > 6 * float(worse.std()) / n**0.5


def test_a_trained_network_is_the_field_and_is_kept(tmp_path):
    """E[x_0|x] of a small network within .05 RMS of the oracle's, of a spread of .6; D = 128."""
    sde, data = PoissonFlow(128, T=3.0), PLANE.points.float()
    network = Preconditioned(build("MLP", dim=2, width=64, seed=0), sde, 1.0)
    out = train(network, sde, data.repeat(64, 1), predicts="x0", steps=1000, batch=256, lr=3e-3, ema=0.99, seed=0)
    x = sde.perturb(data.repeat(100, 1), 0.7, seed=5)
    score = as_score(out.network, sde, "x0")
    off = score(x, 0.7).detach() - PLANE.score(sde)(x, 0.7)
    assert float(off.square().mean().sqrt()) * 0.7**2 < 0.05
    save_checkpoint(tmp_path / "net.safetensors", out.network, sde, "x0")
    again, kept = load_checkpoint(tmp_path / "net.safetensors")
    assert (again.D, again.T) == (128.0, 3.0)
    assert torch.equal(kept(x, 0.7), score(x, 0.7))


def test_a_point_set_knows_pure_noise_and_refuses_other_shapes():
    flow = RectifiedFlow()
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = PLANE.points.mean(0).expand(6, 2)
    torch.testing.assert_close(PLANE.score(flow).output(x, torch.tensor(1.0, dtype=torch.float64)), mean)
    each = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    alone = torch.cat([PLANE.score(flow)(x[i : i + 1], each[i]) for i in range(6)])
    torch.testing.assert_close(PLANE.score(flow)(x, each), alone)
    with pytest.raises(ValueError, match=r"x must be \(B, \*\(2,\)\), as the points are"):
        PLANE.score(flow)(torch.ones(2, 3), 0.5)
    with pytest.raises(TypeError, match="points must be a floating tensor"):
        PointSet(torch.ones(2, 3, dtype=torch.int64))
