"""Correlated noise: the process inside for L^-1 x, to rounding; the law, and likelihoods in closed form."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

from sdekit import (
    SAMPLERS,
    VESDE,
    VPSDE,
    CorrelatedSDE,
    GaussianMixture,
    HeatODE,
    PointSet,
    PoissonFlow,
    RectifiedFlow,
    as_score,
    log_likelihood,
    ode_sample,
    pc_sample,
    sample,
    sample_with_log_prob,
    sde_sample,
    solve,
    variational_bound,
)
from sdekit.models.derived import Whitened
from sdekit.noise import BrownianPath
from sdekit.posterior import Observation, posterior_score
from sdekit.training import build, train
from tests import oracle

D = 6
AT = torch.arange(D, dtype=torch.float64)
FAR = (AT[:, None] - AT).abs()
K = (1 + 3**0.5 * FAR / 2) * torch.exp(-(3**0.5) * FAR / 2)  # Matern 3/2 of length 2 on a grid
L = torch.linalg.cholesky(K)
RNG = np.random.default_rng(0)
ROOT = RNG.normal(size=(2, D, D)) * 0.3
DATA = GaussianMixture(RNG.normal(size=(2, D)), ROOT @ ROOT.transpose(0, 2, 1) + 0.1 * np.eye(D), [0.3, 0.7])
INSIDE = {"VP": VPSDE, "VE": VESDE, "heat": HeatODE, "flow": RectifiedFlow}


def test_the_kernel_is_what_it_says():
    """Mean alpha x_0 and covariance sigma^2 K of 40,000 draws, each entry within 6.5 standard errors (1e-8 in all)."""
    sde, n, t = CorrelatedSDE(VPSDE(), K), 40_000, 0.4
    x_0 = torch.linspace(-1, 1, D, dtype=torch.float64).expand(n, D)
    off = (sde.perturb(x_0, t, seed=0) - float(sde.alpha(t)) * x_0) / float(sde.sigma(t))
    assert float(off.mean(0).abs().max()) < 6.5 / n**0.5
    got, spread = off.T @ off / n, ((K.diagonal()[:, None] * K.diagonal() + K**2) / n).sqrt()
    assert float(((got - K) / spread).abs().max()) < 6.5
    z = sde.prior_sample((n, D), seed=1, dtype=torch.float64) / float(sde.sigma(1.0))
    assert float(((z.T @ z / n - K) / spread).abs().max()) < 6.5


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_the_white_one_of_the_whitened(inside, name):
    """From the same draws: x is L times what the process inside makes of L^-1 x. No rule knows. 1e-9."""
    sde = CorrelatedSDE(INSIDE[inside](), K)
    sde.t_min = sde.white.t_min = max(sde.t_min, 5e-4 * sde.T)
    score, white = DATA.score(sde), sde.white
    grid = torch.linspace(0.98 * sde.T, sde.t_min, 9, dtype=torch.float64)
    x = sample(sde, score, (3, D), name, grid=grid, seed=5, dtype=torch.float64)
    y = sample(white, Whitened(score, sde), (3, D), name, grid=grid, seed=5, dtype=torch.float64)
    if name != "edm" and not name.startswith("pc"):  # whose step sizes are norms
        torch.testing.assert_close(x, sde.colour(y), rtol=0, atol=1e-9 * (1 + float(x.abs().max())))


@pytest.mark.parametrize("name", ["unipc_2", "ancestral", "sa_solver", "euler_maruyama", "pc"])
def test_samples_are_the_data(name):
    """4,000 draws on three directions, false alarm 1e-9 each. White noise in a sampler's place is seen."""
    sde, n = CorrelatedSDE(VPSDE(), K), 4_000
    truth = oracle.Mixture(*(y.numpy() for y in (DATA.means, DATA.covs, DATA.weights)))
    x = sample(sde, DATA.score(sde), (n, D), name, steps=400, grid="karras", seed=0, dtype=torch.float64).numpy()
    for seed in range(3):
        v = np.random.default_rng(seed).normal(size=D)
        v /= np.linalg.norm(v)
        assert oracle.ks_distance(x @ v, truth.projected_cdf(v, 1.0, 1e-6)) < oracle.ks_threshold(n, 1e-9) + 0.02


