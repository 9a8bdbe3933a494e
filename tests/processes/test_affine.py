"""Affine processes by their moments, and processes with a mean of their own, against closed forms."""

import math

import numpy as np
import pytest
import torch

from sdekit import (
    SAMPLERS,
    VPSDE,
    AffineSDE,
    BridgeSDE,
    GaussianMixture,
    HeatODE,
    RectifiedFlow,
    as_score,
    calibrate,
    guidance,
    log_likelihood,
    ode_sample,
    sample,
    sample_with_log_prob,
    sde_sample,
    solve,
    static_threshold,
)
from sdekit.posterior import Observation, posterior_score
from sdekit.processes.kinds import KINDS, express, kind_of
from sdekit.sampling import AskTell
from sdekit.system import expand
from sdekit.training.objectives import _noised
from tests import oracle

VP = VPSDE()
# (F, g, c, T): alpha, sigma^2, mean in closed form
KNOWN = {
    "VP": (
        lambda t: -(0.1 + 19.9 * t) / 2,
        lambda t: (0.1 + 19.9 * t) ** 0.5,
        0.0,
        1.0,
        lambda t: VP.alpha(t),
        lambda t: VP.sigma(t) ** 2,
        lambda t: 0 * t,
    ),
    "sub-VP": (
        lambda t: -(0.1 + 19.9 * t) / 2,
        lambda t: ((0.1 + 19.9 * t) * (1 - (-2 * (0.1 * t + 9.95 * t**2)).exp())) ** 0.5,
        0.0,
        1.0,
        lambda t: VP.alpha(t),
        lambda t: VP.sigma(t) ** 4,
        lambda t: 0 * t,
    ),
    "VE": (
        0.0,
        lambda t: 0.5 * (2 * math.log(100)) ** 0.5 * torch.exp(t * math.log(100)),
        0.0,
        1.0,
        lambda t: 1 + 0 * t,
        lambda t: 0.25 * torch.expm1(2 * t * math.log(100)),
        lambda t: 0 * t,
    ),
    "OU to a mean": (
        -1.5,
        0.8,
        1.5 * 0.7,
        3.0,
        lambda t: (-1.5 * t).exp(),
        lambda t: -(0.8**2) / 3 * torch.expm1(-3 * t),
        lambda t: -0.7 * torch.expm1(-1.5 * t),
    ),
    "a wave": (
        lambda t: torch.cos(3 * t),
        lambda t: (torch.sin(3 * t) / 3).exp(),
        lambda t: (torch.sin(3 * t) / 3).exp() * 2 * t,
        2.0,
        lambda t: (torch.sin(3 * t) / 3).exp(),
        lambda t: t * (2 * torch.sin(3 * t) / 3).exp(),
        lambda t: t**2 * (torch.sin(3 * t) / 3).exp(),
    ),
}
DATA = GaussianMixture([[-1.0, 0.2], [0.8, 0.5]], np.array([[[0.1, 0.04], [0.04, 0.08]], np.eye(2) * 0.05]), [0.4, 0.6])
OU = AffineSDE(-1.5, 0.8, 1.05, T=3.0, along=torch.tensor([1.0, -2.0], dtype=torch.float64))


def bridge():
    return BridgeSDE(torch.tensor([2.0, -1.0], dtype=torch.float64), 1.3)


SHIFTED = {"OU": lambda: OU, "wave": lambda: AffineSDE(*KNOWN["a wave"][:3], T=2.0), "bridge": bridge}


@pytest.mark.parametrize("name", KNOWN)
def test_moments_to_1e_10(name):
    F, g, c, T, alpha, var, mean = KNOWN[name]
    sde = AffineSDE(F, g, c, T=T)
    t = torch.cat([torch.linspace(0, T, 997, dtype=torch.float64), torch.tensor([1e-6, 1e-4, T]).double()])
    for got, want in ((sde.alpha(t), alpha(t)), (sde.sigma(t) ** 2, var(t)), (sde.mean(t), mean(t))):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    inner = t[1:-3]
    torch.testing.assert_close(sde.sigma(inner), var(inner).sqrt(), rtol=1e-10, atol=0)
    level = sde.inverse_half_log_snr(sde.half_log_snr(inner))
    torch.testing.assert_close(sde.half_log_snr(level), sde.half_log_snr(inner), rtol=0, atol=1e-9)
    k = sde.coefficients(inner)
    plain = super(AffineSDE, sde).coefficients(inner)  # by differentiation of alpha and sigma
    for own, derived in zip(k, plain, strict=True):
        torch.testing.assert_close(own, derived, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SHIFTED)
