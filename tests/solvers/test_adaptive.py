"""The adaptive methods, with everything per sample."""

import math

import numpy as np
import pytest
import torch

from sdekit import VPSDE, HeatODE, SolverError, System, as_score, guidance, ode_sample, solve
from sdekit.solvers.adams import Adams
from sdekit.solvers.adaptive import adaptive
from sdekit.solvers.rungekutta import TABLEAUS, RungeKutta
from sdekit.solvers.solve import ADAPTIVE
from tests import oracle
from tests.conftest import NAMED, gaussian_score

every_method = pytest.mark.parametrize("method", ADAPTIVE)


@pytest.mark.parametrize(("name", "order"), [("rk45", 5), ("rk23", 3)])
def test_tableaus_satisfy_the_order_conditions(name, order):
    """Row sums are the nodes; of both members, up to the claimed order, and no further for the lower one."""
    p = TABLEAUS[name]
    a = np.zeros((len(p.c), len(p.c)))
    for i, row in enumerate(p.a):
        a[i, : len(row)] = row
    c = np.array(p.c)
    np.testing.assert_allclose(a.sum(1), c, atol=1e-14)
    main = a[-1]
    lower = main - np.array(p.e)
    for b, k in ((main, order), (lower, order - 1)):
        conditions = [(b @ c ** (j - 1), 1 / j, j) for j in range(1, 6)]
        conditions += [(b @ a @ c, 1 / 6, 3), (b @ a @ c**2, 1 / 12, 4), (b @ a @ a @ a @ c, 1 / 120, 5)]
        for value, target, needed in conditions:
            if needed <= k:
                assert value == pytest.approx(target)
        assert abs(b @ c**k - 1 / (k + 1)) > 1e-4
    assert p.order == order


def harmonic(y, t, run):
    return torch.stack([y[:, 1], -y[:, 0]], 1)


@pytest.mark.parametrize("ends", [(0.0, 5.0), (5.0, 0.0)])
@pytest.mark.parametrize("name", TABLEAUS)
def test_error_follows_the_tolerance(name, ends):
    """Both directions of time, over six decades: error proportional to tolerance within a factor of ten."""
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    span = ends[1] - ends[0]
    exact = torch.tensor([[math.cos(span), -math.sin(span)]], dtype=torch.float64)
    ratios = []
    for tol in (1e-4, 1e-6, 1e-8, 1e-10):
        out = adaptive(RungeKutta(harmonic, tol, tol, TABLEAUS[name]), y, torch.tensor(ends, dtype=torch.float64))
        ratios.append(float((out.x - exact).abs().max()) / tol)
        assert out.success
    assert max(ratios) < 30
    assert max(ratios) / min(ratios) < 10


@every_method
def test_no_evaluation_outside_the_interval(method):
    """PITFALL 15: not by the first-step probe, not by a last stage."""
    for name, make in NAMED.items():
        sde, times = make(), []

        def score(x, t, sde=sde, times=times):
            times.append(t.clone())
            return gaussian_score(sde, 0.1)(x, t)

        ode_sample(sde, score, (5, 2), method=method, seed=0, dtype=torch.float64, denoise=False)
        seen = torch.cat(times)
        assert float(seen.min()) >= sde.t_min, name
        assert float(seen.max()) <= sde.T, name
        assert float(seen.min()) == pytest.approx(sde.t_min)


@every_method
def test_a_sample_is_the_same_alone_and_in_any_batch(method):
    """PITFALL 12: its error, its steps, its finish; hard and easy samples side by side."""
    for make in NAMED.values():
        sde = make()
        system = sde.probability_flow(gaussian_score(sde, 0.05))
        size = torch.logspace(-3, 1, 13, dtype=torch.float64).reshape(13, 1, 1)  # an odd number: no vector of 4 fits
        x = sde.prior_sample((13, 3, 5), seed=0, dtype=torch.float64) * size
        grid = torch.tensor([sde.T, sde.t_min])
        whole = solve(system, x, grid, method, keep=4, rtol=1e-3, atol=1e-3)
        for rows in ([0], [7], [12], [5, 2]):
            part = solve(system, x[rows], grid, method, keep=4, rtol=1e-3, atol=1e-3)
            assert torch.equal(part.x, whole.x[rows])
            assert torch.equal(part.accepted, whole.accepted[rows])
            assert torch.equal(part.nfe_per_sample, whole.nfe_per_sample[rows])
            assert torch.equal(part.trajectory.x, whole.trajectory.x[:, rows])
        assert len(set(whole.nfe_per_sample.tolist())) > 1