def test_adaptive_samplers_follow_a_correlated_path():
    """sde_sample's is L times a Brownian path, and ode_sample's answer that of the flow inside."""
    sde = CorrelatedSDE(VPSDE(), K)
    score = DATA.score(sde)
    like = torch.empty(3, D, dtype=torch.float64)
    one, other = (BrownianPath(like, 4, start=0.0, end=1.0, root=root) for root in (sde.root, None))
    torch.testing.assert_close(one.increment(0.2, 0.7), sde.colour(other.increment(0.2, 0.7)))
    x = sde_sample(sde, score, (200, D), seed=0, rtol=0.02, atol=0.02, dtype=torch.float64)
    mean = (DATA.weights[:, None] * DATA.means).sum(0)
    assert float((x.mean(0) - mean).abs().max()) < 0.5
    out = ode_sample(sde, score, (3, D), seed=1, rtol=1e-8, atol=1e-8, dtype=torch.float64)
    want = sde.colour(
        ode_sample(sde.white, Whitened(score, sde), (3, D), seed=1, rtol=1e-8, atol=1e-8, dtype=torch.float64)
    )
    torch.testing.assert_close(out, want, rtol=0, atol=1e-6)
    y = solve(sde.reverse(score), sde.prior_sample((2, D), seed=0, dtype=torch.float64), torch.linspace(1, 0.01, 9),
              "torchsde:euler").x  # fmt: skip
    assert y.isfinite().all()


@pytest.mark.parametrize("inside", ["VP", "heat", "flow"])
def test_the_likelihood_of_gaussian_data_to_1e_8(inside):
    """log p at t_min in closed form, N(alpha m, alpha^2 C + sigma^2 K), with the exact law at T for the prior."""
    sde = CorrelatedSDE(INSIDE[inside](), K)
    one = GaussianMixture(DATA.means[:1], DATA.covs[:1])
    x = one.sample(3, seed=0, dtype=torch.float64)
    end = one.at(sde, sde.T)
    out = log_likelihood(sde, one.score(sde), x, rtol=1e-10, atol=1e-10, prior_log_prob=end.log_prob)
    a, s = (float(y(sde.t_min)) for y in (sde.alpha, sde.sigma))
    cov = a**2 * one.covs[0].numpy() + s**2 * K.numpy()
    want = stats.multivariate_normal(a * one.means[0].numpy(), (cov + cov.T) / 2).logpdf(x.numpy())
    torch.testing.assert_close(out.log_prob, torch.from_numpy(want), rtol=0, atol=1e-8)
    torch.testing.assert_close(out.log_prob, one.at(sde, sde.t_min).log_prob(x), rtol=0, atol=1e-8)
    default = log_likelihood(sde, one.score(sde), x, rtol=1e-6, atol=1e-6)  # and with its own corrections of both ends
    torch.testing.assert_close(default.corrected, one.log_prob(x), rtol=0, atol=2e-3)
    prior = stats.multivariate_normal(np.zeros(D), float(sde.sigma(sde.T)) ** 2 * K.numpy()).logpdf(x.numpy())
    torch.testing.assert_close(sde.prior_log_prob(x), torch.from_numpy(prior), rtol=0, atol=1e-8)
    drawn, found = sample_with_log_prob(sde, one.score(sde), (3, D), seed=1, rtol=1e-7, atol=1e-7, dtype=torch.float64,
                                        prior_log_prob=end.log_prob)  # fmt: skip
    torch.testing.assert_close(found.log_prob, one.at(sde, sde.t_min).log_prob(drawn), rtol=0, atol=1e-5)


