"""Every objective against its closed form, by quadrature that is exact; one minimiser for all."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from sdekit import VPSDE, BetaTable, GaussianMixture, as_score
from sdekit.processes.kinds import KINDS
from sdekit.training.networks import build
from sdekit.training.objectives import (
    OBJECTIVES,
    WEIGHTINGS,
    denoising,
    explicit,
    finite_difference,
    implicit,
    sliced,
)  # fmt: skip
from tests.conftest import gaussian_score
from tests.training.models import Says, in_turn, pairs

SIGNS = torch.tensor(list(product((-1.0, 1.0), repeat=2)), dtype=torch.float64)  # every Rademacher vector in 2-D


def hermite(n):
    """Nodes and weights of N(0, 1), exact for polynomials below degree 2n."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


def in_the_plane(n, copies=1):
    """The same for N(0, I) in ``copies`` planes: nodes (n^(2 copies), copies, 2) and weights."""
    x, w = hermite(n)
    grid = torch.cartesian_prod(*[x] * 2 * copies).reshape(-1, copies, 2)
    return grid, torch.cartesian_prod(*[w] * 2 * copies).prod(1)


class Affine(nn.Module):
    """s = A x + b in the plane, for any event of two entries."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(torch.tensor([[-0.7, 0.4], [-0.3, -1.3]], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([0.5, -0.2], dtype=torch.float64))

    def forward(self, x, t):
        return (x.reshape(-1, 2) @ self.A.mT + self.b).reshape(x.shape)


MEAN, VARIANCE = torch.tensor([0.3, -0.6], dtype=torch.float64), 0.4  # data N(MEAN, VARIANCE I)


def closed_forms(sde, t, model):
    """E over x_t ~ N(mu, v I) of each objective, D = 2."""
    a, s = sde.alpha(t), sde.sigma(t)
    mu, v, A, b = a * MEAN, a**2 * VARIANCE + s**2, model.A, model.b
    eye, trace = torch.eye(2).double(), torch.trace(A)
    square = (A @ mu + b).square().sum() + v * A.square().sum()
    matched = s**2 * (square + 2 * trace) / 2
    return {
        "denoising": matched + 1,  # E|eps|^2/D
        "implicit": matched,
        "sliced": matched,
        "finite_difference": matched,
        "explicit": s**2 * ((A @ mu + b).square().sum() + v * (A + eye / v).square().sum()) / 2,
    }


@pytest.mark.parametrize("event", [(2,), (1, 2, 1)])
def test_each_loss_and_its_gradient_are_the_closed_form(sde, event):
    """A Gaussian and an affine score: quadrature of degree 5, every sign vector once; nothing is left to chance."""
    exact = gaussian_score(sde, VARIANCE**0.5)
    nodes, weights = in_the_plane(3, copies=2)
    nodes, weights = nodes.repeat_interleave(4, 0), weights.repeat_interleave(4) / 4
    x0, eps, v = (y.reshape(-1, *event) for y in (MEAN + VARIANCE**0.5 * nodes[:, 0], nodes[:, 1], SIGNS.repeat(81, 1)))
    for fraction in (0.02, 0.3, 1.0):
        time = torch.tensor(sde.t_min + fraction * (sde.T - sde.t_min), dtype=torch.float64)
        mu = (sde.alpha(time) * MEAN).reshape(event)
        objectives = {
            "denoising": denoising(),
            "implicit": implicit(),
            "sliced": sliced(),
            "finite_difference": finite_difference(step=0.3),
            "explicit": explicit(lambda x, t, mu=mu: exact(x - mu, t)),
        }
        model = Affine()
        score = as_score(model, sde)
        for name, expected in closed_forms(sde, time, model).items():
            loss = objectives[name](score, x0, time.expand(len(x0)), in_turn(eps, 2 * v))
            assert loss.shape == (len(x0),)
            torch.testing.assert_close(weights @ loss, expected, rtol=1e-9, atol=1e-9)
            got = torch.autograd.grad(weights @ loss, [model.A, model.b])
            want = torch.autograd.grad(expected, [model.A, model.b], retain_graph=True)
            scale = 1 + sum(float(g.abs().max()) for g in want)
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g / scale, w / scale, rtol=1e-9, atol=1e-9)


class Features(nn.Module):
    """A score that is linear in its parameters: polynomials to degree 3 and a bump, per entry of the plane."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(13, 2, dtype=torch.float64))

    def forward(self, x, t):
        u, v = x.unbind(1)
        bump = torch.exp(-x.square().sum(1) / 2)
        columns = [u**i * v**j for i in range(4) for j in range(4 - i)] + [bump, bump * u, bump * v]
        return torch.stack(columns, 1) @ self.theta