@pytest.mark.parametrize(
    ("method", "start", "each"), [("rk45", 2, 6), ("rk23", 2, 3), ("flow_rk45", 2, 6), ("adams", 1, 1)]
)
def test_counts_are_consistent(method, start, each):
    """Evaluations: those of the start and of every attempt; finished samples leave the batch the network sees."""
    sde, sizes = NAMED["VP"](), []

    def score(x, t):
        sizes.append(len(x))
        return gaussian_score(sde, 0.05)(x, t)

    x = sde.prior_sample((4, 3), seed=0) * torch.tensor([1e-3, 1.0, 1.0, 30.0]).unsqueeze(1)
    out = solve(sde.probability_flow(score), x, [1.0, 1e-5], method)
    assert out.nfe == len(sizes)
    assert torch.equal(out.nfe_per_sample, start + each * (out.accepted + out.rejected))
    assert int(out.nfe_per_sample.max()) == out.nfe
    assert int(out.nfe_per_sample.sum()) == sum(sizes)
    assert sizes[-1] < 4
    assert out.success
    assert out.hint == ""
    assert out.t.tolist() == [1e-5] * 4


def test_the_trajectory_hits_its_times_exactly():
    times = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    out = adaptive(RungeKutta(harmonic, 1e-9, 1e-9), y, times, keep=True)
    c, s = torch.cos(times), torch.sin(times)
    exact = torch.stack([torch.stack([c, -s], 1), torch.stack([2 * s, 2 * c], 1)], 1)
    torch.testing.assert_close(out.trajectory.x, exact, rtol=0, atol=1e-7)
    assert torch.equal(out.trajectory.x[-1], out.x)


def test_limits_give_a_status_a_partial_result_and_a_hint():
    """PITFALL 16."""
    sde = NAMED["VP"]()
    system = sde.probability_flow(gaussian_score(sde, 0.01))
    x = sde.prior_sample((3, 2), seed=0, dtype=torch.float64) * torch.tensor([[1e-6], [1.0], [1.0]])
    out = solve(system, x, torch.tensor([1.0, 1e-5]), "rk45", rtol=1e-9, atol=1e-9, max_nfe=40)
    assert out.nfe <= 40
    assert out.status.count("max_nfe") >= 2
    assert out.hint.endswith("before the end; raise rtol and atol (max_nfe = 40)")
    assert torch.isfinite(out.x).all()
    assert ((out.t < 1) & (out.t > 1e-5))[1:].all()
    assert not out.success
    out = solve(system, x, torch.tensor([1.0, 1e-5]), "rk45", rtol=1e-9, atol=1e-9, max_nfe=40, keep=9)
    reached = out.trajectory.t.unsqueeze(1) >= out.t
    assert torch.equal(torch.isfinite(out.trajectory.x).all(2), reached)  # and NaN, not garbage, beyond


def test_a_system_that_returns_nan_stops():
    class Broken(System):
        churn = 0.0

        def drift(self, x, t):
            return x * math.nan

        def diffusion(self, t):
            return 0.0

    out = solve(Broken(), torch.ones(2), [0.0, 1.0], "rk45")
    assert out.status == ["step_underflow"] * 2
    assert out.nfe < 1000


def test_underflow_is_a_status_not_an_assert():
    """PITFALL 16: a solution that blows up inside the interval stops its own sample, and only that."""

    class BlowUp(System):
        churn = 0.0

        def drift(self, x, t):
            return x**2

        def diffusion(self, t):
            return 0.0

    x = torch.tensor([[2.0], [0.5]], dtype=torch.float64)  # x = x_0/(1 - x_0 t)
    out = solve(BlowUp(), x, [0.0, 1.0], "rk45")
    assert out.status == ["step_underflow", "success"]
    assert float(out.t[0]) == pytest.approx(0.5, abs=1e-3)
    assert float(out.x[1]) == pytest.approx(1.0, rel=1e-4)
    assert "1 of 2 samples stopped: the step fell below" in out.hint


