"""Scores of p(x_t | y) against closed forms: exact on Gaussians, each method's own formula on mixtures."""

import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from sdekit import (
    SAMPLERS,
    VPSDE,
    GaussianMixture,
    HeatODE,
    RectifiedFlow,
    as_score,
    load_pretrained,
    log_likelihood,
    ode_sample,
    sample,
    solve,
)
from sdekit.posterior import Observation, blur, colourisation, downsample, inpainting, posterior_score
from sdekit.posterior.local import conjugate_gradients
from sdekit.posterior.scores import METHODS
from sdekit.processes.kinds import KINDS, express, kind_of
from sdekit.system import expand
from sdekit.training import load_checkpoint
from tests.processes.test_fokker_planck import random_mixture

NETWORKS = Path(__file__).parents[2] / "benchmarks" / "networks"
D = 4
RNG = np.random.default_rng(0)
ROOT, MEAN = RNG.normal(size=(D, D)) * 0.5, RNG.normal(size=(1, D))
GAUSSIAN = GaussianMixture(MEAN, (ROOT @ ROOT.T + 0.05 * np.eye(D))[None])
A = torch.from_numpy(RNG.normal(size=(3, D)))
Y, STD = torch.tensor([0.5, -0.3, 0.1], dtype=torch.float64), torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
POSTERIOR = GAUSSIAN.posterior(A, Y, STD)
SDE = VPSDE()


def network(mixture, sde, predicts):
    """The exact model of a mixture as a network that predicts that."""
    exact = mixture.score(sde)

    def says(x, t):
        time = t.double()
        lv = sde.alpha(time), sde.sigma(time)
        a, b = express(kind_of(predicts, sde, time), kind_of("v", sde, time), *lv)
        return expand(a, x) * exact.output(x, time) + expand(b, x) * x

    return as_score(says, sde, predicts)


@pytest.mark.parametrize("predicts", KINDS)
@pytest.mark.parametrize("form", ["matrix", "callable", "adjoint"])
def test_mmps_is_exact_on_gaussians(sde, predicts, form):
    observation = Observation(
        Y, A if form == "matrix" else lambda x: x @ A.mT, STD, (lambda u: u @ A) if form == "adjoint" else None
    )
    score = posterior_score(sde, network(GAUSSIAN, sde, predicts), observation, rtol=1e-13)
    assert score.predicts == predicts
    for cut in (0.0, 0.1, 0.5, 0.8):
        t = sde.t_min + cut * (sde.T - sde.t_min)
        x = sde.perturb(GAUSSIAN.sample(5, seed=1, dtype=torch.float64), t, seed=0)
        want = POSTERIOR.score(sde)(x, t)
        torch.testing.assert_close(score(x, t), want, rtol=0, atol=1e-5 * float(want.abs().max()))
    each = torch.linspace(sde.t_min, 0.8 * sde.T, 5, dtype=torch.float64)
    x = sde.perturb(GAUSSIAN.sample(5, seed=1, dtype=torch.float64), each, seed=0)
    want = POSTERIOR.score(sde)(x, each)
    torch.testing.assert_close(score(x, each), want, rtol=0, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("make", [VPSDE, HeatODE, RectifiedFlow])
def test_posterior_mean_and_covariance_by_exact_propagation(make):
    """The flow is affine there: it takes the marginal at one time to that at another, to 1e-6."""
    sde = make()
    score = posterior_score(sde, GAUSSIAN.score(sde), Observation(Y, A, STD), rtol=1e-13)
    first, last = 0.9 * sde.T, sde.t_min
    start, end = POSTERIOR.at(sde, first), POSTERIOR.at(sde, last)
    root = torch.linalg.cholesky(start.covs[0])
    x = torch.cat([start.means, start.means + root.mT])
    out = solve(sde.probability_flow(score), x, [first, last], rtol=1e-10, atol=1e-10).x
    torch.testing.assert_close(out[:1], end.means, rtol=0, atol=1e-6)
    moved = out[1:] - out[:1]
    torch.testing.assert_close(moved.mT @ moved, end.covs[0], rtol=0, atol=1e-6)


def test_the_likelihood_under_an_observation_is_the_conditional_one():
    score = posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y, A, STD), rtol=1e-12)
    x = POSTERIOR.sample(3, seed=1, dtype=torch.float64)
    out = log_likelihood(SDE, score, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        out.log_prob + out.prior_mismatch, POSTERIOR.at(SDE, SDE.t_min).log_prob(x), rtol=0, atol=1e-3
    )