WEIGHTS, MEANS, SPREADS = (0.4, 0.6), ((-0.7, 0.5), (0.9, -0.2)), (0.25, 0.5)


def joint_quadrature(sde, t):
    """(x_0, eps, v, weights) under the mixture. x_t lies on its own nodes, where eps is Gaussian given it and the
    component, and enters no loss in more than a square: two nodes do."""
    a, s = float(sde.alpha(t)), float(sde.sigma(t))
    y, p = in_the_plane(24)
    e, q = in_the_plane(2)
    parts = []
    for weight, mean, c in zip(WEIGHTS, MEANS, SPREADS, strict=True):
        v = a**2 * c + s**2
        x_t = a * torch.tensor(mean, dtype=torch.float64) + math.sqrt(v) * y[:, 0]
        eps = s / math.sqrt(v) * y[:, 0, None] + math.sqrt(1 - s**2 / v) * e[:, 0]
        parts.append(((x_t[:, None] - s * eps) / a, eps, weight * p[:, None] * q))
    x0, eps = (torch.cat([part[i].reshape(-1, 2) for part in parts]) for i in (0, 1))
    weights = torch.cat([part[2].reshape(-1) for part in parts])
    n = len(weights)
    return x0.repeat(4, 1), eps.repeat(4, 1), SIGNS.repeat_interleave(n, 0), weights.repeat(4) / 4


def fitted(objective, sde, t, quadrature):
    """The minimiser: every loss is quadratic in theta, so that gradients at zero and at unit vectors are all of it."""
    x0, eps, v, weights = quadrature
    model = Features()
    score, time = as_score(model, sde), torch.full(weights.shape, t, dtype=torch.float64)

    def gradient(theta):
        with torch.no_grad():
            model.theta.copy_(theta.reshape(model.theta.shape))
        loss = weights @ objective(score, x0, time, in_turn(eps, v))
        return torch.autograd.grad(loss, model.theta)[0].reshape(-1)

    count = model.theta.numel()
    start = gradient(torch.zeros(count))
    hessian = torch.stack([gradient(row) - start for row in torch.eye(count, dtype=torch.float64)])
    torch.testing.assert_close(hessian, hessian.mT, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        model.theta.copy_(torch.linalg.solve(hessian, -start).reshape(model.theta.shape))
        points = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)
        return model(torch.cartesian_prod(points, points), None)


def test_all_objectives_have_one_minimiser_on_a_mixture():
    sde, t = VPSDE(), 0.3
    mixture = GaussianMixture(MEANS, torch.tensor(SPREADS)[:, None, None] * torch.eye(2), WEIGHTS)
    quadrature = joint_quadrature(sde, t)
    best = fitted(explicit(mixture.score(sde)), sde, t, quadrature)
    one, *others = (fitted(objective, sde, t, quadrature) for objective in (denoising(), implicit(), sliced()))
    torch.testing.assert_close(one, best, rtol=0, atol=1e-6)  # 24 nodes leave 6e-8 of the reference's softmax
    for other in others:
        torch.testing.assert_close(other, one, rtol=0, atol=1e-10)
    off = [
        float((fitted(finite_difference(step=step), sde, t, quadrature) - best).abs().max())
        for step in (0.2, 0.1, 0.05)
    ]
    assert math.log2(off[0] / off[1]) == pytest.approx(2, abs=0.1)
    assert math.log2(off[1] / off[2]) == pytest.approx(2, abs=0.1)
    assert off[1] < 0.01
    points = torch.linspace(-1.5, 1.5, 5, dtype=torch.float64)
    true = mixture.score(sde)(torch.cartesian_prod(points, points), t)
    assert float((best - true).square().mean() / true.square().mean()) < 0.05  # and the fit is one of the true score


