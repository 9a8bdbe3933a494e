"""GaussianMixture against the NumPy oracle, autograd, and bad input."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdekit import VPSDE, GaussianMixture
from tests.conftest import PROCESSES
from tests.processes.test_fokker_planck import random_mixture

TWO = GaussianMixture([[0.0, 0.0]], [[[1.0, 0.0], [0.0, 1.0]]])


@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(PROCESSES)), cut=st.floats(0.01, 1.0))
def test_density_and_score_match_the_oracle(seed, name, cut):
    sde, (mixture, truth) = PROCESSES[name](), random_mixture(seed)
    t = sde.t_min + cut * (sde.T - sde.t_min)
    a, s = float(sde.alpha(t)), float(sde.sigma(t))
    x = sde.perturb(mixture.sample(5, seed=seed, dtype=torch.float64), t, seed=seed)
    y = x.numpy() / a
    want = truth.log_prob(y, s / a) - truth.d * np.log(a)
    np.testing.assert_allclose(mixture.at(sde, t).log_prob(x).numpy(), want, rtol=1e-7, atol=1e-8)
    score = mixture.score(sde)
    np.testing.assert_allclose(score(x, t).numpy(), truth.score(y, s / a) / a, rtol=1e-6, atol=1e-7)
    each = score(x, torch.full((5,), t, dtype=torch.float64))
    torch.testing.assert_close(each, score(x, t))
    torch.testing.assert_close(sde.denoise(x, t, score).numpy(), truth.denoise(y, s / a), rtol=1e-6, atol=1e-6)


def test_event_shape_and_dtype_are_those_of_x(sde):
    rng = np.random.default_rng(0)
    mixture = GaussianMixture(rng.normal(size=(2, 6)), np.stack([np.eye(6), 2 * np.eye(6)]))
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        out = mixture.score(sde)(x.to(dtype), torch.tensor(0.5))
        assert out.shape == x.shape
        assert out.dtype == dtype
        assert mixture.log_prob(x.to(dtype)).dtype == dtype
    flat = mixture.score(sde)(x.reshape(4, 6), 0.5)
    assert torch.equal(mixture.score(sde)(x, 0.5).reshape(4, 6), flat)
    one = GaussianMixture([[0.5]], [[[2.0]]])
    assert one.score(sde)(torch.zeros(3), 0.5).shape == (3,)


def test_moments_of_samples_and_covs():
    """z-tests at 6 sigma on 50,000 draws: p < 2e-9 each."""
    mixture, truth = random_mixture(3, d=2)
    n = 50_000
    x = mixture.sample(n, seed=0, dtype=torch.float64)
    mean = (truth.w[:, None] * truth.m).sum(0)
    cov = np.einsum("k,kij->ij", truth.w, truth.covs + np.einsum("ki,kj->kij", truth.m, truth.m)) - np.outer(mean, mean)
    assert np.abs((x.mean(0).numpy() - mean) / np.sqrt(np.diag(cov) / n)).max() < 6
    np.testing.assert_allclose(np.cov(x.numpy().T), cov, atol=6 * np.sqrt(4 / n) * np.diag(cov).max())
    np.testing.assert_allclose(mixture.covs.numpy(), truth.covs, atol=1e-12)
    assert torch.equal(mixture.sample(5, seed=1), mixture.sample(9, seed=1)[:5])


@given(seed=st.integers(0, 2**31), name=st.sampled_from(sorted(PROCESSES)), cut=st.floats(0.01, 1.0))
def test_the_posterior_matches_the_oracle(seed, name, cut):
    """Weights, means, covariances, density and the conditional score at every t, by precisions."""
    sde, (mixture, truth) = PROCESSES[name](), random_mixture(seed)
    rng, d = np.random.default_rng(seed), truth.d
    a, std = rng.normal(size=(rng.integers(1, d + 2), d)), rng.uniform(0.05, 1.0)
    std = std if seed % 2 else std * rng.uniform(0.5, 1.0, len(a))
    y = a @ truth.sample(1, rng)[0] + std * rng.standard_normal(len(a))
    posterior, (want, _) = mixture.posterior(torch.from_numpy(a), y, std), truth.posterior(a, y, std)
    np.testing.assert_allclose(posterior.weights, want.w, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(posterior.means, want.m, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(posterior.covs, want.covs, rtol=1e-6, atol=1e-8)
    t = sde.t_min + cut * (sde.T - sde.t_min)
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    x = sde.perturb(posterior.sample(5, seed=seed, dtype=torch.float64), t, seed=seed)
    score = want.score(x.numpy() / alpha, sigma / alpha) / alpha
    np.testing.assert_allclose(posterior.score(sde)(x, t), score, rtol=1e-5, atol=1e-5 * np.abs(score).max())
    called = mixture.posterior(lambda x: (x @ torch.from_numpy(a).T).reshape(len(x), -1, 1), y, std)
    np.testing.assert_allclose(called.means, posterior.means, rtol=1e-9, atol=1e-10)


def test_without_noise_what_is_seen_is_known():
    mixture, _ = random_mixture(3, d=3)
    posterior = mixture.posterior([[1.0, 0.0, 1.0]], [0.7], 0.0)
    x = posterior.sample(4, seed=0, dtype=torch.float64)
    torch.testing.assert_close(x[:, 0] + x[:, 2], torch.full((4,), 0.7, dtype=torch.float64), rtol=0, atol=1e-7)
    assert float(x[:, 1].diff().abs().min()) > 1e-3
    assert posterior.score(VPSDE())(x, 0.01).isfinite().all()
    with pytest.raises(ValueError, match="no density"):
        posterior.log_prob(x)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianMixture([[0.0]], [[[-1.0]]]), r"positive definite: covs\[0\] has the eigenvalue -1"),
        (lambda: GaussianMixture([[0.0, 0.0]], [[[1.0, 2.0], [2.0, 1.0]]]), "positive definite"),
        (lambda: GaussianMixture([[0.0, 0.0]], [[[1.0, 0.5], [0.0, 1.0]]]), "symmetric"),
        (lambda: GaussianMixture([[0.0], [1.0]], [[[1.0]]] * 2, [0.5, 0.6]), "sum to 1"),
        (lambda: GaussianMixture([[0.0], [1.0]], [[[1.0]]] * 2, [1.5, -0.5]), "numbers >= 0"),
        (lambda: GaussianMixture([[0.0], [1.0]], [[[1.0]]] * 2, [1.0]), "2 numbers"),
        (lambda: GaussianMixture([0.0], [[[1.0]]]), r"means must be \(K, D\)"),
        (lambda: GaussianMixture([[np.nan]], [[[1.0]]]), "finite"),
        (lambda: GaussianMixture([[0.0]], [[[1.0]]]).log_prob(torch.zeros(2, 3)), "1 entries per sample"),
        (lambda: GaussianMixture([[0.0]], [[[1.0]]]).sample(3, dtype=torch.int64), "dtype must be floating"),
        (lambda: GaussianMixture([[0.0]], [[[1.0]]]).log_prob(torch.ones(2, 1).long()), "x must be floating"),
        (lambda: TWO.posterior([[1.0]], [0.0], 0.1), r"A must be a finite matrix \(d_y, 2\).*got \(1, 1\)"),
        (
            lambda: TWO.posterior([[1.0, 0.0]], [[0.0]], 0.1),
            r"y must be one observation, 1 finite .*got shape \(1, 1\)",
        ),
        (lambda: TWO.posterior([[1.0, 0.0]], [np.nan], 0.1), "y must be one observation, 1 finite"),
        (lambda: TWO.posterior([[1.0, 0.0]], [0.0], -0.1), "std must be a finite number >= 0"),
        (lambda: TWO.posterior([[1.0, 0.0]], [0.0], [0.1, 0.1]), "std must be a finite number >= 0, or 1 of them"),
        (lambda: TWO.posterior([[1.0, 0.0], [2.0, 0.0]], [0.0, 0.0], 0.0), "rows of A must be independent"),
        (lambda: TWO.posterior(lambda x: x**2, [0.0, 0.0], 0.1), "A must be linear.* differ by"),
        (lambda: TWO.posterior(lambda x: x + 1, [0.0, 0.0], 0.1), "A must be linear"),
        (lambda: GaussianMixture([[0.0]], [[[1.0]]]).sample(0), "n must be at least 1"),
        (lambda: GaussianMixture([[0.0]], [[[1.0]]]).at(VPSDE(), torch.tensor([0.1, 0.2])), "t must be one time"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