def by_hand(name, x_0, v, a, y, std, level2):
    """V A' S^-1 (y - A x_0) of one sample, by the matrices; S of each method."""
    ava, noise = a @ v @ a.T, np.diag(std**2)
    s = {
        "mmps": lambda: noise + ava,
        "tmpd": lambda: noise + np.diag(ava.sum(1).clip(0)),
        "pigdm": lambda: noise + level2 * 0.7**2 / (level2 + 0.7**2) * a @ a.T,
        "dps": lambda: noise + 0.3 * level2 * np.eye(len(y)),
    }[name]()
    return v @ a.T @ np.linalg.solve(s, y - a @ x_0)


OPTIONS = {"mmps": {"rtol": 1e-12}, "tmpd": {}, "pigdm": {"data_std": 0.7}, "dps": {"gamma": 0.3}}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("turned", [False, True])
def test_every_method_is_its_formula(name, turned):
    """On a mixture, where no two agree; V by the Hessian of log p, V = s^2 (1 + s^2 Hessian)/a^2: another way.

    ``turned``: rows against each other, so that a row sum of A V A' is negative.
    """
    mixture, _ = random_mixture(12, 3)
    a, y, std = A[:2, :3], Y[:2], STD[:2]
    if turned:
        a = torch.stack([a[0], 0.1 * a[1] - 0.5 * a[0]])
    score = posterior_score(SDE, mixture.score(SDE), Observation(y, a, std), name, reach=math.inf, **OPTIONS[name])
    x = SDE.prior_sample((4, 3), seed=3, dtype=torch.float64)
    for t in (0.1, 0.4):
        alpha, sigma = float(SDE.alpha(t)), float(SDE.sigma(t))
        marginal = mixture.at(SDE, t)
        got = (sigma**2 / alpha) * (score(x, t) - mixture.score(SDE)(x, t))
        for i in range(4):
            hessian = torch.autograd.functional.hessian(lambda z: marginal.log_prob(z[None])[0], x[i])  # noqa: B023
            v = (sigma / alpha) ** 2 * (np.eye(3) + sigma**2 * hessian.numpy())
            x_0 = SDE.denoise(x[i : i + 1], t, mixture.score(SDE))[0].numpy()
            want = by_hand(name, x_0, v, a.numpy(), y.numpy(), std.numpy(), (sigma / alpha) ** 2)
            np.testing.assert_allclose(got[i].detach().numpy(), want, rtol=1e-5, atol=1e-6)


def test_dps_as_published_goes_a_fixed_length_along_each_residual():
    """zeta a thousandth of the time, whatever the residual's size; the score times g^2 dt."""
    mixture, _ = random_mixture(12, 3)
    score = posterior_score(SDE, mixture.score(SDE), Observation(Y[:2], A[:2, :3], 0.1), "dps", strength=0.5)
    x, t = SDE.prior_sample((4, 3), seed=3, dtype=torch.float64), 0.4
    added = score(x, t).detach() - mixture.score(SDE)(x, t)
    leaf = x.clone().requires_grad_()
    residual = (Y[:2] - SDE.denoise(leaf, t, mixture.score(SDE)) @ A[:2, :3].mT).norm(dim=1)
    (slope,) = torch.autograd.grad(residual.sum(), leaf)
    g2 = float(SDE.coefficients(t).g2)
    torch.testing.assert_close(added * g2 * 1e-3, -0.5 * slope, rtol=1e-6, atol=1e-9)


def test_dps_takes_an_operator_that_is_not_linear():
    mixture, _ = random_mixture(12, 3)
    A_of = lambda x: x[:, :2] ** 2 + x[:, 2:].sin()  # noqa: E731
    x, t = SDE.prior_sample((4, 3), seed=3, dtype=torch.float64), 0.4
    score = posterior_score(SDE, mixture.score(SDE), Observation(Y[:2], A_of, STD[:2]), "dps", reach=math.inf)
    leaf = x.clone().requires_grad_()
    off = (Y[:2] - A_of(SDE.denoise(leaf, t, mixture.score(SDE)))) / STD[:2]
    (want,) = torch.autograd.grad(-0.5 * off.square().sum(), leaf)
    torch.testing.assert_close(score(x, t).detach() - mixture.score(SDE)(x, t), want, rtol=1e-6, atol=1e-6)
    for name in ("mmps", "tmpd", "pigdm"):
        with pytest.raises(ValueError, match='A must be linear for this method; "dps" takes'):
            posterior_score(SDE, mixture.score(SDE), Observation(Y[:2], A_of, STD[:2]), name)(x, t)


