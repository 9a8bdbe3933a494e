"""The exponential multistep generator: its weights are the integrals they stand for, at every step and noise level."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from sdekit import SAMPLERS, SDE, VPSDE, HeatODE, sample, solve
from sdekit.processes.kinds import Kind, express
from sdekit.sampling.grids import make_grid
from sdekit.solvers.steppers import RULES, multistep, repeat
from sdekit.solvers.steppers.exponential import PREDICTIONS, Stored
from sdekit.solvers.steppers.table import Table
from tests import oracle
from tests.conftest import gaussian_score


class Silent:
    """Noise that is zero: what is left is the rule's mean."""

    def enter(self, t, s):
        pass

    def normal(self):
        return torch.zeros(1, dtype=torch.float64)


def table_of(order, prediction, h, churn=0.0):
    """The table of a grid with steps of h in half log-SNR, and the levels it belongs to."""
    sde = VPSDE()
    grid = sde.inverse_half_log_snr(torch.arange(6, dtype=torch.float64) * h)
    system = sde.reverse(lambda x, t: -x, churn)
    levels = system.levels(grid)
    return levels, multistep(order, prediction).table(system, levels)


@pytest.mark.parametrize("h", [1.0, 1e-1, 1e-3, 1e-5])
def test_weights_match_their_closed_form(h):
    """PITFALL 24: order 2 in x_0 has the weights alpha_s (phi_1 h + phi_2 h) and -alpha_s phi_2 h, by series."""
    lv, table = table_of(2, "x0", h)
    for i in range(1, 5):
        step = float(lv.lam[i + 1] - lv.lam[i])
        # integral of e^(u - h) u^m / h^m du over [0, h] = h sum_k (-h)^k m! / (m + k + 1)!  (no cancellation)
        i0, i1 = (step * sum((-step) ** k * math.factorial(m) / math.factorial(m + k + 1) for k in range(30))
                  for m in (0, 1))  # fmt: skip
        ratio = step / float(lv.lam[i] - lv.lam[i - 1])
        alpha = float(lv.alpha[i + 1])
        # the line through (0, p_t) and (-h_previous, p_previous)
        expected = np.array([alpha * (i0 + ratio * i1), -alpha * ratio * i1])
        np.testing.assert_allclose(table.weights[i], expected, rtol=1e-9)
        assert float(table.linear[i]) == pytest.approx(float(lv.sigma[i + 1] / lv.sigma[i]), rel=1e-12)


@pytest.mark.parametrize(
    ("churn", "h"), [*itertools.product((0.3, 1.0), (2.0, 1e-1, 1e-5)), (8.0, 1e-1), (8.0, 7e-3), (3.0, 0.5)]
)
def test_noise_and_linear_part_match_their_closed_form(churn, h):
    """SA-Solver's: x_0 has sigma_s sqrt(1 - e^(-2 c^2 h)) and e^(-c^2 h), eps has c sigma_s sqrt(e^(2h) - 1)."""
    c2 = churn**2
    for prediction in ("x0", "eps"):
        lv, table = table_of(3, prediction, h, churn)
        for i in range(5):
            step, sigma = float(lv.lam[i + 1] - lv.lam[i]), float(lv.sigma[i + 1])
            if prediction == "x0":
                std, linear = sigma * math.sqrt(-math.expm1(-2 * c2 * step)), sigma / lv.sigma[i] * math.exp(-c2 * step)
            else:
                std, linear = churn * sigma * math.sqrt(math.expm1(2 * step)), lv.alpha[i + 1] / lv.alpha[i]
            assert float(table.std[i]) == pytest.approx(std, rel=1e-9)
            assert float(table.linear[i]) == pytest.approx(float(linear), rel=1e-12)


