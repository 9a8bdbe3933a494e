"""Log density through the flow against exact densities of mixtures."""

import math

import numpy as np
import pytest
import torch

from sdekit import VPSDE, GaussianMixture, SolverError, log_likelihood, sample_with_log_prob
from sdekit.likelihood import flow
from tests.conftest import gaussian_score
from tests.processes.test_fokker_planck import random_mixture


@pytest.mark.parametrize("event", [(1,), (2,), (4, 16)])
def test_a_millionth_of_a_nat_with_exact_ends(sde, event):
    """Every process, 1, 2 and 64 dimensions, tight tolerance, exact divergence: 1e-6 nats against exact marginals."""
    mixture, _ = random_mixture(11, d=math.prod(event))
    x = sde.perturb(mixture.sample(2, seed=0, dtype=torch.float64).reshape(2, *event), sde.t_min, seed=1)
    out = log_likelihood(sde, mixture.score(sde), x, rtol=1e-8, atol=1e-8,
                         prior_log_prob=mixture.at(sde, sde.T).log_prob)  # fmt: skip
    exact = mixture.at(sde, sde.t_min).log_prob(x)
    assert float((out.log_prob - exact).abs().max()) < 1e-6
    assert float((out.solver_error - (out.log_prob - exact).abs()).min()) > -1e-8  # rounding is not in the budget


@pytest.mark.parametrize("d", [1, 2, 16])
def test_the_budgets_corrections_lead_to_the_data_and_its_errors_hold(sde, d):
    """With the default prior: within .005 nats of the marginal at t = 0, and each part within its own error."""
    mixture, _ = random_mixture(11, d=d)
    data, at_T = mixture.at(sde, 0.0), mixture.at(sde, sde.T)
    x = sde.perturb(mixture.sample(6, seed=0, dtype=torch.float64), 0.0, seed=1)
    out = log_likelihood(sde, mixture.score(sde), x, rtol=1e-6, atol=1e-6)
    truncation = data.log_prob(x) - mixture.at(sde, sde.t_min).log_prob(x)
    mismatch = at_T.log_prob(out.latent) - sde.prior_log_prob(out.latent)
    assert float((out.truncation - truncation).abs().max()) < 0.002
    assert float((out.prior_mismatch - mismatch).abs().max()) < 0.002
    assert bool(((out.truncation - truncation).abs() <= out.truncation_error + 1e-7).all())
    assert bool(((out.prior_mismatch - mismatch).abs() <= out.prior_error + 1e-7).all())
    assert float((out.corrected - data.log_prob(x)).abs().max()) < 0.005
    low, high = out.interval()
    assert bool(((low <= data.log_prob(x)) & (data.log_prob(x) <= high)).all())


def test_targets_on_digits64(digits64):
    """TARGETS 4: VP, data points, the default prior: .024 nats in at most 49 evaluations, .005 in at most 98."""
    sde, (_, mixture) = VPSDE(), digits64
    x = mixture.sample(24, seed=0, dtype=torch.float64)
    for tol, most, error in ((1e-3, 49, 0.024), (1e-4, 98, 0.005)):
        out = log_likelihood(sde, mixture.score(sde), x, rtol=tol, atol=tol)
        assert float(out.nfe_per_sample.double().mean()) <= most
        assert float((out.corrected - mixture.log_prob(x)).abs().mean()) <= error
        assert bool(((out.corrected - mixture.log_prob(x)).abs() <= out.solver_error + out.prior_error).all())


