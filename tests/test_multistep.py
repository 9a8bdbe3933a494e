"""The exponential multistep generator: its weights are the integrals they stand for, at every step size."""

import math

import numpy as np
import pytest
import torch

from sdekit import SAMPLERS, VPSDE, solve
from sdekit.grids import make_grid
from sdekit.steppers import RULES, multistep
from tests.conftest import gaussian_score


def first_steps(order, prediction, h, corrector=False, clock="half_log_snr"):
    """The intervals of a grid with steps of h in half log-SNR, and the system they belong to."""
    sde = VPSDE()
    grid = sde.inverse_half_log_snr(torch.arange(6, dtype=torch.float64) * h)
    system = sde.probability_flow(lambda x, t: -x)
    system.prepare(grid.tolist(), torch.zeros(1))
    return sde, grid, multistep(order, prediction, clock, corrector=corrector).begin(system, grid.tolist()).steps


@pytest.mark.parametrize("h", [1.0, 1e-1, 1e-3, 1e-5])
def test_weights_match_their_closed_form(h):
    """PITFALL 24: order 2 in x_0 has the weights alpha_s (phi_1 h + phi_2 h) and -alpha_s phi_2 h, by series."""
    sde, grid, steps = first_steps(2, "x0", h)
    lam = sde.half_log_snr(grid)
    for i in range(1, 5):
        step = float(lam[i + 1] - lam[i])
        # integral of e^(u - h) u^m / h^m du over [0, h] = h sum_k (-h)^k m! / (m + k + 1)!  (no cancellation)
        i0, i1 = (step * sum((-step) ** k * math.factorial(m) / math.factorial(m + k + 1) for k in range(30))
                  for m in (0, 1))  # fmt: skip
        ratio = step / float(lam[i] - lam[i - 1])
        alpha = float(sde.alpha(grid[i + 1]))
        # the line through (0, p_t) and (-h_previous, p_previous)
        np.testing.assert_allclose(steps[i].predictor, [alpha * (i0 + ratio * i1), -alpha * ratio * i1], rtol=1e-9)
        assert steps[i].linear == pytest.approx(float(sde.sigma(grid[i + 1]) / sde.sigma(grid[i])), rel=1e-12)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("clock", ["half_log_snr", "karras"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_polynomial_predictions_are_integrated_exactly(prediction, clock, order):
    """A prediction that is a polynomial of the clock, of degree below the order, has no error at all."""
    _, grid, steps = first_steps(order, prediction, 0.4, corrector=True, clock=clock)
    sde = VPSDE()
    lam = sde.half_log_snr(grid).numpy()
    place = lam if clock == "half_log_snr" else np.exp(-lam)
    i, degree = 4, order - 1
    u = np.linspace(lam[i], lam[i + 1], 20001)
    c = u if clock == "half_log_snr" else np.exp(-u)
    if prediction == "x0":
        kernel = float(sde.alpha(grid[i + 1])) * np.exp(u - lam[i + 1])
    else:
        kernel = -float(sde.sigma(grid[i + 1])) * np.exp(lam[i + 1] - u)
    exact = np.trapezoid(kernel * c**degree, u)
    nodes = place[i - order + 1 : i + 1][::-1]
    assert np.dot(steps[i].predictor, nodes**degree) == pytest.approx(exact, rel=1e-7)
    nodes = np.concatenate([place[i + 1 : i + 2], nodes])
    exact = np.trapezoid(kernel * c**order, u)
    assert np.dot(steps[i].corrector, nodes**order) == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_order_one_is_ddim(sde, prediction):
    x = sde.prior_sample((3, 2), seed=0, dtype=torch.float64)
    system, grid = sde.probability_flow(gaussian_score(sde, 0.5)), make_grid(sde, "karras", 12)
    torch.testing.assert_close(
        solve(system, x, grid, multistep(1, prediction)).x, solve(system, x, grid, "ddim").x, rtol=1e-9, atol=1e-9
    )


def test_a_corrector_costs_no_evaluation():
    sde = VPSDE()
    system = sde.probability_flow(gaussian_score(sde, 0.5))
    x = sde.prior_sample((3, 2), seed=0, dtype=torch.float64)
    assert solve(system, x, make_grid(sde, "log_snr", 9), multistep(2, corrector=True)).nfe == 9
    assert RULES["unipc_2"].order == 3
    assert {"dpmpp_3m", "dpm_solver_3m", "deis", "unipc_2"} <= set(SAMPLERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0,), "order must be at least 1"),
        ((7,), "order must be at most 6"),
        ((2.5,), "order must be a whole number"),
        ((2, "x_0"), "unknown prediction 'x_0': did you mean 'x0'"),
        ((2, "x0", "half_logsnr"), "unknown clock 'half_logsnr': did you mean 'half_log_snr'"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        multistep(*arguments)
    with pytest.raises(TypeError, match="needs a score"):
        solve(VPSDE(), torch.ones(1), [0.1, 0.2], multistep(2))