@pytest.mark.parametrize("least", [1e-7, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_prediction_that_counts_for_little_at_last(least, dtype):
    """Stored as 1e-7 of itself, the weight of its last use, it would be lost for the use before."""
    columns = ([3.0, 2.0, 1.0], [-1.0] * 3, [0.0] * 3, [0.9, 0.8, 0.9], [0.0] * 3)
    time, scale, mix, linear, std = torch.tensor(columns, dtype=torch.float64)
    weights = torch.tensor([[0.3, 0.0], [0.2, least], [0.1, 0.05]], dtype=torch.float64)
    x = torch.tensor([0.5, -0.7], dtype=torch.float64)

    def run(x):
        system = HeatODE().reverse(lambda x, t: 0.6 * x, 0.0)
        table, lv = Table(time, scale, mix, linear, std, weights, None), system.levels(time)
        stored = Stored.of(scale, mix, system.said(lv), lv)
        state = table.rows(stored, x.dtype).start(system.moments(time.tolist(), x))
        for t in (3.0, 2.0, 1.0):
            x, state = multistep(2, "eps")(system, x, t, t - 1, None, state)
        return x

    p, q = [], x
    for i in range(3):
        p.insert(0, -0.6 * q)
        q = linear[i] * q + sum(w * v for w, v in zip(weights[i], p, strict=False))
    torch.testing.assert_close(run(x), q, rtol=1e-14, atol=0)
    torch.testing.assert_close(run(x.to(dtype)).double(), q, rtol=4 * torch.finfo(dtype).eps, atol=0)


CLOCK = {
    "half_log_snr": lambda lam, t: lam,
    "karras": lambda lam, t: math.exp(-lam),
    "flow": lambda lam, t: 1 / (1 + math.exp(lam)),
    "t": lambda lam, t: t,
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("order", "corrector"), [(1, False), (3, False), (4, False), (2, True), (3, True)])
@pytest.mark.parametrize(("clock", "churn"), [*itertools.product(CLOCK, (0.0,)), ("half_log_snr", 1.0)])
def test_polynomial_predictions_are_integrated_exactly(prediction, order, corrector, clock, churn):
    """A prediction that is a polynomial of the clock, of degree below the order, has no error, start included.

    The reference integrates the system's drift, which knows nothing of predictions and kernels.
    """
    sde = VPSDE()
    lam = torch.tensor([-1.5, -1.1, -0.5, -0.2, 0.4, 0.7, 1.1, 1.3], dtype=torch.float64)
    grid = sde.inverse_half_log_snr(lam)

    def score(x, t):
        a, s, u = sde.alpha(t), sde.sigma(t), float(sde.half_log_snr(t))
        c = CLOCK[clock](u, float(t))
        said = 0.7 + (c - 0.3) ** (order - 1)
        score = Kind(torch.zeros_like(s), -1 / s)
        scale, mix = express(score, PREDICTIONS[prediction].kind(a, s), a, s)
        return scale * said + mix * x

    system = sde.reverse(score, churn)
    x = torch.tensor([0.4], dtype=torch.float64)
    out = solve(system, x, grid, multistep(order, prediction, clock, corrector=corrector), noise=Silent()).x
    drift = lambda t, y: system.drift(torch.from_numpy(y), float(t)).numpy()  # noqa: E731
    ends = float(grid[0]), float(grid[-1])
    exact = solve_ivp(drift, ends, x.numpy(), method="DOP853", rtol=1e-9, atol=1e-10).y[:, -1]
    np.testing.assert_allclose(out.numpy(), exact, rtol=1e-7)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_order_one_is_ddim(sde, prediction):
    x = sde.prior_sample((3, 2), seed=0, dtype=torch.float64)
    system, grid = sde.probability_flow(gaussian_score(sde, 0.5)), make_grid(sde, "karras", 12)
    torch.testing.assert_close(
        solve(system, x, grid, multistep(1, prediction)).x, solve(system, x, grid, "ddim").x, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("churn", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("rule", [multistep(1), multistep(3), multistep(3, corrector=True), RULES["dpmpp_2m"]])
def test_x0_rules_are_exact_on_a_point_at_every_noise_and_step(sde, rule, churn):
    """PITFALL 11: for data that are one point x_0 is constant, and x_s ~ N(alpha_s x_0, sigma_s^2) in few steps."""
    point = 0.7

    def score(x, t):
        return -(x - sde.alpha(t) * point) / sde.sigma(t) ** 2

    grid = make_grid(sde, "karras", 5)[:-1]
    start = point * float(sde.alpha(sde.T)), float(sde.sigma(sde.T))
    mean, var = oracle.propagate(sde.reverse(score, churn), rule, grid, *start, rows=4)
    assert mean == pytest.approx(point * float(sde.alpha(grid[-1])), rel=1e-8)
    assert var == pytest.approx(float(sde.sigma(grid[-1])) ** 2, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states(named, dtype):
    """No number of a table overflows float16, and bf16 is as good as its digits."""
    for name in ("dpmpp_2m", "unipc_2", "flow_3m", "ipndm", "dpmpp_2s"):
        exact = sample(named, gaussian_score(named, 0.5), (64,), name, steps=10, seed=0, dtype=torch.float64)
        x_T = named.prior_sample((64,), seed=0, dtype=torch.float64)
        x = sample(named, gaussian_score(named, 0.5), (64,), name, steps=10, x_T=x_T.to(dtype))
        assert x.dtype == dtype
        assert (x.double() - exact).abs().mean() < (0.01 if dtype == torch.float16 else 0.08)


def test_one_evaluation_a_step_with_corrector_and_start_too():
    sde = VPSDE()
    system = sde.probability_flow(gaussian_score(sde, 0.5))
    x = sde.prior_sample((3, 2), seed=0, dtype=torch.float64)
    for rule in (multistep(2, corrector=True), multistep(3, corrector=True), multistep(4)):
        assert solve(system, x, make_grid(sde, "log_snr", 9), rule).nfe == 9
    assert RULES["unipc_3"].order == RULES["flow_unipc_3"].order == 4


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("name", [name for name, row in SAMPLERS.items() if not row.rule.extra])
def test_few_steps_work_everywhere(name, steps):
    """N = 1, 2, 3, where the start of a rule is also its end; grids of N steps take N steps."""
    sde = VPSDE()
    for denoise in (True, False):
        seen = []
        x = sample(sde, gaussian_score(sde), (2, 3), name, steps=steps, seed=0, dtype=torch.float64, denoise=denoise,
                   callback=lambda k, t, x, seen=seen: seen.append(t))  # fmt: skip
        assert torch.isfinite(x).all()
        assert len(seen) == steps
    assert seen[-1] == sde.t_min


def test_encoding_and_back():
    """The flow's rules run forwards in time too: there and back again at their order."""
    sde = HeatODE()
    system = sde.probability_flow(gaussian_score(sde, 0.5))
    x = torch.tensor([[0.3, -0.6]], dtype=torch.float64)
    for rule in (multistep(3), multistep(3, "eps", corrector=True), RULES["dpm_solver_3"]):
        errors = []
        for n in (20, 40):
            grid = make_grid(sde, "log_snr", n)
            there = solve(system, x, grid.flip(0), rule).x
            assert float(there.abs().max()) > 10
            errors.append(float((solve(system, there, grid, rule).x - x).abs().max()))
        assert errors[1] < 1e-3
        assert errors[1] < errors[0] / 4


def test_the_free_error_estimate_follows_the_error(digits64):
    """Per sample, from predictor and corrector alone: within a factor of ten of the predictor's error, and ranks it."""
    g, mixture = digits64
    sde, n = HeatODE(), 64
    x = sde.prior_sample((n, 64), seed=0, dtype=torch.float64)
    ref = g.flow(x.numpy(), 80.0, 0.002)
    system = sde.probability_flow(mixture.score(sde))
    estimates, errors = {}, {}
    for steps in (40, 80):
        grid = make_grid(sde, "vp_cubic", steps)
        estimates[steps] = solve(system, x, grid, "unipc_2", estimate=True).error.numpy()
        plain = solve(system, x, grid, multistep(2)).x.numpy()
        errors[steps] = np.sqrt(((plain - ref) ** 2).mean(1))
    ratio = np.median(estimates[80] / errors[80])
    assert 0.1 < ratio < 10
    ranks = [np.argsort(np.argsort(v)) for v in (estimates[80], errors[80])]
    assert np.corrcoef(*ranks)[0, 1] > 0.3
    assert np.median(estimates[40] / estimates[80]) == pytest.approx(4, rel=0.5)  # of order 2
    with_estimate, without = (solve(system, x, grid, "unipc_2", estimate=on).x for on in (True, False))
    assert torch.equal(with_estimate, without)
    rule = RULES["unipc_2"]
    _, state = rule(system, x, 80.0, 40.0, None, rule.begin(system, [80.0, 40.0, 20.0], x))
    _, state = rule(system, x, 40.0, 20.0, None, state)
    with pytest.raises(ValueError, match="must be asked for its correction before the first step"):
        rule.correction(state)
    with pytest.raises(ValueError, match="estimate needs a rule that corrects itself"):
        solve(system, x, grid, "ddim", estimate=True)
    with pytest.raises(ValueError, match="controls its error by rtol and atol"):
        solve(system, x, grid, "rk45", estimate=True)


def test_the_last_evaluation_corrects_the_result(sde):
    """The step to t = 0 starts from the corrected x, (x_c + sigma^2 score)/alpha; exact where x itself is not."""
    grid = sde.inverse_half_log_snr(torch.linspace(-1.5, 1.5, 7, dtype=torch.float64))

    def score(x, t):  # x_0 is a parabola of lambda: exact for the corrector of order 3, not for the predictor
        return (0.7 + (sde.half_log_snr(t) - 0.3) ** 2) * sde.alpha(t) / sde.sigma(t) ** 2 - x / sde.sigma(t) ** 2

    system = sde.probability_flow(score)
    x = torch.tensor([0.4], dtype=torch.float64)
    drift = lambda t, y: system.drift(torch.from_numpy(y), float(t)).numpy()  # noqa: E731
    ends = float(grid[0]), float(grid[-1])
    exact = solve_ivp(drift, ends, x.numpy(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    plain, out = solve(system, x, grid, "unipc_2"), solve(system, x, grid, "unipc_2", denoise=True)
    assert (plain.nfe, out.nfe) == (6, 7)
    assert abs(plain.x.numpy() - exact) > 1e-3
    alpha, sigma = float(sde.alpha(grid[-1])), float(sde.sigma(grid[-1]))
    corrected = alpha * out.x - sigma**2 * score(plain.x, grid[-1])
    np.testing.assert_allclose(corrected.numpy(), exact, rtol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"order": 0}, "order must be at least 1"),
        ({"order": 5}, "order must be at most 4, got 5"),
        ({"order": 4, "corrector": True}, "order must be at most 3 with a corrector, got 4"),
        ({"order": 2.5}, "order must be a whole number"),
        ({"order": 2, "prediction": "x_0"}, "unknown prediction 'x_0': did you mean 'x0'"),
        ({"order": 2, "clock": "half_logsnr"}, "unknown clock 'half_logsnr': did you mean 'half_log_snr'"),
        ({"order": 2, "clock": "step"}, "it needs freeze=True"),
        ({"order": 3, "corrector": True, "freeze": True}, "a corrector needs order <= 2"),
    ],
)
def test_bad_input_is_named(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        multistep(**arguments)
    with pytest.raises(TypeError, match="needs a score"):
        solve(VPSDE(), torch.ones(1), [0.1, 0.2], multistep(2))


def test_the_estimate_is_as_exact_as_the_state():
    """A constant prediction has nothing to correct, to rounding."""
    sde = VPSDE()

    def score(x, t):
        return (0.7 * sde.alpha(t) - x) / sde.sigma(t) ** 2

    x = torch.tensor([0.4], dtype=torch.float64)
    system, rule = sde.probability_flow(score), multistep(3, corrector=True)
    assert float(solve(system, x, make_grid(sde, "log_snr", 12), rule, estimate=True).error) < 1e-12


def test_a_rule_that_has_used_its_rows_says_so():
    sde = VPSDE()
    system = sde.probability_flow(gaussian_score(sde))
    with pytest.raises(ValueError, match="it cannot be repeated on an interval"):
        solve(system, torch.ones(2), [0.9, 0.5, 0.1], repeat(multistep(2), 3))


def test_a_process_that_gets_cleaner_is_refused():
    class Wavy(SDE):
        def alpha(self, t):
            return torch.ones_like(t)

        def sigma(self, t):
            return 0.1 + torch.sin(3 * t) + 0.1 * t

    for name in ("dpmpp_2m", "dpm_solver_2"):
        with pytest.raises(ValueError, match="must increase with t"):
            sample(Wavy(), lambda x, t: -x, (2,), name, grid="uniform", steps=20, seed=0)