DRAWS = {
    **{n: lambda s, b, n=n, **kw: sample(SDE, s, (b, D), n, steps=8, **kw) for n in ("ancestral", "sa_solver", "heun")},
    "dpmpp_2m": lambda s, b, **kw: sample(SDE, s, (b, D), "dpmpp_2m", nfe=8, **kw),
    "adams": lambda s, b, **kw: ode_sample(SDE, s, (b, D), rtol=1e-3, atol=1e-3, **kw),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("name", METHODS)
def test_a_sample_is_what_it_is_alone(name, draw):
    """Another y for each, also where samples leave the batch; the norms of a batch-wide DPS would differ."""
    mixture, _ = random_mixture(5, D)
    options = {"strength": 0.3} if name == "dps" and draw is not DRAWS["adams"] else {}  # its direction flips at 0
    y, std = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2), 0.5

    def made(rows):
        return posterior_score(SDE, mixture.score(SDE), Observation(y[rows], A[:2], std), name, **options)

    x = draw(made(slice(None)), 4, seed=0, dtype=torch.float64)
    for i in (1, 3):
        alone = draw(made(slice(i, i + 1)), 1, seed=0, ids=[i], dtype=torch.float64)
        torch.testing.assert_close(x[i : i + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_pictures_go_through_like_vectors_and_in_inference_mode(name):
    mixture, _ = random_mixture(5, 6)
    seen = torch.tensor([True, False, True, True, False, False])
    y = torch.linspace(-1, 1, 6, dtype=torch.float64)
    flat = posterior_score(SDE, mixture.score(SDE), inpainting(seen, y, 0.5), name)
    picture = posterior_score(SDE, mixture.score(SDE), inpainting(seen.reshape(1, 2, 3), y.reshape(1, 2, 3), 0.5), name)
    x = sample(SDE, flat, (3, 6), "ancestral", steps=10, seed=0, dtype=torch.float64)
    with torch.inference_mode():
        z = sample(SDE, picture, (3, 1, 2, 3), "ancestral", steps=10, seed=0, dtype=torch.float64)
    assert torch.equal(x.reshape(z.shape), z)
    assert sample(SDE, picture, (3, 1, 2, 3), "sa_solver", steps=5, seed=0, dtype=torch.float32).isfinite().all()


def test_products_are_no_network_calls():
    calls = []

    def says(x, t):
        calls.append(len(x))
        return x * 0.3

    score = posterior_score(SDE, as_score(says, SDE, "eps"), Observation(Y, A, STD))
    sample(SDE, score, (2, D), "ddim", nfe=7, seed=0)
    assert calls == 7 * [2]


def test_gradients_go_through():
    score = posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y, A, STD), rtol=1e-12)
    x_T = SDE.prior_sample((2, D), seed=0, dtype=torch.float64).requires_grad_()
    slopes = []
    for s in (score, POSTERIOR.score(SDE)):
        x = sample(SDE, s, (2, D), "ddim", steps=6, grid="karras", x_T=x_T, differentiable=True)
        slopes.append(torch.autograd.grad(x[:, 0].sum(), x_T)[0])
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-6)


def test_conjugate_gradients_solve_and_stop_sample_by_sample():
    root = torch.randn(5, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s = root @ root.mT + 0.1 * torch.eye(6)
    s[3] = -s[3]  # not positive: nothing is said of that sample
    b = torch.ones(5, 6, dtype=torch.float64)
    b[4] = 0
    w = conjugate_gradients(lambda p: torch.einsum("bij,bj->bi", s, p), b, 30, 1e-12)
    torch.testing.assert_close(w[:3], torch.linalg.solve(s, b)[:3])
    assert (w[3:] == 0).all()


def test_a_trained_network_does_not_diverge():
    """Its V has negative eigenvalues; by plain conjugate gradients x comes to 400 here. Residuals are of std's size."""
    sde, network = load_pretrained("digits")
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    y = sample(sde, network, (6, 1, 8, 8), "unipc_2", nfe=10, seed=3)
    y = y + 0.05 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    for sampler, steps in (("sa_solver", 40), ("unipc_2", 20)):
        score = posterior_score(sde, network, inpainting(mask, y, 0.05))
        x = sample(sde, score, y.shape, sampler, steps=steps, seed=0)
        assert float(x.abs().max()) < 2.5
        assert float(((x - y)[:, mask] / 0.05).square().mean(1).sqrt().max()) < 3


def test_no_entry_moves_further_than_reach():
    """All of the sample's come so much nearer, and a sample within is left alone to the bit."""
    x, t = torch.tensor([[30.0, 1.0, 0.0, 0.0], [0.2, 0.1, 0.0, 0.3]], dtype=torch.float64), 0.3
    free, bound = (
        posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y, A, STD), reach=r)(x, t).detach()
        for r in (math.inf, 0.6)
    )
    gain = float(SDE.sigma(t)) ** 2 / float(SDE.alpha(t))
    far, near = (gain * (y - GAUSSIAN.score(SDE)(x, t)) for y in (free, bound))
    assert float(far[0].abs().max()) > 3
    torch.testing.assert_close(near[0], far[0] * 0.6 / far[0].abs().max())
    assert torch.equal(free[1], bound[1])


