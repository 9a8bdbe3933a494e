"""Solvers that start, or end, where alpha = 0: order from T itself, every method and network, and what is refused."""

import math

import numpy as np
import pytest
import torch

from sdekit import CosineVP, RectifiedFlow, as_score, solve
from sdekit.solvers.solve import ADAPTIVE
from sdekit.solvers.steppers import RULES, euler_maruyama
from tests import oracle
from tests.zero import (
    ZERO,
    Rounded,
    exact_flow,
    levels_from_T,
    mixture_network,
    moved,
    network,
)

# Rules of the flow. "reverse_diffusion" cannot start where alpha = 0, and says so.
ODE_RULES = [name for name, rule in RULES.items() if not rule.noisy and name not in ("none", "reverse_diffusion")]
DRIFT = ["euler_maruyama", "milstein", "heun", "rk4", "sra1", "ddim"]
END = 0.05


def counts(rule):
    """Numbers of steps: finer ones for multistep rules of high order, whose slope settles late."""
    if RULES[rule].evaluations > 1:
        return (80, 160) if RULES[rule].order == 4 else (160, 320)
    return {1: (80, 160), 2: (160, 320), 3: (320, 640), 4: (1280, 2560)}[RULES[rule].order]


def slope(steps, errors):
    return math.log(errors[0] / errors[1]) / math.log(steps[1] / steps[0])


@pytest.fixture(scope="module")
def latents(digits64):
    """8 draws at T, where x/(alpha + sigma) is x, and where the exact flow takes them at u = .05."""
    x = np.random.default_rng(2).standard_normal((8, 64))
    return torch.from_numpy(x), torch.from_numpy(exact_flow(digits64[0], x, 1.0, END, 1e-12))


def measured(sde, score, rule, latents, forwards, steps):
    """Mean errors of x/(alpha + sigma), which is the rectified flow's of every process."""
    x, y = latents
    scale = float(sde.alpha(levels_from_T(sde, 2)[-1]) + sde.sigma(levels_from_T(sde, 2)[-1]))
    errors = []
    for n in steps:
        grid = levels_from_T(sde, n, END)
        if forwards:
            out = solve(sde.probability_flow(score), y * scale, grid.flip(0), rule).x
            errors.append(oracle.error(out, x.numpy()))
        else:
            out = solve(sde.probability_flow(score), x, grid, rule).x
            errors.append(oracle.error(out / scale, y.numpy()))
    return errors


@pytest.mark.parametrize("rule", ODE_RULES)
def test_order_from_T(digits64, latents, rule):
    """The claimed order, with the step from alpha = 0 in it, on a grid whose gaps shrink alike there."""
    sde = RectifiedFlow()
    errors = measured(sde, digits64[1].score(sde), rule, latents, False, counts(rule))
    assert slope(counts(rule), errors) == pytest.approx(RULES[rule].order, abs=0.1), errors
    assert errors[-1] < 1e-2


# A polynomial in log-SNR does not see x_0's smoothness at alpha = 0 before the gap is below the clock's own 1/1000: the
# other rules gain half an order less on this grid up to thousands of steps, and their order only then.
UNIFORM = [*DRIFT, "dpmpp_2m", "unipc_2", "v_3m", "flow_3m", "flow_unipc_3", "dpm_solver_2", "dpmpp_2s"]


@pytest.mark.parametrize("rule", UNIFORM)
def test_order_from_T_on_even_steps(digits64, latents, rule):
    """Uniform in u the first step is as long as the others: a start of lower order would show."""
    sde, (x, y), errors = RectifiedFlow(), latents, []
    steps = (640, 1280) if RULES[rule].order > 2 and RULES[rule].evaluations == 1 else (160, 320)
    for n in steps:
        grid = torch.linspace(1, END, n + 1, dtype=torch.float64)
        errors.append(oracle.error(solve(sde.probability_flow(digits64[1].score(sde)), x, grid, rule).x, y.numpy()))
    assert slope(steps, errors) == pytest.approx(RULES[rule].order, abs=0.1), errors


@pytest.mark.parametrize("rule", ODE_RULES)
def test_order_to_T(digits64, latents, rule):
    """Forwards, as encoding goes: the last step is the one to alpha = 0."""
    sde = RectifiedFlow()
    steps = (160, 320) if RULES[rule].order > 2 else (80, 160)
    errors = measured(sde, digits64[1].score(sde), rule, latents, True, steps)
    assert slope(steps, errors) == pytest.approx(RULES[rule].order, abs=0.1), errors


@pytest.mark.parametrize("rule", [*DRIFT, "dpmpp_3m"])
def test_order_from_T_on_a_process_of_other_slopes(digits64, latents, rule):
    """Rules on the drift see alpha' and sigma', which are no constants here."""
    sde, steps = CosineVP(), counts(rule)
    errors = measured(sde, digits64[1].score(sde), rule, latents, False, steps)
    assert slope(steps, errors) == pytest.approx(RULES[rule].order, abs=0.1), errors


@pytest.mark.parametrize(
    ("rule", "predicts"),
    [("heun", "x0"), ("deis", "x0"), ("dpmpp_3m", "flow"), ("v_3m", "x0"), ("dpm_solver_2", "flow")],
)
def test_order_from_T_whatever_the_network_says(digits64, latents, rule, predicts):
    sde, steps = RectifiedFlow(), counts(rule)
    errors = measured(sde, mixture_network(digits64[1], sde, predicts), rule, latents, False, steps)
    assert slope(steps, errors) == pytest.approx(RULES[rule].order, abs=0.1), errors


