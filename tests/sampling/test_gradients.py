"""Gradients through sampling, on request; and nobody's cut off without a word."""

import pytest
import torch
from torch import nn

from sdekit import (
    SAMPLERS,
    VPSDE,
    as_score,
    decode,
    encode,
    log_likelihood,
    ode_sample,
    pc_sample,
    sample,
    sde_sample,
    solve,
)
from tests.conftest import gaussian_score

SDE = VPSDE()


class Net(nn.Module):
    """eps of something near N(0, 1), not linear in x."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))
        self.calls = 0

    def forward(self, x, t):
        self.calls += 1
        return torch.tanh(self.w * x) * SDE.sigma(t).to(x).reshape(-1, 1)


X = torch.linspace(-1.5, 1.5, 6, dtype=torch.float64).reshape(3, 2)


def slopes(draw, x, net):
    """The derivatives of sum(samples^2) to x and to w, by difference quotients and by autograd."""

    def value(dx, dw):
        with torch.no_grad():
            net.w += dw
            y = draw(x + dx, False).square().sum()
            net.w -= dw
        return float(y)

    h, bump = 1e-5, torch.zeros_like(x)
    bump[1, 0] = h
    quotients = [(value(bump, 0) - value(-bump, 0)) / (2 * h), (value(0, h) - value(0, -h)) / (2 * h)]
    leaf = x.clone().requires_grad_()
    grads = torch.autograd.grad(draw(leaf, True).square().sum(), (leaf, net.w))
    again = torch.autograd.grad(draw(leaf, "checkpoint").square().sum(), (leaf, net.w))
    for one, other in zip(grads, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    return quotients, [float(grads[0][1, 0]), float(grads[1])]


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_of_every_sampler_are_difference_quotients(name):
    net = Net()
    score = as_score(net, SDE, "eps")
    steps = 20 if name in ("restart", "pc", "annealed_langevin") else 8

    def draw(x, differentiable):
        return sample(SDE, score, x.shape, name, steps=steps, x_T=x, seed=0, differentiable=differentiable)

    quotients, gradients = slopes(draw, X, net)
    assert gradients == pytest.approx(quotients, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", ["ode", "sde", "pc", "decode", "encode"])
def test_gradients_of_the_other_ways(kind):
    net = Net()
    score, tight = as_score(net, SDE, "eps"), {"rtol": 1e-6, "atol": 1e-6}

    def draw(x, differentiable):
        how = {"differentiable": differentiable}
        if kind == "pc":
            return pc_sample(SDE, score, x.shape, steps=5, seed=0, x_T=x, **how)
        if kind == "sde":  # a difference in tolerance's reach would take other steps, and another path's values
            return sde_sample(SDE, score, x.shape, seed=0, x_T=x, rtol=1e3, atol=1e3, **how)
        if kind == "ode":
            return ode_sample(SDE, score, x.shape, x_T=x, **tight, **how)
        return {"decode": decode, "encode": encode}[kind](SDE, score, x, **tight, **how)

    quotients, gradients = slopes(draw, X, net)
    assert gradients == pytest.approx(quotients, rel=1e-4 if kind in ("pc", "sde") else 1e-3, abs=1e-6)


def test_checkpoints_keep_no_graph_of_the_network():
    """What autograd saves grows with the network's inner size without checkpoints, and not with them."""
    with torch.random.fork_rng():
        wide = nn.Sequential(nn.Linear(2, 4096), nn.Tanh(), nn.Linear(4096, 2)).double()
    score = as_score(lambda x, t: wide(x), SDE, "eps")
    sizes = {}
    for how in (True, "checkpoint"):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda y, s=saved: (s.append(y.numel()), y)[1], lambda y: y):
            x = X.clone().requires_grad_()
            sample(SDE, score, x.shape, "dpmpp_2m", nfe=10, x_T=x, differentiable=how).sum().backward()
        sizes[how] = sum(saved)
    assert sizes["checkpoint"] < 0.1 * sizes[True]


def test_a_gradient_is_not_cut_off_without_a_word():
    x, score = X.clone().requires_grad_(), gaussian_score(SDE)
    for run in (
        lambda: sample(SDE, score, x.shape, nfe=5, x_T=x),
        lambda: pc_sample(SDE, score, x.shape, steps=5, x_T=x),
        lambda: ode_sample(SDE, score, x.shape, x_T=x),
        lambda: sde_sample(SDE, score, x.shape, x_T=x),
    ):
        with pytest.raises(ValueError, match=r"x_T requires a gradient.*differentiable=True, or x_T\.detach\(\)"):
            run()
        with torch.no_grad():  # who says so wants none
            assert not run().requires_grad
    with pytest.raises(ValueError, match=r"latent requires a gradient"):
        decode(SDE, score, x)
    with pytest.raises(ValueError, match=r"x requires a gradient"):
        encode(SDE, score, x)
    with pytest.raises(ValueError, match='must be False, True or "checkpoint", got 3'):
        sample(SDE, score, X.shape, nfe=5, differentiable=3)
    with pytest.raises(ValueError, match="needs a system of a model"):
        solve(SDE, X, [0.1, 0.2], "euler_maruyama", differentiable="checkpoint")


def test_no_graph_unless_asked():
    net = Net()
    system = SDE.probability_flow(as_score(net, SDE, "eps"))
    assert not solve(system, X, [1.0, 0.5, 0.1], "heun").x.requires_grad
    assert solve(system, X, [1.0, 0.5, 0.1], "heun", differentiable=True).x.requires_grad


def test_what_is_asked_for_does_not_depend_on_the_caller_s_mode():
    net = Net()
    score, x = as_score(net, SDE, "eps"), X.clone().requires_grad_()
    with torch.no_grad():
        assert sample(SDE, score, x.shape, "ddim", nfe=4, x_T=x, dtype=torch.float32, differentiable=True).requires_grad
        assert log_likelihood(SDE, score, x, differentiable=True).log_prob.requires_grad
    with torch.inference_mode(), pytest.raises(ValueError, match="inference mode has none"):
        sample(SDE, score, X.shape, nfe=4, differentiable=True)
    with pytest.raises(ValueError, match="differentiable must be True or False, got 'checkpoint'"):
        log_likelihood(SDE, score, x, differentiable="checkpoint")