def test_simulation_of_the_equation_has_the_moments(name):
    """Euler-Maruyama of dx = (F x + c) dt + g dW in 2,000 steps: mean and variance within 6 standard errors and 1 %."""
    sde, n = SHIFTED[name](), 4_000
    x_0, end = torch.tensor([[0.5, -0.3]], dtype=torch.float64).expand(n, 2), 0.7 * sde.T
    out = solve(sde, x_0, torch.linspace(0, end, 2001, dtype=torch.float64), "euler_maruyama").x
    mean, std = sde.marginal(x_0[:1], end)
    assert float((out.mean(0) - mean).abs().max()) < 6 * float(std.max()) / n**0.5 + 0.01
    assert float((out.std(0) / std - 1).abs().max()) < 6 / (2 * n) ** 0.5 + 0.01


@pytest.mark.parametrize("name", SHIFTED)
def test_density_solves_fokker_planck(name):
    """d(log p)/dt + div f + f . grad - g^2/2 (Laplacian + |grad|^2) = 0, all by differentiation of log p."""
    sde = SHIFTED[name]()
    for cut in (0.05, 0.4, 0.8):
        x = sde.perturb(DATA.sample(6, seed=1, dtype=torch.float64), cut * sde.T, seed=2).requires_grad_()
        h = 1e-4 * sde.T
        values = [DATA.at(sde, cut * sde.T + k * h).log_prob(x) for k in (-2, -1, 1, 2)]
        dt = (values[0] - 8 * values[1] + 8 * values[2] - values[3]).detach() / (12 * h)
        (grad,) = torch.autograd.grad(DATA.at(sde, cut * sde.T).log_prob(x).sum(), x, create_graph=True)
        laplacian = sum(torch.autograd.grad(grad[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
        c = sde.coefficients(cut * sde.T)
        drift = sde.drift(x.detach(), cut * sde.T)
        terms = torch.stack([dt, 2 * c.f + (drift * grad).sum(1), -c.g2 / 2 * (laplacian + grad.square().sum(1))])
        residual = terms.sum(0).abs() / terms.abs().sum(0)
        assert float(residual.detach().max()) < 1e-6
        torch.testing.assert_close(DATA.score(sde)(x.detach(), cut * sde.T), grad.detach(), rtol=1e-7, atol=1e-8)


def network(sde, predicts):
    """The exact model as a network, which sees x itself."""
    exact = DATA.score(sde)

    def says(x, t):
        time = t.double()
        a, b = express(kind_of(predicts, sde, time), kind_of("v", sde, time), sde.alpha(time), sde.sigma(time))
        return expand(a, x) * exact.output(x, time) + expand(b, x) * sde.centre(x, time)

    return as_score(says, sde, predicts)


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("predicts", KINDS)
def test_a_network_is_its_score(name, predicts):
    sde = SHIFTED[name]()
    score, x = network(sde, predicts), torch.tensor([[0.3, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    for t in (0.3 * sde.T, torch.tensor([0.2, 0.6], dtype=torch.float64)):
        torch.testing.assert_close(score(x, t), DATA.score(sde)(x, t), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(sde.denoise(x, t, score), sde.denoise(x, t, DATA.score(sde)), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("row", ["unipc_2", "heun", "ancestral", "sa_solver", "pc", "adaptive", "sde"])
def test_samples_are_the_data(name, row):
    """From the exact law at T to the data: 2,000 draws on three directions, false alarm 1e-9 each."""
    sde, n = SHIFTED[name](), 2_000
    truth = oracle.Mixture(*(y.numpy() for y in (DATA.means, DATA.covs, DATA.weights)))
    x_T = sde.perturb(DATA.sample(n, seed=3, dtype=torch.float64), sde.T, seed=4)
    score = network(sde, "x0")
    if row == "adaptive":
        x = ode_sample(sde, score, (n, 2), x_T=x_T, rtol=1e-4, atol=1e-4)
    elif row == "sde":
        x = sde_sample(sde, score, (n, 2), x_T=x_T, seed=0)
    else:
        x = sample(
            sde, score, (n, 2), row, steps=30 if row in ("unipc_2", "heun") else 120, grid="karras", x_T=x_T, seed=0
        )
    for seed in range(3):
        v = np.random.default_rng(seed).normal(size=2)
        v /= np.linalg.norm(v)
        assert (
            oracle.ks_distance(x.numpy() @ v, truth.projected_cdf(v, 1.0, 1e-6)) < oracle.ks_threshold(n, 1e-9) + 0.03
        )


@pytest.mark.parametrize("name", SHIFTED)
def test_likelihoods_and_states_are_those_of_x(name):
    """log p at t_min against the exact marginal, 1e-4; trajectories and callbacks lie on the marginals' side."""
    sde = SHIFTED[name]()
    score, x = DATA.score(sde), DATA.sample(5, seed=0, dtype=torch.float64)
    end = DATA.at(sde, sde.T)
    out = log_likelihood(sde, score, x, rtol=1e-6, atol=1e-6, prior_log_prob=end.log_prob)
    torch.testing.assert_close(out.log_prob, DATA.at(sde, sde.t_min).log_prob(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(out.corrected, DATA.log_prob(x), rtol=0, atol=2e-3)
    y, found = sample_with_log_prob(
        sde, score, (4, 2), seed=0, rtol=1e-6, atol=1e-6, dtype=torch.float64, prior_log_prob=end.log_prob
    )
    torch.testing.assert_close(found.log_prob, DATA.at(sde, sde.t_min).log_prob(y), rtol=0, atol=1e-4)
    seen = []
    run = solve(sde.probability_flow(score), out.latent, [sde.T, sde.t_min], "adams", rtol=1e-6, atol=1e-6, keep=3,
                callback=lambda k, t, z: seen.append((t, z)))  # fmt: skip
    torch.testing.assert_close(run.x, x, rtol=0, atol=1e-3)
    torch.testing.assert_close(run.trajectory.x[0], out.latent)
    torch.testing.assert_close(run.trajectory.x[-1], run.x)
    torch.testing.assert_close(seen[-1][1], run.x)
    middle = sde.perturb(x, 0.5 * sde.T, seed=1)
    prior = sde.prior_sample((20_000, 2), seed=0, dtype=torch.float64)
    off = (prior - sde.offset(sde.T, prior)) / float(sde.sigma(sde.T))
    assert float(off.mean(0).abs().max()) < 0.05
    assert middle.shape == x.shape
    want = -0.5 * (off**2).sum(1) - 2 * math.log(float(sde.sigma(sde.T)) * math.sqrt(2 * math.pi))
    torch.testing.assert_close(sde.prior_log_prob(prior), want)


def test_each_sample_has_a_bridge_of_its_own():
    """In a batch as alone, also where samples leave an adaptive solver's batch, and in the trainer."""
    y = torch.tensor([[2.0, -1.0], [0.0, 3.0], [-2.0, 0.5]], dtype=torch.float64)
    whole = BridgeSDE(y)
    x_T = whole.prior_sample((3, 2), seed=0, dtype=torch.float64)
    draws = {
        "fixed": lambda sde, x, ids: sample(
            sde, DATA.score(sde), x.shape, "ancestral", steps=8, x_T=x, seed=1, ids=ids
        ),
        "adaptive": lambda sde, x, ids: ode_sample(sde, DATA.score(sde), x.shape, x_T=x, rtol=1e-6, atol=1e-6),
    }
    for draw in draws.values():
        out = draw(whole, x_T, range(3))
        for i in range(3):
            one = draw(BridgeSDE(y[i : i + 1]), x_T[i : i + 1], [i])
            torch.testing.assert_close(out[i : i + 1], one, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="y was given for 3 samples, and x has 2"):
        whole.prior_sample((2, 2), seed=0)
    x_t, eps = _noised(whole, x_T, torch.full((3,), 0.5).double(), lambda: torch.ones_like(x_T))
    torch.testing.assert_close(x_t, 0.5 * x_T + 0.5 * y + 0.5 * eps)


def test_every_sampler_runs_on_an_affine_process():
    for name in SAMPLERS:
        x = sample(OU, network(OU, "eps"), (3, 2), name, steps=12, grid="karras", seed=0, dtype=torch.float64)
        assert x.isfinite().all()


def test_bad_input_is_named():
    for make, message in (
        (lambda: AffineSDE("fast", 1.0), "F must be a finite number or a function of t"),
        (lambda: AffineSDE(math.nan, 1.0), "F must be a finite number"),
        (lambda: AffineSDE(lambda t: 1 / (t - t), 1.0), r"F must be finite on \[0, T\]: at t = "),
        (lambda: AffineSDE(lambda t: 1 / (0.3 - t), 1.0), "F must be finite|not smooth enough|explode by t = 0.3"),
        (lambda: AffineSDE(lambda t: (t > 0.3).double(), 1.0), "not smooth enough on"),
        (lambda: AffineSDE(lambda t: 2000 * t, 1.0), "the moments explode by t = 0.625"),
        (lambda: AffineSDE(-1.0, 0.0), "g must be > 0 somewhere before t_min"),
        (lambda: AffineSDE(-1.0, 1.0, T=-1), "T must be"),
        (lambda: BridgeSDE([1.0, 2.0]), "y must be a torch.Tensor"),
        (lambda: BridgeSDE(torch.ones(2), 0.0), "scale must be"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            make()
    score, seen = network(OU, "x0"), Observation(torch.zeros(1), torch.ones(1, 2), 0.5)
    for run in (
        lambda: score.under(HeatODE()), lambda: DATA.score(VP) and as_score(lambda x, t: x, VP, "eps").under(OU),
        lambda: static_threshold(OU, score, (-1, 1)), lambda: posterior_score(OU, score, seen),
        lambda: calibrate(OU, score, (8, 2), nfe=4), lambda: AskTell(OU, torch.ones(2, 2), predicts="eps"),
        lambda: guidance.apg(as_score(lambda x, t, c: x, OU, "eps"), 1, 0, 2.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="adds one of its own to it"):
            run()
    assert sample(RectifiedFlow(), DATA.score(RectifiedFlow()), (2, 2), seed=0).isfinite().all()
