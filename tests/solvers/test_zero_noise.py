"""Noise from a start where alpha = 0: the first step in closed form, mean and variance, and who cannot start there."""

import math

import pytest
import torch

from sdekit import RectifiedFlow, solve
from sdekit.solvers.steppers import RULES, ddim, multistep, restart, singlestep
from sdekit.solvers.steppers.exponential import CLOCKS, PREDICTIONS, fitting, integrand
from sdekit.system import Levels
from tests import oracle
from tests.zero import MEAN, STD, ZERO, levels_from_T, moments, network, rounding_grid

DRIFT = ["euler_maruyama", "milstein", "heun", "rk4", "sra1"]


def at(lam):
    """Levels of the rectified flow."""
    lam = torch.as_tensor(lam, dtype=torch.float64)
    return Levels(lam, torch.sigmoid(lam), torch.sigmoid(-lam), lam)


@pytest.mark.parametrize("churn", [0.05, 0.25, 0.5, 1.0, 2.0])
def test_the_noise_of_the_first_step(churn):
    """In closed form, with k = 1 + churn^2 and r = sigma/alpha at the step's end; its start has r infinite.

    x_0: all of sigma. v: sqrt(alpha^2 + sigma^2). With phi = 1 + q r (flow: q = 1; eps, of which x_0/100 is taken off:
    q = 1/100):  alpha^2/q^2 [(1 + q r)^2 - 2 churn^2 (1 + q r)/(2 k - 1)].
    """
    end = at([-8.0, -6.9, -5.0, -3.0, -1.0, 0.0])
    start, r, k = at([-math.inf] * 6), torch.exp(-end.lam), 1 + churn**2
    flow, eps = (
        end.alpha / q * ((1 + q * r) ** 2 - 2 * churn**2 * (1 + q * r) / (2 * k - 1)).sqrt() for q in (1.0, 0.01)
    )
    want = {"x0": end.sigma, "v": torch.hypot(end.alpha, end.sigma), "flow": flow, "eps": eps}
    for prediction in PREDICTIONS:
        kind, _ = fitting(prediction, "half_log_snr", start)
        got = integrand(kind, churn, start, end)
        torch.testing.assert_close(got.std, want[prediction], rtol=1e-5, atol=0, msg=lambda m: f"{prediction} {m}")  # noqa: B023
        torch.testing.assert_close(got.std[:4], want[prediction][:4], rtol=1e-7, atol=0)
        assert float(got.linear.abs().max()) == 0  # x_T is forgotten
        if prediction != "v":  # of a prediction that does not change the step is exact
            share = end.alpha / {"x0": 1.0, "flow": -1.0, "eps": -0.01}[prediction]
            torch.testing.assert_close(got.kernel.sum(1), share, rtol=1e-5, atol=0)


