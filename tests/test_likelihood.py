"""Log density through the flow against exact densities of mixtures."""

import math

import numpy as np
import pytest
import torch

from sdekit import VPSDE, GaussianMixture, SolverError, log_likelihood
from tests.conftest import gaussian_score
from tests.test_fokker_planck import random_mixture


@pytest.mark.parametrize("event", [(1,), (2,), (3, 2)])
def test_exact_log_density_with_the_exact_prior(sde, event):
    """PITFALLS 18-20: within 1e-5 nats at tight tolerance, every process, any event shape."""
    mixture, _ = random_mixture(11, d=math.prod(event))
    x = sde.perturb(mixture.sample(5, seed=0, dtype=torch.float64).reshape(5, *event), sde.t_min, seed=1)
    out = log_likelihood(sde, mixture.score(sde), x, rtol=1e-9, atol=1e-9,
                         prior_log_prob=mixture.at(sde, sde.T).log_prob)  # fmt: skip
    exact = mixture.at(sde, sde.t_min).log_prob(x)
    assert float((out.log_prob - exact).abs().max()) < 1e-5
    assert out.stderr.tolist() == [0.0] * 5
    assert out.latent.shape == x.shape


def test_digits64_at_tight_tolerance_and_what_the_default_prior_costs(digits64):
    """1e-5 nats with the exact prior; with the default one, VP's prior mismatch at T is all that is left (.02)."""
    sde, (_, mixture) = VPSDE(), digits64
    x = sde.perturb(mixture.sample(8, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    exact, at_T = mixture.at(sde, sde.t_min).log_prob(x), mixture.at(sde, sde.T).log_prob
    out = log_likelihood(sde, mixture.score(sde), x, rtol=1e-8, atol=1e-8, prior_log_prob=at_T)
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
        out = log_likelihood(sde, mixture.score(sde), x, divergence="hutchinson", probes=probes, seed=0, rtol=1e-4,
                             atol=1e-4, prior_log_prob=at_T)  # fmt: skip
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
    times = []

    def score(x, t):
        times.append(t)
        return gaussian_score(sde, 0.5)(x, t)

    x = 0.5 * sde.prior_sample((3, 4), seed=0, dtype=torch.float64) / float(sde.sigma(sde.T))
    out = log_likelihood(sde, score, x, divergence=divergence, probes=3, seed=0)
    assert out.nfe == len(times)
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
    whole = log_likelihood(sde, score, x, divergence=divergence, probes=2, seed=3)
    for ids in ([0], [1], [2, 0]):
        part = log_likelihood(sde, score, x[ids], divergence=divergence, probes=2, seed=3, ids=ids)
        assert torch.equal(part.log_prob, whole.log_prob[ids])
        assert torch.equal(part.latent, whole.latent[ids])


def test_density_error_is_not_diluted_by_the_state(digits64):
    """PITFALL 20: at tolerance 1e-3 the mean error is .044 nats; with the density as one of 65 numbers it is .093."""
    sde, (_, mixture) = VPSDE(), digits64
    x = sde.perturb(mixture.sample(16, seed=0, dtype=torch.float64), sde.t_min, seed=1)
    exact, at_T = mixture.at(sde, sde.t_min).log_prob(x), mixture.at(sde, sde.T).log_prob
    out = log_likelihood(sde, mixture.score(sde), x, rtol=1e-3, atol=1e-3, prior_log_prob=at_T)
    assert float((out.log_prob - exact).abs().mean()) < 0.065


def test_vector_jacobian_products_are_chunked(monkeypatch):
    from sdekit import likelihood

    sde, mixture = VPSDE(), random_mixture(2, d=3)[0]
    x = mixture.sample(4, seed=0, dtype=torch.float64)
    whole = log_likelihood(sde, mixture.score(sde), x)
    monkeypatch.setattr(likelihood, "_VJP_NUMBERS", 12)
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
        ({"probes": 0}, ValueError, "probes must be at least 1"),
        ({"probes": 1.5}, TypeError, "probes must be a whole number"),
        ({"rtol": 0.0}, ValueError, "rtol must be a finite number > 0"),
        ({"divergence": "hutchison"}, ValueError, "unknown divergence 'hutchison': did you mean 'hutchinson'"),
        ({"score": lambda x, t: x * math.nan}, FloatingPointError, "NaN or infinite values at t = 1e-05"),
        ({"score": torch.no_grad()(lambda x, t: -x)}, ValueError, "score must be differentiable in x"),
        ({"prior_log_prob": lambda x: x}, ValueError, r"prior_log_prob must return shape \(2,\), got \(2, 2\)"),
        ({"score": lambda x, t: -(x**3) * 1e4}, SolverError, "samples stopped"),
    ],
)
def test_bad_input_is_named(kwargs, error, message):
    sde = VPSDE()
    arguments = {"score": gaussian_score(sde), "x": torch.ones(2, 2, dtype=torch.float64), **kwargs}
    with pytest.raises(error, match=message):
        log_likelihood(sde, **arguments)