@pytest.mark.parametrize("weighting", [*sorted(set(WEIGHTINGS) - {"simple"}), "callable"])
def test_a_weighting_is_the_same_whatever_the_network_predicts(sde, weighting):
    x0, eps, *_, t = pairs()
    t = t * sde.T
    a, s = sde.alpha(t), sde.sigma(t)
    x = a[:, None] * x0 + s[:, None] * eps
    found = Says(sde, "eps").eps(x, t)
    eps_error = (found - eps).square().mean(1)
    x0_error = ((x - s[:, None] * found) / a[:, None] - x0).square().mean(1)
    r = s / a
    expected = {
        "likelihood": sde.diffusion(t) ** 2 / s**2 * eps_error,
        "min_snr": torch.minimum(r**-2, torch.tensor(5.0)) * x0_error,
        "edm": (r**2 + 0.25) / (r * 0.5) ** 2 * x0_error,
        "callable": (1 + t) * eps_error,
    }[weighting]
    objective = denoising(weighting if weighting in WEIGHTINGS else lambda sde, t: 1 + t)
    for predicts in KINDS:
        got = objective(as_score(Says(sde, predicts), sde, predicts), x0, t, in_turn(eps))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9, msg=lambda m, p=predicts: f"{p}: {m}")


@pytest.mark.parametrize("predicts", KINDS)
def test_the_simple_weighting_is_one_on_what_is_predicted(predicts):
    """And sigma^2 on a score. The target is what the same formulas make of the true pair."""
    sde = VPSDE()
    x0, eps, *_, t = pairs()
    a, s = sde.alpha(t)[:, None], sde.sigma(t)[:, None]
    model = Says(sde, predicts)
    out = model(a * x0 + s * eps, t)
    model.eps = lambda x, t: eps
    target = model(a * x0 + s * eps, t)
    expected = ((s if predicts == "score" else 1) * (out - target)).square().mean(1)
    got = denoising()(as_score(Says(sde, predicts), sde, predicts), x0, t, in_turn(eps))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("make", [implicit, sliced, finite_difference, lambda: explicit(lambda x, t: -x)])
def test_objectives_of_the_score_do_not_ask_what_the_network_predicts(sde, make):
    x0, eps, v, _, t = pairs()
    losses = [
        make()(as_score(Says(sde, predicts), sde, predicts), x0, t * sde.T, in_turn(eps, v)) for predicts in KINDS
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=1e-7)


def test_projections_are_averaged():
    x0, eps, v, w, t = pairs()
    score = as_score(Says(VPSDE(), "v"), VPSDE(), "v")
    for make in (sliced, finite_difference):
        one, other = (make()(score, x0, t, in_turn(eps, u)) for u in (v, w))
        assert not torch.allclose(one, other)
        torch.testing.assert_close(make(projections=2)(score, x0, t, in_turn(eps, v, w)), (one + other) / 2)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_losses_are_float32_or_wider_with_and_without_a_graph(name, dtype):
    sde = BetaTable(torch.linspace(0.001, 0.2, 20))
    network = build("MLP", dim=2, width=8, layers=1).to(dtype)
    score = as_score(network, sde, "v")
    x0, eps, v, *_ = (y.to(dtype) for y in pairs(20, (2,)))
    loss = OBJECTIVES[name]()(score, x0, sde.times, in_turn(eps, v))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == (20,)
    loss.mean().backward()
    assert all(torch.isfinite(w.grad).all() for w in network.parameters() if w.grad is not None)
    assert any(bool(w.grad.any()) for w in network.parameters() if w.grad is not None)
    with torch.no_grad():
        plain = OBJECTIVES[name]()(score, x0, sde.times, in_turn(eps, v))
    assert not plain.requires_grad
    assert torch.equal(plain, loss.detach())


def test_what_does_not_fit_is_named():
    x0, eps, v, _, t = pairs()
    sde = VPSDE()
    score = as_score(Says(sde, "eps"), sde, "eps")
    with pytest.raises(ValueError, match="unknown weighting"):
        denoising("snr")
    for make in (sliced, finite_difference):
        with pytest.raises(ValueError, match="projections"):
            make(projections=0)
    with pytest.raises(ValueError, match="step must"):
        finite_difference(step=0.0)
    with pytest.raises(ValueError, match="the network must return x's shape"):
        denoising()(as_score(lambda x, t: x[:, :1], sde, "eps"), x0, t, in_turn(eps))
    with pytest.raises(ValueError, match="reference must return x's shape"):
        explicit(lambda x, t: x[:, :1])(score, x0, t, in_turn(eps))
    for network in (lambda x, t: x.detach(), lambda x, t: x.detach() * score.network.scale):
        for objective in (implicit(), sliced()):
            with pytest.raises(ValueError, match="score must be differentiable in x"):
                objective(as_score(network, sde, "score"), x0, t, in_turn(eps, v))