def test_ode_sample_raises_with_the_partial_solution():
    """dx/dt = -x^2: the first sample is infinite at T - t = 1/x_T = 25."""
    x_T = torch.tensor([0.04, 0.001, -0.01], dtype=torch.float64)
    with pytest.raises(SolverError, match="1 of 3 samples stopped: the step fell below") as info:
        ode_sample(HeatODE(), lambda x, t: x**2 / t, (3,), x_T=x_T, method="rk45")
    solution = info.value.solution
    assert solution.status == ["step_underflow", "success", "success"]
    assert float(solution.t[0]) == pytest.approx(55, abs=1e-2)


@pytest.mark.parametrize(
    ("method", "tol", "near"),
    [("rk45", 1e-10, 1e-7), ("flow_rk45", 1e-9, 1e-7), ("flow_rk23", 1e-6, 1e-5), ("adams", 1e-6, 1e-5)],
)
def test_flow_of_a_gaussian_is_exact(sde, method, tol, near):
    """The flow scales N(0, a_T^2 v + s_T^2) to N(0, a^2 v + s^2): a closed form for every process."""
    score, std = gaussian_score(sde, 0.3), 0.3
    x = sde.prior_sample((4, 2), seed=0, dtype=torch.float64)

    def spread(t):
        return float((sde.alpha(t) ** 2 * std**2 + sde.sigma(t) ** 2).sqrt())

    out = ode_sample(sde, score, x.shape, method=method, x_T=x, rtol=tol, atol=tol / 100, denoise=False)
    torch.testing.assert_close(out, x * spread(sde.t_min) / spread(sde.T), rtol=near, atol=near / 1000)
    out, mean = (ode_sample(sde, score, x.shape, method=method, x_T=x, denoise=end) for end in (False, True))
    torch.testing.assert_close(mean, sde.denoise(out, sde.t_min, score), rtol=near, atol=near / 1000)


def test_adams_error_is_proportional_to_the_tolerance_and_cheap(digits64):
    """Five decades within a factor of ten, and at most half of the evaluations that dpm_adaptive of k-diffusion takes.

    Theirs on this problem, mean over samples: .0106 at 39, .0023 at 54, 1.1e-4 at 93, the final denoising counted.
    """
    g, mixture = digits64
    sde, n = HeatODE(), 48
    x = 80 * torch.randn(n, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1234))
    ref, end = g.flow(x.numpy(), 80.0, 0.0), g.flow(x.numpy(), 80.0, 0.002)
    system = sde.probability_flow(mixture.score(sde))
    for tol, most, error in ((1e-2, 19.5, 0.0106), (2e-3, 27, 0.0023), (1e-4, 46.5, 1.1e-4)):
        out = solve(system, x, [sde.T, sde.t_min], "adams", rtol=tol, atol=tol, denoise=True)
        assert out.success
        assert float(out.nfe_per_sample.double().mean()) <= most, tol
        assert oracle.error(out.x.numpy(), ref) <= error, tol
    ratios = []
    for tol in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        out = solve(system, x, [sde.T, sde.t_min], "adams", rtol=tol, atol=tol)
        ratios.append(oracle.error(out.x.numpy(), end) / tol)
    assert max(ratios) / min(ratios) < 10, ratios
    assert max(ratios) < 3


@pytest.mark.parametrize(("method", "most"), [("flow_rk23", 17), ("flow_rk45", 28)])
def test_in_the_flow_frame_error_is_proportional_to_the_tolerance_and_cheap(digits64, method, most):
    """Five decades within a factor of ten; at 1e-2 under a third of what the pair takes in t (88, 90)."""
    g, mixture = digits64
    sde = HeatODE()
    x = 80 * torch.randn(32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1234))
    ref, system, ratios = g.flow(x.numpy(), 80.0, 0.002), sde.probability_flow(mixture.score(sde)), []
    for tol in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        out = solve(system, x, [sde.T, sde.t_min], method, rtol=tol, atol=tol)
        ratios.append(oracle.error(out.x.numpy(), ref) / tol)
        if tol == 1e-2:
            assert float(out.nfe_per_sample.double().mean()) <= most
    assert max(ratios) / min(ratios) < 10, ratios
    assert max(ratios) < 10


