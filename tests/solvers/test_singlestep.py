"""The exponential single-step rules, EDM's churn and restarts, by closed forms."""

import math

import numpy as np
import pytest
import torch

from sdekit import VPSDE, HeatODE, Noise, Sampler, sample, solve
from sdekit.sampling.grids import make_grid
from sdekit.solvers.steppers import RULES, edm, restart, singlestep
from tests import oracle
from tests.conftest import gaussian_score


def test_without_churn_edm_is_heun_where_sigma_is_t(digits64):
    """Karras et al. 2022: algorithm 2 with S_churn = 0 is algorithm 1, Heun's method on dx/dsigma."""
    sde = HeatODE()
    system = sde.probability_flow(digits64[1].score(sde))
    x = sde.prior_sample((4, 64), seed=0, dtype=torch.float64)
    grid = make_grid(sde, "karras", 12)
    torch.testing.assert_close(solve(system, x, grid, edm(churn=0.0)).x, solve(system, x, grid, "heun").x)


def test_edm_is_algorithm_2(digits64):
    """A literal run of Karras et al. 2022, algorithm 2, on the same numbers, step for step."""
    g, mixture = digits64
    sde, churn, low, high, inflate, n = HeatODE(), 10.0, 0.05, 50.0, 1.003, 10
    x = sde.prior_sample((3, 64), seed=0, dtype=torch.float64)
    grid, noise = make_grid(sde, "karras", n), Noise(x, 5)
    ours = solve(sde.probability_flow(mixture.score(sde)), x, grid, edm(churn, low, high, inflate), noise=Noise(x, 5)).x
    y = x.numpy()
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        noise.enter(t, s)
        gamma = min(churn / n, math.sqrt(2) - 1) if low <= t <= high else 0.0
        raised = t * (1 + gamma)
        if gamma:
            y = y + math.sqrt(raised**2 - t**2) * inflate * noise.normal().numpy()
        d = (y - g.denoise(y, raised)) / raised
        end = y + (s - raised) * d
        y = y + (s - raised) * (d + (end - g.denoise(end, s)) / s) / 2
    np.testing.assert_allclose(ours.numpy(), y, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "rule", [restart(steps=15), restart(RULES["dpmpp_3m"], steps=15), restart(RULES["dpm_solver_2"], 0.05, 2.0, 4, 20)]
)
def test_restarts_keep_the_law_exactly(sde, rule):
    """Mean and variance by exact propagation: what is left is the flow's own error, which fine grids remove."""
    mean, std = 0.3, 0.5

    def score(x, t):
        a, s = sde.alpha(t), sde.sigma(t)
        return -(x - a * mean) / (a**2 * std**2 + s**2)

    grid = make_grid(sde, "log_snr", 150)
    start, end = (
        (float(sde.alpha(t)) * mean, math.hypot(float(sde.alpha(t)) * std, float(sde.sigma(t)))) for t in grid[[0, -1]]
    )
    m, v = oracle.propagate(sde.probability_flow(score), rule, grid, *start, rows=4)
    assert m == pytest.approx(end[0], rel=0.01)
    assert v == pytest.approx(end[1] ** 2, rel=0.02)


def test_a_restart_happens_once_and_costs_what_it_says():
    sde = HeatODE()
    calls = []

    def score(x, t):
        calls.append(float(t))
        return gaussian_score(sde)(x, t)

    rule = restart(low=0.1, high=1.0, repeats=3, steps=4)
    sample(sde, score, (2,), Sampler(rule, grid="karras"), steps=10, seed=0)
    assert len(calls) == 10 * 2 + 3 * 4 * 2 + 1
    assert rule.extra == 24
    assert sum(abs(t - 1.0) < 1e-9 for t in calls) == 3
    assert sample(sde, score, (2,), "restart", nfe=30, seed=0).shape == (2,)


def test_the_budget_counts_what_a_run_adds():
    sde = VPSDE()
    with pytest.raises(ValueError, match="nfe must be at least 15, one step"):
        sample(sde, gaussian_score(sde), (2,), "restart", nfe=14)
    for nfe in (15, 16, 17, 40):
        count = []
        sample(sde, lambda x, t, count=count: count.append(0) or gaussian_score(sde)(x, t), (2,), "restart", nfe=nfe)
        assert nfe - 1 <= len(count) <= nfe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: edm(churn=-1.0), "churn must be a finite number >= 0"),
        (lambda: edm(low=2.0, high=1.0), "low must be below high, got 2 and 1"),
        (lambda: edm(inflate=0.0), "inflate must be a finite number > 0"),
        (lambda: restart(low=0.5, high=0.3), "low must be below high, got 0.5 and 0.3"),
        (lambda: restart(repeats=0), "repeats must be at least 1"),
        (lambda: singlestep([(1.0, (0,))], 1, "epsilon"), "unknown prediction 'epsilon'"),
        (lambda: singlestep([(0.5, (0,))], 1), "the last c = 1"),
        (lambda: singlestep([(1.0, (1,))], 1), "uses below j"),
        (lambda: singlestep([], 1), "stages must be pairs"),
        (lambda: restart("ddim"), "a step rule must be a callable"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_levels_of_the_grid_itself_are_levels():
    """The highest of the process, and the last of the grid, whatever their rounding."""
    sde = HeatODE()
    x = torch.ones(2, dtype=torch.float64)
    for low in (0.05, 0.1, 0.06):
        system = sde.probability_flow(gaussian_score(sde))
        assert solve(system, x, [80.0, 10.0, 1.0, 0.3, low], restart(low=low, high=80.0)).nfe == 4 * 2 + 2 * 3 * 2


def test_noise_of_the_user_is_left_alone_and_edm_runs_backwards_only():
    sde = VPSDE()

    class Path:
        z = torch.ones(2, dtype=torch.float64)

        def enter(self, t, s):
            pass

        def normal(self):
            return self.z

    solve(sde.reverse(gaussian_score(sde)), Path.z.clone(), [0.9, 0.5, 0.1], "dpm_solver_2", noise=Path())
    assert torch.equal(Path.z, torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="holds backwards in time only"):
        solve(sde.probability_flow(gaussian_score(sde)), torch.ones(2), [0.1, 0.5], edm())


def test_levels_outside_the_grid_are_named():
    sde = HeatODE()
    system = sde.probability_flow(gaussian_score(sde))
    x = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="low must be a level that the grid passes"):
        solve(system, x, [10.0, 1.0, 0.5], restart())
    with pytest.raises(ValueError, match="high must be at most 80"):
        solve(system, x, [10.0, 1.0, 0.01], restart(high=90.0))
    with pytest.raises(TypeError, match="needs a score"):
        solve(sde, x, [0.1, 0.2], "dpm_solver_2")