def test_gradients_of_the_density_are_the_score_and_reach_the_parameters():
    """differentiable: d log p/dx is the score at t_min; d log p/d std of a Gaussian model is the closed form."""
    sde, std = VPSDE(), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    a, s = float(sde.alpha(sde.t_min)), float(sde.sigma(sde.t_min))

    def score(x, t):
        return gaussian_score(sde, std)(x, t)

    def prior(x):
        v = float(sde.alpha(sde.T)) ** 2 * std**2 + float(sde.sigma(sde.T)) ** 2
        return (-0.5 * x**2 / v - 0.5 * (2 * math.pi * v).log()).sum(1)

    x = torch.tensor([[0.3, -0.8], [0.1, 1.2]], dtype=torch.float64, requires_grad=True)
    out = log_likelihood(sde, score, x, rtol=1e-7, atol=1e-7, prior_log_prob=prior, differentiable=True)
    dx, dstd = torch.autograd.grad(out.log_prob.sum(), (x, std))
    v = a**2 * std**2 + s**2
    torch.testing.assert_close(dx, (-x / v).detach(), rtol=0, atol=1e-4)
    exact = ((x**2 / v - 1) / v * a**2 * std).sum()
    torch.testing.assert_close(dstd, exact.detach(), rtol=1e-4, atol=1e-4)
    assert not out.solver_error.requires_grad
    assert not log_likelihood(sde, score, x, rtol=1e-2, atol=1e-2).log_prob.requires_grad


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_samples_come_with_their_density(sde, divergence):
    """Sampling and density in one solve: the density is that of the sample, and running back finds the same."""
    mixture, _ = random_mixture(3, d=2)
    at_T, end = mixture.at(sde, sde.T).log_prob, mixture.at(sde, sde.t_min)
    kwargs = {"divergence": divergence, "probes": 4, "rtol": 1e-6, "atol": 1e-6, "seed": 5, "prior_log_prob": at_T}
    x, out = sample_with_log_prob(sde, mixture.score(sde), (3, 2), dtype=torch.float64, **kwargs)
    assert torch.equal(out.latent, sde.prior_sample((3, 2), seed=5, dtype=torch.float64))
    back = log_likelihood(sde, mixture.score(sde), x, **kwargs)
    torch.testing.assert_close(back.log_prob, out.log_prob, rtol=0, atol=1e-4)
    torch.testing.assert_close(back.latent, out.latent, rtol=1e-4, atol=1e-4 * float(sde.sigma(sde.T)))
    if divergence == "exact":
        torch.testing.assert_close(out.log_prob, end.log_prob(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(out.truncation, back.truncation, rtol=1e-2, atol=1e-4)


class _Linear:
    """Data N(0, C) in d dimensions, with a covariance whose eigenvectors are not the axes; cheap for many points."""

    def __init__(self, d=24, seed=0):
        rng = np.random.default_rng(seed)
        q, _ = np.linalg.qr(rng.standard_normal((d, d)))
        self.q, self.ev = torch.from_numpy(q), torch.logspace(-2, 0, d, dtype=torch.float64)

    def score(self, sde):
        def score(x, t):
            v = sde.alpha(t).reshape(-1, 1) ** 2 * self.ev + sde.sigma(t).reshape(-1, 1) ** 2
            return -((x @ self.q) / v) @ self.q.T

        return score

    def log_prob(self, x):
        return (-0.5 * (x @ self.q) ** 2 / self.ev - 0.5 * (2 * math.pi * self.ev).log()).sum(1)


@pytest.mark.parametrize("probes", [4, 12, 40])
def test_intervals_cover_the_truth_as_often_as_they_say(probes):
    """95 % intervals over 2,000 points cover 93 to 97 % (an interval of true 95 % fails this once in 25,000 runs; the
    draws are seeded). The data's eigenvectors are not the axes: on the axes Rademacher probes would be exact."""
    sde, data = VPSDE(), _Linear()
    z = torch.randn(2000, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (z * data.ev.sqrt()) @ data.q.T
    out = log_likelihood(sde, data.score(sde), x, divergence="hutchinson", probes=probes, seed=2, rtol=1e-4, atol=1e-4)
    low, high = out.interval()
    exact = data.log_prob(x)
    cover = float(((low <= exact) & (exact <= high)).double().mean())
    assert 0.93 <= cover <= 0.97
    assert float(out.stderr.median()) > 20 * float(out.solver_error.median()), "the probes must be what is tested"


def test_digits64_at_tight_tolerance_and_what_the_default_prior_costs(digits64):
    """1e-5 nats with the exact prior; with the default one, VP's prior mismatch at T is all that is left (.02)."""
    sde, (_, mixture) = VPSDE(), digits64
    x = sde.perturb(mixture.sample(4, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    exact, at_T = mixture.at(sde, sde.t_min).log_prob(x), mixture.at(sde, sde.T).log_prob
    out = log_likelihood(sde, mixture.score(sde), x, rtol=1e-7, atol=1e-8, prior_log_prob=at_T)
    assert float((out.log_prob - exact).abs().max()) < 1e-5
    default = out.log_prob - at_T(out.latent) + sde.prior_log_prob(out.latent)
    off = (default - exact).abs()
    assert 0.001 < float(off.mean()) < 0.06
    mismatch = sde.prior_log_prob(out.latent) - at_T(out.latent)
    torch.testing.assert_close(default - mismatch, exact, rtol=0, atol=1e-5)


def test_default_prior_is_the_processes_own(sde):
    mixture, _ = random_mixture(5, d=2)
    x = sde.perturb(mixture.sample(3, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    a = log_likelihood(sde, mixture.score(sde), x)
    b = log_likelihood(sde, mixture.score(sde), x, prior_log_prob=sde.prior_log_prob)
    assert torch.equal(a.log_prob, b.log_prob)


def test_hutchinson_is_unbiased_and_its_error_bar_is_true(digits64):
    """Errors over stderr have unit spread (z of 128 points within 6/sqrt(2*128)); four times the probes halve it."""
    sde, (_, mixture) = VPSDE(), digits64
    x = sde.perturb(mixture.sample(128, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    exact = mixture.at(sde, sde.t_min).log_prob(x)
    at_T = mixture.at(sde, sde.T).log_prob
    spread = {}
    for probes in (8, 32):
        out = log_likelihood(sde, mixture.score(sde), x, divergence="hutchinson", probes=probes, seed=0, rtol=1e-3,
                             atol=1e-3, prior_log_prob=at_T)  # fmt: skip
        z = (out.log_prob - exact) / out.stderr
        df = probes - 1
        assert abs(float(z.mean())) < 6 / 128**0.5 * math.sqrt(df / (df - 2)) + 0.1
        assert float(z.square().mean()) == pytest.approx(df / (df - 2), rel=0.75)
        spread[probes] = float(out.stderr.mean())
    assert spread[8] / spread[32] == pytest.approx(2.0, rel=0.15)


def test_a_single_probe_claims_no_error_bar(digits64):
    sde, (_, mixture) = VPSDE(), digits64
    x = mixture.sample(4, seed=0)
    out = log_likelihood(sde, mixture.score(sde), x, divergence="hutchinson", seed=0, rtol=1e-3, atol=1e-3)
    assert torch.isnan(out.stderr).all()
    assert torch.isfinite(out.log_prob).all()
    again = log_likelihood(sde, mixture.score(sde), x, divergence="hutchinson", seed=0, rtol=1e-3, atol=1e-3)
    assert torch.equal(out.log_prob, again.log_prob)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_one_network_pass_per_right_hand_side(sde, divergence):
    """PITFALL 21: nfe is what a counter inside the network says, and its times lie inside the interval."""
    times, points = [], []

    def score(x, t):
        times.append(t)
        points.append(x.detach().clone())
        return gaussian_score(sde, 0.5)(x, t)

    x = 0.5 * sde.prior_sample((3, 4), seed=0, dtype=torch.float64) / float(sde.sigma(sde.T))
    out = log_likelihood(sde, score, x, divergence=divergence, probes=3, seed=0)
    assert out.nfe == len(times)
    for i in range(1, len(times)):  # the drift and its divergence by one pass, not by two of the same point
        assert not (torch.equal(times[i], times[i - 1]) and torch.equal(points[i], points[i - 1]))
    assert float(torch.cat(times).min()) >= sde.t_min
    assert float(torch.cat(times).max()) <= sde.T
    v0 = float(sde.alpha(sde.t_min) ** 2 * 0.25 + sde.sigma(sde.t_min) ** 2)
    exact = (-0.5 * x**2 / v0 - 0.5 * math.log(2 * math.pi * v0)).sum(1)
    # an isotropic Jacobian: Rademacher probes are exact too; the default prior is off by its mismatch
    vT = float(sde.alpha(sde.T) ** 2 * 0.25 + sde.sigma(sde.T) ** 2)
    prior_T = (-0.5 * out.latent**2 / vT - 0.5 * math.log(2 * math.pi * vT)).sum(1)
    got = out.log_prob - sde.prior_log_prob(out.latent) + prior_T
    torch.testing.assert_close(got, exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_sample_is_the_same_alone_and_in_any_batch(sde, divergence):
    """PITFALL 20: one sample's density decides its own steps only."""
    x = torch.tensor([[0.1, 0.2], [3.0, -2.0], [30.0, 10.0]])
    score = gaussian_score(sde, 0.3)
    how = {"divergence": divergence, "probes": 2, "seed": 3, "rtol": 1e-3, "atol": 1e-3}
    whole = log_likelihood(sde, score, x, **how)
    for ids in ([0], [1], [2, 0]):
        part = log_likelihood(sde, score, x[ids], ids=ids, **how)
        assert torch.equal(part.log_prob, whole.log_prob[ids])
        assert torch.equal(part.latent, whole.latent[ids])


def test_density_error_is_not_diluted_by_the_state(digits64):
    """PITFALL 20: .013 nats at tolerance 1e-3; .034 with the density as one of 65 numbers, .060 with it left out."""
    sde, (_, mixture) = VPSDE(), digits64
    x = sde.perturb(mixture.sample(16, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    exact, at_T = mixture.at(sde, sde.t_min).log_prob(x), mixture.at(sde, sde.T).log_prob
    out = log_likelihood(sde, mixture.score(sde), x, rtol=1e-3, atol=1e-3, prior_log_prob=at_T)
    assert float((out.log_prob - exact).abs().mean()) < 0.022


def test_vector_jacobian_products_are_chunked(monkeypatch):
    from sdekit.likelihood import density

    sde, mixture = VPSDE(), random_mixture(2, d=3)[0]
    x = mixture.sample(4, seed=0, dtype=torch.float64)
    whole = log_likelihood(sde, mixture.score(sde), x)
    monkeypatch.setattr(density, "_VJP_NUMBERS", 12)
    torch.testing.assert_close(log_likelihood(sde, mixture.score(sde), x).log_prob, whole.log_prob)


def test_float32_network_and_module_state():
    """No gradient is left on the user's tensor, and float32 works to float32's accuracy."""
    sde, mixture = VPSDE(), GaussianMixture([[0.0, 0.0]], [np.eye(2)])
    x = mixture.sample(3, seed=0)
    out = log_likelihood(sde, mixture.score(sde), x)
    assert not x.requires_grad
    assert not out.log_prob.requires_grad
    assert out.log_prob.dtype == torch.float32
    assert float((out.log_prob - mixture.log_prob(x)).abs().max()) < 2e-3


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"x": torch.ones(2, 2, dtype=torch.int64)}, TypeError, "x must be a floating tensor"),
        ({"x": torch.full((2, 2), math.nan)}, ValueError, "x holds 4 non-finite"),
        ({"x": torch.ones(2, 2, dtype=torch.float16)}, TypeError, "x must be float32 or float64"),
        ({"probes": 0}, ValueError, "probes must be at least 1"),
        ({"probes": 1.5}, TypeError, "probes must be a whole number"),
        ({"rtol": 0.0}, ValueError, "rtol must be a finite number > 0"),
        ({"divergence": "hutchison"}, ValueError, "unknown divergence 'hutchison': did you mean 'hutchinson'"),
        ({"score": lambda x, t: x * math.nan}, FloatingPointError, "NaN or infinite values at t = 1e-05"),
        ({"score": torch.no_grad()(lambda x, t: -x)}, ValueError, "score must be differentiable in x"),
        (
            {"score": lambda x, t: torch.ones_like(x, requires_grad=True) * 2},
            ValueError,
            "score must be differentiable",
        ),
        ({"prior_log_prob": lambda x: x}, ValueError, r"prior_log_prob must return shape \(2,\), got \(2, 2\)"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    sde = VPSDE()
    arguments = {"score": gaussian_score(sde), "x": torch.ones(2, 2, dtype=torch.float64), **kwargs}
    with pytest.raises(error, match=message):
        log_likelihood(sde, **arguments)


def test_a_flow_that_runs_away_is_said_to(monkeypatch):
    monkeypatch.setattr(flow, "_MAX_NFE", 300)
    with pytest.raises(SolverError, match="2 of 2 samples stopped: the evaluation limit") as caught:
        log_likelihood(VPSDE(), lambda x, t: -(x**3) * 1e4, torch.ones(2, 2, dtype=torch.float64))
    assert caught.value.solution.nfe <= 300
    assert "max_nfe" not in str(caught.value)  # which is no argument here: rtol and atol are


def test_an_exact_divergence_does_not_depend_on_the_batch_in_many_dimensions():
    """A sum over 64 unit vectors of one sample rounds as among five."""
    sde = VPSDE()

    def score(x, t):  # entry by entry
        return -x - x**3 / (1 + x * x)

    x = torch.linspace(-1, 1, 5 * 64).sin().reshape(5, 64)
    whole = log_likelihood(sde, score, x, rtol=1e-2, atol=1e-2)
    alone = log_likelihood(sde, score, x[2:3], rtol=1e-2, atol=1e-2)
    assert torch.equal(alone.log_prob, whole.log_prob[2:3])
    assert torch.equal(alone.solver_error, whole.solver_error[2:3])


def test_what_is_left_of_the_truncation_falls_fast_with_t_min():
    """Half of a late t_min leaves a 22nd here, within the error reported (a 9th with the mixed term's sign wrong)."""
    mixture, _ = random_mixture(4, d=2)
    x = mixture.sample(16, seed=0, dtype=torch.float64)
    left = []
    for t_min in (0.02, 0.01):
        sde = VPSDE()
        sde.t_min = t_min
        out = log_likelihood(sde, mixture.score(sde), x, rtol=1e-3, atol=1e-3)
        off = (out.truncation - (mixture.log_prob(x) - mixture.at(sde, t_min).log_prob(x))).abs()
        assert float((off <= out.truncation_error).double().mean()) >= 0.9
        left.append(float(off.mean()))
    assert left[0] / left[1] > 15


def test_inference_mode_and_a_start_with_gradient():
    sde, mixture = VPSDE(), GaussianMixture([[0.0, 0.0]], [np.eye(2)])
    x = mixture.sample(3, seed=0)
    with torch.inference_mode():
        inside = log_likelihood(sde, mixture.score(sde), x).log_prob
    assert torch.equal(inside, log_likelihood(sde, mixture.score(sde), x).log_prob)
    _, out = sample_with_log_prob(sde, mixture.score(sde), (3, 2), x_T=x.requires_grad_(), rtol=1e-2, atol=1e-2)
    assert not out.log_prob.requires_grad
    assert not out.latent.requires_grad


def test_an_exact_divergence_that_no_memory_holds_is_refused_before_it_is_allocated():
    sde = VPSDE()
    with pytest.raises(ValueError, match=r"196,608 vector-Jacobian.*\(3, 256, 256\).*144 GiB.*hutchinson"):
        log_likelihood(sde, gaussian_score(sde), torch.zeros(1, 3, 256, 256))