@pytest.mark.parametrize("name", ["flow_3", "cosine_0", "table", "rounded"])
def test_a_process_is_its_levels(name):
    """Exponential rules on the same levels do the same, step for step, from T on: x/(alpha + sigma) to rounding."""
    plain, sde = RectifiedFlow(), ZERO[name]()
    x = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grids = [levels_from_T(s, 12) for s in (plain, sde)]
    scale = float(sde.alpha(grids[1][-1]) + sde.sigma(grids[1][-1]))
    for rule in ODE_RULES:
        if rule in DRIFT and rule != "ddim":
            continue
        want = solve(plain.probability_flow(network(plain, "flow")), x, grids[0], rule).x
        for predicts in ("x0", "v", "flow"):
            got = solve(sde.probability_flow(network(sde, predicts)), x, grids[1], rule).x / scale
            torch.testing.assert_close(got, want, rtol=0, atol=1e-10, msg=lambda m: f"{rule} {predicts} {m}")  # noqa: B023


def test_without_noise_the_first_step_is_exact_where_predictions_do_not_change():
    """Data that are a point: x_0, eps and all of them stay what they were, however long the steps from T."""
    sde, point = RectifiedFlow(), 0.7
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for rule in ODE_RULES:
        if rule == "v_3m":  # v turns with the angle
            continue
        for grid in ([1.0, 0.4], [1.0, 0.9, 0.3], [1.0, 0.999, 0.6, 0.2]):
            said = "flow" if rule in DRIFT else "v"
            score = network(sde, said, point, 1e-12)
            out = solve(sde.probability_flow(score), x, grid, rule).x
            want = (1 - grid[-1]) * point + grid[-1] * x
            torch.testing.assert_close(out, want, rtol=0, atol=1e-6, msg=lambda m: f"{rule} {grid} {m}")  # noqa: B023


@pytest.mark.parametrize("method", [*ADAPTIVE, "torchdiffeq:dopri5", "scipy:DOP853"])
@pytest.mark.parametrize("name", ["flow", "cosine", "rounded"])
def test_adaptive_methods_from_T_and_to_T(name, method):
    sde = ZERO[name]()
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low = moved(sde, x, sde.T, sde.t_min)
    tolerance = 1e-8 if ":" in method else 1e-5 if "23" in method else 1e-6  # a back-end's is the whole batch's
    for predicts in ("x0", "v", "flow") if name == "flow" else ("v",):
        system = sde.probability_flow(network(sde, predicts))
        for start, want, ends in ((x, low, [sde.T, sde.t_min]), (low, x, [sde.t_min, sde.T])):
            out = solve(system, start, ends, method, rtol=tolerance, atol=tolerance)
            assert out.success
            torch.testing.assert_close(out.x, want, rtol=0, atol=5e-5 if "23" in method else 5e-6)


def test_two_nodes_without_signal_are_refused_by_name():
    """They are one level; where a grid has both the weights would be NaN, and the blame the score's."""
    sde = RectifiedFlow()
    for rule in ("dpmpp_2m", "dpm_solver_2"):
        with pytest.raises(ValueError, match="sigma/alpha must increase with t, but does not at t = 1"):
            solve(sde.probability_flow(network(sde, "v")), torch.zeros(2, 2).double(), [1, 1 - 1e-13, 0.5], rule)


def test_a_user_s_zero_is_zero():
    """cos(pi/2 t), which rounds to 6e-17 at T, is CosineVP(0), which is 0 there: in every rule, to rounding."""
    mine, exact = Rounded(), CosineVP(0.0)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    grid = torch.linspace(1, 0.05, 9, dtype=torch.float64)
    for rule in ODE_RULES:
        a, b = (solve(s.probability_flow(network(s, "v")), x, grid, rule).x for s in (mine, exact))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for predicts in ("eps", "score"):
        with pytest.raises(ValueError, match=rf"Rounded has zero terminal SNR.*predicts {predicts}"):
            solve(mine.probability_flow(network(mine, predicts)), x, grid, "ddim")
    with pytest.raises(ValueError, match="the reverse SDE of Rounded has no finite drift"):
        solve(mine.reverse(network(mine, "v")), x, grid, euler_maruyama)


def test_a_faint_signal_is_used():
    """alpha(T) = 1e-9 is no zero: eps tells x_0 there, and the flow starts there and is the exact one."""

    class Faint(RectifiedFlow):
        def alpha(self, t):
            return 1 - (1 - 1e-9) * t

        def sigma(self, t):
            return t

    sde = Faint()
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    want = moved(sde, x, 1.0, 0.1)
    for predicts in ("eps", "x0", "v"):
        score = as_score(network(sde, predicts).network, sde, predicts)
        for rule, n in (("ddim", 400), ("dpmpp_2m", 100), ("deis", 100)):
            grid = torch.cat([torch.ones(1), torch.linspace(0.9999, 0.1, n)]).double()
            out = solve(sde.probability_flow(score), x, grid, rule).x
            torch.testing.assert_close(out, want, rtol=0, atol=5e-3)
