"""Measured orders: on the digits mixture, log-SNR-uniform grids, float64, a slope within 0.1 of the claim.

The mixture is seen in its sixteen leading directions, where it is a mixture again: what is left of 64 dimensions costs
three times as much, and says the same of an order.
"""

import itertools

import numpy as np
import pytest
import torch

from sdekit import VPSDE, GaussianMixture, HeatODE, as_score, solve
from sdekit.sampling.grids import make_grid
from sdekit.solvers.steppers import RULES
from tests import oracle
from tests.conftest import NAMED

# Every rule that solves the flow: "none" stays where it is, "ancestral", "edm" and "restart" have noise of their own.
ODE_RULES = {name: rule for name, rule in RULES.items() if name != "none" and not rule.noisy}
LAM = (-3.9, 3.0)  # the half log-SNRs between which orders are measured; VE's sigma(T) is 50, below e^4


def counts(rule):
    """Numbers of steps: of multistep methods of high order, whose slope settles later, finer ones."""
    if rule.evaluations > 1:
        return 80, 160
    return (320, 640) if rule.order > 2 else (160, 320)


def slope(steps, errors):
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


def typical(x, ref):
    """The geometric mean over samples, whose slope is the mean of theirs: of others the largest errors are all."""
    return float(np.exp(np.log(((np.asarray(x) - np.asarray(ref)) ** 2).mean(1)).mean() / 2))


def reparameterised(sde, score, predicts):
    """The same score as a network that predicts something else."""

    def network(x, t):
        s, a = score(x, t), sde.alpha(t).reshape(-1, *(1,) * (x.ndim - 1))
        sigma = sde.sigma(t).reshape(-1, *(1,) * (x.ndim - 1))
        eps = -sigma * s
        x0 = (x - sigma * eps) / a
        return {"score": s, "eps": eps, "x0": x0, "v": a * eps - sigma * x0}[predicts]

    return as_score(network, sde, predicts)


@pytest.fixture(scope="module")
def exact_flow(digits64):
    """The mixture, x at lambda = -3.9, which every process has, and where the exact flow takes it at 3, in the Karras
    frame.
    """
    g, _ = digits64
    between = g.m - g.w @ g.m
    _, u = np.linalg.eigh(np.einsum("k,kij->ij", g.w, g.covs) + between.T @ (g.w[:, None] * between))
    lead = (u * np.sign(u.sum(0)))[:, -16:]
    covs = lead.T @ g.covs @ lead
    g = oracle.Mixture(g.m @ lead, (covs + covs.transpose(0, 2, 1)) / 2, g.w)
    s0, s1 = np.exp(-LAM[0]), np.exp(-LAM[1])
    y = s0 * np.random.default_rng(0).standard_normal((64, 16))
    ref = torch.from_numpy(g.flow(y, s0, s1, rtol=1e-12, atol=1e-13))
    return GaussianMixture(g.m, g.covs, g.w), torch.from_numpy(y), ref


@pytest.mark.parametrize("rule", ODE_RULES)
@pytest.mark.parametrize("name", NAMED)
def test_order_on_every_process(exact_flow, rule, name):
    """PITFALLS 6, 7, 8: order, not closeness."""
    sde, (mixture, y, ref) = NAMED[name](), exact_flow
    system = sde.probability_flow(mixture.score(sde))
    order, errors = RULES[rule].order, []
    for n in counts(RULES[rule]):
        grid = sde.inverse_half_log_snr(torch.linspace(*LAM, n + 1, dtype=torch.float64))
        x = solve(system, y * sde.alpha(grid[0]), grid, rule).x / sde.alpha(grid[-1])
        errors.append(typical(x, ref))
    assert slope(counts(RULES[rule]), errors) == pytest.approx(order, abs=0.1), errors


@pytest.mark.parametrize("predicts", ["eps", "x0", "v"])
@pytest.mark.parametrize("rule", ODE_RULES)
def test_order_under_every_parameterisation(exact_flow, rule, predicts):
    """PITFALL 8: a Heun with the wrong sigma hides under eps-prediction; here each parameterisation is one score."""
    sde, (mixture, y, ref) = VPSDE(), exact_flow
    system = sde.probability_flow(reparameterised(sde, mixture.score(sde), predicts))
    order, errors = RULES[rule].order, []
    steps = counts(RULES[rule])
    for n in steps:
        grid = sde.inverse_half_log_snr(torch.linspace(*LAM, n + 1, dtype=torch.float64))
        errors.append(typical(solve(system, y * sde.alpha(grid[0]), grid, rule).x / sde.alpha(grid[-1]), ref))
    assert slope(steps, errors) == pytest.approx(order, abs=0.1), errors


def test_noisy_ddim_refuses_to_run_forwards(digits64):
    from sdekit.solvers.steppers import ddim

    sde = HeatODE()
    system = sde.probability_flow(digits64[1].score(sde))
    with pytest.raises(ValueError, match="holds backwards in time only; use eta = 0"):
        solve(system, torch.ones(1, 64), [0.1, 0.2], ddim(eta=0.5))
    times = torch.logspace(0, 1.6, 200)
    x = solve(system, torch.ones(1, 64, dtype=torch.float64), times, ddim(eta=0.0)).x
    back = solve(system, x, times.flip(0), ddim(eta=0.0)).x
    torch.testing.assert_close(back, torch.ones_like(back), rtol=0, atol=0.05)  # encoding and back


def test_reference_errors_on_digits64(digits64):
    """EDM's Euler and Heun on its own grid, start and budget: the numbers of an independent NumPy run, to 1e-6."""
    from sdekit import sample

    g, mixture = digits64
    sde, n = HeatODE(), 24
    x_T = 80 * torch.randn(n, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1234))
    for nfe in (5, 10, 20):
        i = np.arange(nfe) / (nfe - 1)
        levels = np.append((80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0)
        y = x_T.numpy().copy()
        for a, b in itertools.pairwise(levels):
            y = y + (b - a) * (y - g.denoise(y, a)) / a
        for name in ("euler", "ddim"):
            ours = sample(sde, mixture.score(sde), x_T.shape, name, nfe=nfe, x_T=x_T, grid="karras")
            np.testing.assert_allclose(ours.numpy(), y, atol=1e-6)
        half = nfe // 2 + nfe % 2
        i = np.arange(half) / (half - 1)
        levels = np.append((80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7, 0)
        y = x_T.numpy().copy()
        for a, b in itertools.pairwise(levels):
            d = (y - g.denoise(y, a)) / a
            end = y + (b - a) * d
            y = end if b == 0 else y + (b - a) * (d + (end - g.denoise(end, b)) / b) / 2
        ours = sample(sde, mixture.score(sde), x_T.shape, "heun", nfe=nfe, x_T=x_T, grid="karras")
        np.testing.assert_allclose(ours.numpy(), y, atol=1e-6)
    assert make_grid(sde, "karras", 3).tolist() == pytest.approx(
        [80.0, (80 ** (1 / 7) + (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 3) ** 7,
         (80 ** (1 / 7) + 2 * (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 3) ** 7, 0.002]
    )  # fmt: skip