@pytest.mark.parametrize("name", METHODS)
def test_networks_that_predict_eps_and_small_noise_diverge_with_no_method(name):
    """PITFALLS 51's kind: near T an eps network's V is (sigma/alpha)^2 = 2e4 times its error.

    Without a bound x comes to 1e3 ... 1e18 or NaN here, "mmps" and "tmpd" at std .2 already.
    """
    sde, network = load_checkpoint(NETWORKS / "eps_linear.safetensors")
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, :4] = True
    y = sample(sde, network, (6, 1, 8, 8), "unipc_2", nfe=10, seed=3)
    for std in (0.2, 0.05):
        seen = inpainting(mask, y + std * torch.randn(y.shape, generator=torch.Generator().manual_seed(0)), std)
        x = sample(sde, posterior_score(sde, network, seen, name), y.shape, "sa_solver", steps=40, seed=0)
        assert float(x.abs().max()) < 2.5


def test_models_and_observations_go_through_a_pickle():
    y = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(1, 4, 4)
    data = GaussianMixture(torch.zeros(1, 16), 0.3 * torch.eye(16)[None])
    x = SDE.perturb(data.sample(2, seed=0, dtype=torch.float64), 0.3, seed=1).reshape(2, 1, 4, 4)
    for seen in (
        inpainting(y > 0, y, 0.5), colourisation(y, 0.5, [1.0]), blur(torch.ones(3, 3) / 9, y, 0.5),
        downsample(2, y[:, :2, :2], 0.5), Observation(y.reshape(16), torch.eye(16), 0.5),
    ):  # fmt: skip
        for name in METHODS:
            score = posterior_score(SDE, data.score(SDE), seen, name)
            again = pickle.loads(pickle.dumps(score))
            assert torch.equal(again(x, 0.3), score(x, 0.3))


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_a_posterior_score(name):
    score = posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y, A, 0.5))
    assert sample(SDE, score, (2, D), name, steps=12, grid="karras", seed=0, dtype=torch.float64).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y, A, 0.1), "mmpds"), "did you mean 'mmps'"),
        (lambda: posterior_score(SDE, GAUSSIAN.score(SDE), (Y, A, 0.1)), "observation must be an Observation"),
        (lambda: posterior_score(SDE, 3, Observation(Y, A, 0.1)), "score must be a callable"),
        (lambda: posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y, A, 0.1), gamma=1.0), "method 'mmps'.*gamma"),
        (lambda: posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y, A, 0.1), "dps", strength=-1), "strength"),
        (lambda: posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y, A, 0.1), iterations=0), "iterations must be"),
        (lambda: posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y, A, 0.1), reach=0), "reach must be"),
        (
            lambda: posterior_score(SDE, lambda x, t: -x.detach(), Observation(Y, A, 0.1))(torch.ones(2, D), 0.5),
            "score must be differentiable in x",
        ),
        (
            lambda: sample(FLOW, posterior_score(FLOW, GAUSSIAN.score(FLOW), Observation(Y, A, 0.1)), (2, D), "flow_3m",
                           steps=5, grid="uniform"),
            "where alpha = 0, at T = 1, .* set T a little lower .*posterior_sample",
        ),
        (
            lambda: sample(SDE, posterior_score(SDE, GAUSSIAN.score(SDE), Observation(Y.expand(2, 3), A, 0.1)), (3, D)),
            "y was given for 2 samples, and x has 3",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


FLOW = RectifiedFlow()