@pytest.mark.parametrize("churn", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("rule", ["dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3", "dpmpp_2s"])
def test_rules_of_x0_are_exact_on_a_point_at_every_noise(rule, churn):
    """x_s ~ N(alpha_s x_0, sigma_s^2) from N(0, 1) at T: a first step of another variance shows at once."""
    for name in ("flow", "cosine", "rounded"):
        sde = ZERO[name]()
        system = sde.reverse(network(sde, "x0", MEAN, 1e-9), churn)
        for grid in ([1.0, 0.5], [1.0, 0.95, 0.5], [1.0, 0.9999, 0.9, 0.5]):
            mean, var = oracle.propagate(system, RULES[rule], torch.tensor(grid).double(), 0.0, 1.0, rows=8)
            assert mean == pytest.approx(float(sde.alpha(0.5)) * MEAN, abs=1e-7)
            assert var == pytest.approx(float(sde.sigma(0.5)) ** 2, rel=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_exact_on_a_point_at_every_noise(eta):
    for name in ("flow", "cosine", "rounded"):
        sde = ZERO[name]()
        system = sde.probability_flow(network(sde, "v", MEAN, 1e-9))
        for grid in ([1.0, 0.5], [1.0, 0.95, 0.5]):
            mean, var = oracle.propagate(system, ddim(eta), torch.tensor(grid).double(), 0.0, 1.0, rows=8)
            assert mean == pytest.approx(float(sde.alpha(0.5)) * MEAN, abs=1e-7)
            assert var == pytest.approx(float(sde.sigma(0.5)) ** 2, rel=1e-7)


def weak_errors(rule, churn, n, sde, predicts="v"):
    """Of mean and variance at u = .2, from N(0, 1) at T: exactly, for the start is."""
    grid = rounding_grid(sde, n)
    system = sde.reverse(network(sde, predicts), churn)
    mean, var = oracle.propagate(system, rule, grid, 0.0, 1.0, rows=n * rule.evaluations + n)
    m, v = moments(sde, float(grid[-1]))
    return max(abs(mean - m) / MEAN, abs(var / v - 1))


def assert_weak_order(rule, churn, claim, sde, predicts="v"):
    """From below. Where the leading term is small by chance it need not show."""
    for n in (160, 640):
        coarse, fine = (weak_errors(rule, churn, k, sde, predicts) for k in (n, 2 * n))
        if fine < 1e-5 or math.log2(coarse / fine) > claim - 0.15:
            break
    else:
        raise AssertionError(f"order {math.log2(coarse / fine):.2f} at {n} steps, errors {coarse:.1e}, {fine:.1e}")
    assert fine < (0.03 if claim == 1 else 0.01)


# Exact noise, of the system's amount; DDIM's own is "ancestral".
STOCHASTIC = [
    name
    for name, rule in RULES.items()
    if rule.churn is None and not rule.noisy and name not in (*DRIFT, "none", "reverse_diffusion")
]


@pytest.mark.parametrize("churn", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("rule", STOCHASTIC)
def test_weak_order_from_T(rule, churn):
    """Mean and variance on Gaussian data without Monte-Carlo error, at every noise.

    The first gap of alpha/sigma falls as 1/n^2 here. On a grid where it falls as 1/n rules of eps, v and flow have
    order 1 + 2 churn^2, if that is less: over the first step, where x is made anew, all but x_0 change by their size.
    """
    assert_weak_order(RULES[rule], churn, RULES[rule].weak_order, RectifiedFlow())


@pytest.mark.parametrize("name", ["flow_3", "cosine"])
@pytest.mark.parametrize("rule", ["ancestral", "edm"])
def test_weak_order_from_T_of_rules_with_noise_of_their_own(rule, name):
    assert_weak_order(RULES[rule], 0.0, RULES[rule].weak_order, ZERO[name]())


@pytest.mark.parametrize("clock", [*CLOCKS, "step"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weak_order_from_T_of_every_prediction_and_clock(prediction, clock):
    assert_weak_order(multistep(2, prediction, clock, freeze=clock == "step"), 1.0, 2, RectifiedFlow(), "x0")
    if clock == "half_log_snr":
        assert_weak_order(singlestep([(0.5, (0,)), (1.0, (1,))], 2, prediction, clock), 1.0, 2, RectifiedFlow(), "flow")


def test_a_restart_after_a_start_without_signal():
    sde = RectifiedFlow()
    m, v = moments(sde, 0.02)
    errors = []
    for n in (20, 80):
        rule, grid = restart(steps=n // 2), levels_from_T(sde, n, 0.02)
        mean, var = oracle.propagate(sde.probability_flow(network(sde, "v")), rule, grid, 0.0, 1.0, rows=4)
        errors.append(max(abs(mean - m), abs(var / v - 1)))
    assert errors[1] < errors[0] / 10
    assert errors[1] < 3e-3


@pytest.mark.parametrize("rule", [*DRIFT, "reverse_diffusion"])
def test_rules_of_the_reverse_drift_refuse_T_by_name(rule):
    """It is infinite there. The remedies that the message names are taken as they stand."""
    sde, x = RectifiedFlow(), torch.zeros(400, 1, dtype=torch.float64)
    system = sde.reverse(network(sde, "v"))
    with pytest.raises(ValueError, match=r"alpha = 0, at T = 1.*start a little lower.*ancestral") as error:
        solve(system, x, torch.linspace(1, sde.t_min, 20), rule)
    grid = torch.linspace(0.999, sde.t_min, 100, dtype=torch.float64)
    if rule != "reverse_diffusion":
        assert "sde.T = 0.99, with grid='karras'" in str(error.value)
    x = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for again in (rule, "ancestral", "unipc_3", "dpmpp_2m"):
        times = grid if again == rule else levels_from_T(sde, 200, sde.t_min)
        out = solve(system if again != "ancestral" else sde.probability_flow(system.model.model), x, times, again).x
        assert float(out.mean()) == pytest.approx(MEAN, abs=0.06)
        assert float(out.std()) == pytest.approx(STD, abs=0.06)