@pytest.mark.parametrize("method", ["flow_rk23", "flow_rk45", "adams"])
def test_flow_methods_stand_next_to_no_signal(method):
    """alpha(T) = 1e-11, where 1 - u has five digits left; data N(0, 1) stay where they are."""
    sde = VPSDE(beta_max=100.0)
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    out = solve(sde.probability_flow(gaussian_score(sde)), x, [sde.T, sde.t_min], method, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.x, x, rtol=0, atol=3e-4)


@pytest.mark.parametrize("method", ["adams", "flow_rk23"])
def test_flow_methods_run_run_both_ways_and_need_a_score(sde, method):
    """Encoding is the same flow forwards; there and back again within a few tolerances."""
    system = sde.probability_flow(gaussian_score(sde, 0.5))
    x = torch.tensor([[0.3, -0.6], [1.0, 0.2]], dtype=torch.float64)
    there = solve(system, x, [sde.t_min, sde.T], method, rtol=1e-6, atol=1e-6)
    back = solve(system, there.x, [sde.T, sde.t_min], method, rtol=1e-6, atol=1e-6)
    assert there.t.tolist() == pytest.approx([sde.T] * 2)
    assert back.t.tolist() == pytest.approx([sde.t_min] * 2)
    assert float((back.x - x).abs().max()) < 1e-4
    with pytest.raises(TypeError, match="needs a score"):
        solve(Decay(), x, [0.0, 1.0], method)
    with pytest.raises(ValueError, match="integrates ODEs"):
        solve(sde.reverse(gaussian_score(sde)), x, [sde.T, sde.t_min], method)


class Decay(System):
    churn = 0.0

    def drift(self, x, t):
        return -x

    def diffusion(self, t):
        return 0.0


def test_adams_limits_and_broken_scores_are_told():
    sde = NAMED["VP"]()
    x = sde.prior_sample((3, 2), seed=0, dtype=torch.float64)
    out = solve(
        sde.probability_flow(gaussian_score(sde, 0.01)), x, [1.0, 1e-3], "adams", rtol=1e-9, atol=1e-9, max_nfe=20
    )
    assert out.status == ["max_nfe"] * 3
    assert out.nfe <= 20
    assert torch.isfinite(out.x).all()
    with pytest.raises(FloatingPointError, match="score returned NaN or infinite values at t = "):
        solve(sde.probability_flow(lambda x, t: x * math.nan), x, [1.0, 1e-3], "adams")


def test_adams_weights_are_exact_on_a_parabola():
    """Slope a parabola in u: once three are behind, predictor and corrector agree and steps of any size are exact."""
    c = torch.tensor([0.7, -2.0, 1.5], dtype=torch.float64)

    def slope(y, u, run):
        return sum(a * u**i for i, a in enumerate(c)).reshape(-1, 1)

    def solution(u):
        return sum(a / (i + 1) * u ** (i + 1) for i, a in enumerate(c)).reshape(-1, 1)

    method, run = Adams(slope, 1e-3, 1e-3), torch.tensor([0])
    u = torch.tensor([0.9, 0.85, 0.7, 0.4, 0.38, 0.1], dtype=torch.float64)
    state, _, _ = method.start(solution(u[:1]), u[:1], u[[0, -1]], run)
    for i in range(2):  # from the exact solution, whatever the first steps do
        _, size, power, state = method.attempt(solution(u[i : i + 1]), u[i : i + 1], u[i + 1 : i + 2], state, run)
        assert float(power) == i + 2
        assert float(size) > 1e-5
    y = solution(u[2:3])
    for i in range(2, 5):
        y, size, power, state = method.attempt(y, u[i : i + 1], u[i + 1 : i + 2], state, run)
        assert float(power) == 4
        assert float(size) < 1e-10
        torch.testing.assert_close(y, solution(u[i + 1 : i + 2]), rtol=0, atol=1e-13)