def test_the_score_is_k_times_the_gradient():
    sde, x = CorrelatedSDE(VPSDE(), K), DATA.sample(4, seed=1, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(DATA.at(sde, 0.3).log_prob(x).sum(), x)
    torch.testing.assert_close(DATA.score(sde)(x, 0.3), slope @ K, rtol=1e-8, atol=1e-8)


def test_a_filter_on_pictures_as_the_root():
    """A periodic blur in Fourier's space, without a matrix: pictures' noise has its spectrum."""
    freq = torch.fft.fftfreq(8, dtype=torch.float64)
    gain = 1 / (1 + 30 * (freq[:, None] ** 2 + freq**2))

    def filtered(x, power=1.0):
        return torch.fft.ifft2(torch.fft.fft2(x) * gain.to(x) ** power).real

    sde = CorrelatedSDE(VPSDE(), root=filtered, inverse=lambda x: filtered(x, -1.0), log_det=float(gain.log().sum()))
    points = PointSet(torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    z = sde.prior_sample((4_000, 1, 8, 8), seed=0, dtype=torch.float64)
    power = torch.fft.fft2(z).abs().square().mean(0)[0] / 64
    assert float((power / gain**2 - 1).abs().max()) < 6.5 * (2 / 4000) ** 0.5
    x = sample(sde, points.score(sde), (6, 1, 8, 8), "ancestral", steps=60, grid="karras", seed=0, dtype=torch.float64)
    assert float(torch.cdist(x.flatten(1), points.points.flatten(1)).min(1).values.max()) < 0.05
    assert log_likelihood(sde, points.score(sde), x).log_prob.isfinite().all()
    bare = CorrelatedSDE(VPSDE(), root=filtered)
    assert sample(bare, lambda x, t: -x, (2, 1, 8, 8), "ancestral", steps=3, seed=0).isfinite().all()
    for run, message in (
        (lambda: bare.prior_log_prob(z), "inverse="), (lambda: bare.log_volume(), "log_det="),
        (lambda: points.score(bare)(z[:2], 0.5), "inverse="),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run()


def test_a_root_of_ones_own_is_checked():
    like = torch.ones(3, 2, dtype=torch.float32)
    wide = CorrelatedSDE(VPSDE(), root=lambda x: 2 * x.double(), inverse=lambda x: x / 2, log_det=0.0)
    assert wide.perturb(like, 0.3, seed=0).dtype == wide.colour(like).dtype == torch.float32
    with pytest.raises(
        ValueError, match=r"root must return a floating tensor like x, \(3, 2\), got torch.float32 \(3, 1\)"
    ):
        CorrelatedSDE(VPSDE(), root=lambda x: x[:, :1]).perturb(like, 0.3, seed=0)
    with pytest.raises(ValueError, match=r"inverse is not root's: root\(inverse\(x\)\) and x differ by 50 %"):
        CorrelatedSDE(VPSDE(), root=lambda x: 2 * x, inverse=lambda x: x / 4, log_det=0.0).prior_log_prob(like)


def test_the_trainer_uses_the_process_s_noise():
    """A network that says nothing has the loss E|eps|^2 = tr K/D where it predicts eps."""
    k = torch.diag(torch.tensor([4.0, 0.25]))
    sde, losses = CorrelatedSDE(VPSDE(), k), []

    class Nothing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            return x * self.w

    for seed in range(3):
        out = train(Nothing(), sde, torch.zeros(64, 2), predicts="eps", steps=1, batch=4096, seed=seed, lr=1e-9)
        losses.append(out.losses[0] if hasattr(out, "losses") else out.loss)
    assert all(abs(float(loss) - 2.125) < 0.4 for loss in losses)
    assert build("MLP", dim=2, width=8)


def test_bad_input_is_named():
    for arguments, message in (
        ((VPSDE(), torch.ones(2, 3)), r"covariance must be a finite matrix \(D, D\), got shape \(2, 3\)"),
        ((VPSDE(), -K), "covariance must be positive definite: its smallest eigenvalue is -"),
        ((VPSDE(), torch.ones(2, 2)), "add a little to its diagonal"),
        ((VPSDE(),), "give covariance, the matrix K, or root"),
        ((PoissonFlow(), K), "CorrelatedSDE is for processes of white Gaussian noise, which PoissonFlow has not"),
        (
            (CorrelatedSDE(VPSDE(), K), K),
            "CorrelatedSDE is for processes of white Gaussian noise, which CorrelatedSDE has not",
        ),
        ((VPSDE, K), "sde must be a process, not its class"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            CorrelatedSDE(*arguments)
    sde = CorrelatedSDE(VPSDE(), K)
    with pytest.raises(ValueError, match="covariance is of 6 numbers, and a sample has 3"):
        sample(sde, lambda x, t: -x, (2, 3), seed=0)
    seen = Observation(torch.zeros(1), torch.ones(1, D), 0.5)
    for run in (
        lambda: posterior_score(sde, DATA.score(sde), seen),
        lambda: variational_bound(sde, DATA.score(sde), torch.zeros(2, D, dtype=torch.int64), levels=2),
    ):
        with pytest.raises(ValueError, match="is for processes of white Gaussian noise"):
            run()
    again = pickle.loads(pickle.dumps(sde))
    assert torch.equal(again.colour(torch.ones(1, D)), sde.colour(torch.ones(1, D)))
    assert math.isfinite(again.log_volume())
    assert as_score(lambda x, t: x, sde, "eps").sde is sde
    assert pc_sample(sde, DATA.score(sde), (2, D), steps=3, seed=0).isfinite().all()