def test_adams_estimate_of_one_order_less_leaves_out_the_oldest_slope():
    """lower() is exact on one degree less than corrected, whatever the number of slopes that there are."""
    for degree in (1, 2):

        def slope(y, u, run, degree=degree):
            return (u**degree).reshape(-1, 1)

        seen = []

        class Watched(Adams):
            def judge(self, y, predicted, corrected, lower, seen=seen):
                seen.append((float(corrected), float(lower())))
                return super().judge(y, predicted, corrected, lower)

        method, run = Watched(slope, 1e-3, 1e-3), torch.tensor([0])
        u = 0.3 + 0.1 * torch.arange(8, dtype=torch.float64)
        state, _, _ = method.start(torch.zeros(1, 1).double(), u[:1], u[[0, -1]], run)
        for i in range(7):
            exact = (u ** (degree + 1) / (degree + 1)).diff()[i]
            _, _, _, state = method.attempt(torch.zeros(1, 1).double(), u[i : i + 1], u[i + 1 : i + 2], state, run)
            corrected, lower = (abs(a - float(exact)) for a in seen[-1])
            assert (corrected < 1e-14) == (i + 1 >= degree)
            assert (lower < 1e-14) == (i >= degree)


@every_method
def test_a_float32_grid_may_lie_a_rounding_beyond_the_ends(method, sde):
    system = sde.probability_flow(gaussian_score(sde, 0.5))
    out = solve(
        system, sde.prior_sample((2, 2), seed=0), torch.tensor([sde.T, sde.t_min]), method, rtol=1e-2, atol=1e-2
    )
    assert out.success


@every_method
def test_gradients_pass_through_the_states_not_the_steps(method):
    """A sample whose error is 0, and whose steps are long, has a finite gradient; the other has the flow's own."""
    sde = NAMED["VP"]()
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    out = solve(
        sde.probability_flow(gaussian_score(sde, 0.5)),
        x,
        [1.0, 1e-3],
        method,
        rtol=1e-5,
        atol=1e-5,
        differentiable=True,
    )
    (slope,) = torch.autograd.grad(out.x.sum(), x)
    assert not out.t.requires_grad

    def spread(t):
        return float((sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2).sqrt())

    torch.testing.assert_close(slope[0], torch.full_like(x[0], spread(1e-3) / spread(1.0)), rtol=1e-3, atol=0)
    assert torch.isfinite(slope[1]).all()


def test_the_limit_knows_what_an_evaluation_may_cost():
    """Guided within an interval of levels an attempt costs twice what the one before it did."""
    sde = NAMED["VP"]()
    score = as_score(lambda x, t, m: x - m[:, None], sde, "eps")
    guided = guidance.classifier_free(score, torch.ones(3), torch.zeros(3), 2.0, interval=(0.1, 1.0), together=False)
    x = sde.prior_sample((3, 2), seed=0, dtype=torch.float64)
    for limit in range(40, 90, 6):
        for method in ("rk45", "adams"):
            out = solve(sde.probability_flow(guided), x, [1.0, 1e-3], method, rtol=1e-6, atol=1e-6, max_nfe=limit)
            assert out.nfe <= limit


def test_the_limit_counts_the_denoising():
    sde = NAMED["VP"]()
    x = sde.prior_sample((3, 2), seed=0, dtype=torch.float64)
    for limit in range(30, 45):
        for method in ("rk45", "adams"):
            system = sde.probability_flow(gaussian_score(sde, 0.05))
            assert solve(system, x, [1.0, 1e-3], method, max_nfe=limit, denoise=True).nfe <= limit


def test_a_tolerance_below_the_dtype_is_said_before_the_first_step():
    sde = VPSDE()
    calls = []

    def score(x, t):
        calls.append(t)
        return -x

    x = torch.zeros(2, 3)
    for method in ("adams", "rk45"):
        with pytest.raises(ValueError, match=r"rtol = 1e-09 and atol = 1e-09 .*float32 resolves, 2e-07.*float64"):
            solve(sde.probability_flow(score), x, [sde.T, sde.t_min], method, rtol=1e-9, atol=1e-9)
    assert not calls
    assert solve(sde.probability_flow(score), x.double(), [sde.T, sde.t_min], "adams", rtol=1e-9, atol=1e-9).success
