"""The fixed-grid loop, driven by stub rules, and the composition of rules."""

from functools import partial

import pytest
import torch

from sdekit import SAMPLERS, VPSDE, HeatODE, Noise, Reverse, Sampler, System, pc_sample, sample, solve, step_rule
from sdekit.solvers.steppers import RULES, chain, ddim, edm, repeat, restart, stay
from tests.conftest import gaussian_score


@step_rule(evaluations=0)
def clock(system, x, t, s, noise, state):
    """x counts time: every step adds its own length."""
    return x + (s - t), (state or 0) + 1


class Nothing(System):
    """A system that no stub looks at."""


@pytest.mark.parametrize("n", [1, 2, 3, 10, 333])
def test_steps_add_up_to_the_interval(sde, n):
    """PITFALLS 5, 9: whatever the rule, it is shown exactly the grid's intervals, once each and in order."""
    from sdekit.sampling.grids import make_grid

    grid = make_grid(sde, sde.grid or "uniform", n)
    seen = []

    @step_rule(evaluations=0)
    def spy(system, x, t, s, noise, state):
        seen.append((t, s))
        return clock(system, x, t, s, noise, state)

    out = solve(Nothing(), torch.zeros(2, dtype=torch.float64), grid, spy)
    assert [t for t, _ in seen] + [seen[-1][1]] == grid.tolist()
    assert float(out.x[0]) == pytest.approx(sde.t_min - sde.T, rel=1e-12)
    assert out.t.tolist() == [sde.t_min] * 2
    assert out.status == ["success"] * 2
    assert out.accepted.tolist() == [n, n]
    assert out.rejected.tolist() == [0, 0]


def test_both_directions_of_time():
    """PITFALL 14."""
    up, down = torch.linspace(0.1, 0.9, 5), torch.linspace(0.9, 0.1, 5)
    x = torch.zeros(1, dtype=torch.float64)
    assert float(solve(Nothing(), x, up, clock).x) == pytest.approx(0.8)
    assert float(solve(Nothing(), x, down, clock).x) == pytest.approx(-0.8)
    with pytest.raises(ValueError, match="all increasing or all decreasing"):
        solve(Nothing(), x, torch.tensor([0.1, 0.5, 0.3]), clock)
    with pytest.raises(ValueError, match="reverse SDE .* only holds backwards"):
        solve(VPSDE().reverse(lambda x, t: x), x, up, clock)


def test_state_and_chains_and_repeats():
    """Each rule of a chain keeps its own state; the first sees None at first."""
    log = []

    def rule(name):
        @step_rule(evaluations=2)
        def step(system, x, t, s, noise, state):
            log.append((name, state))
            return x, (state or 0) + 1

        return step

    both = chain(repeat(rule("a"), 2), rule("b"))
    assert both.evaluations == 6
    solve(Nothing(), torch.zeros(1), torch.linspace(1, 0, 3), both)
    assert log == [("a", None), ("a", 1), ("b", None), ("a", 2), ("a", 3), ("b", 1)]
    assert float(solve(Nothing(), torch.ones(1), torch.linspace(1, 0, 3), stay).x) == 1.0
    with pytest.raises(ValueError, match="times must be at least 1"):
        repeat(stay, 0)


def test_a_plain_function_is_a_rule():
    """A user's Euler in one line, on a user's system with only drift and diffusion."""

    class Decay(System):
        def drift(self, x, t):
            return -x

        def diffusion(self, t):
            return 0.0

    def euler(system, x, t, s, noise, state):
        return x + (s - t) * system.drift(x, t), state

    x = torch.ones(3, 2, dtype=torch.float64)
    out = solve(Decay(), x, torch.linspace(0, 1, 10_001), euler)
    torch.testing.assert_close(out.x, x * torch.exp(torch.tensor(-1.0)).double(), rtol=1e-4, atol=0)


def test_nfe_is_counted_at_the_network():
    """PITFALL 21: the count is the network's own."""
    sde, calls = HeatODE(), []

    def score(x, t):
        calls.append(float(t))
        return gaussian_score(sde)(x, t)

    for rule, per_step in (("euler_maruyama", 1), ("heun", 2), ("rk4", 4), ("ddim", 1), ("dpmpp_2m", 1)):
        calls.clear()
        out = solve(sde.probability_flow(score), torch.ones(2, 3), torch.linspace(80, 1, 8), rule)
        assert out.nfe == len(calls) == 7 * per_step
        assert out.nfe_per_sample.tolist() == [out.nfe] * 2
        assert min(calls) >= 1
        assert max(calls) <= 80


def test_trajectory_and_callback():
    sde = HeatODE()
    system = sde.probability_flow(gaussian_score(sde))
    seen = []
    x = torch.ones(2, 3)
    out = solve(system, x, torch.linspace(80, 1, 101), "euler_maruyama", keep=5,
                callback=lambda k, t, x: seen.append((k, t, x.clone())))  # fmt: skip
    assert [k for k, _, _ in seen] == list(range(1, 101))
    assert seen[-1][1] == 1.0
    assert torch.equal(seen[-1][2], out.x)
    assert out.trajectory.x.shape == (5, 2, 3)
    torch.testing.assert_close(
        out.trajectory.t, torch.tensor([80.0, 60.25, 40.5, 20.75, 1.0]).double(), check_dtype=False
    )
    assert torch.equal(out.trajectory.x[0], x)
    assert torch.equal(out.trajectory.x[2], seen[49][2])
    assert torch.equal(out.trajectory.x[-1], out.x)
    assert solve(system, x, torch.linspace(80, 1, 3), "ddim").trajectory is None


def test_an_interval_may_lie_anywhere():
    class Early(Nothing):
        interval = (-2.0, -1.0)

    x = torch.zeros(1, dtype=torch.float64)
    assert float(solve(Early(), x, [-2.0, -1.5, -1.0], clock).x) == 1.0
    with pytest.raises(ValueError, match=r"grid must lie in \[-2, -1\] for Early"):
        solve(Early(), x, [-2.0, -0.5], clock)


def test_a_rule_that_needs_a_score_says_so():
    for rule in ("ddim", "dpmpp_2m", "reverse_diffusion", "ancestral"):
        with pytest.raises(TypeError, match=r"needs a score: give it sde.reverse\(score\), not VPSDE"):
            solve(VPSDE(), torch.ones(2), [0.1, 0.2], rule)


def test_overflow_is_an_error():
    class Blow(System):
        def drift(self, x, t):
            return x * 1e30

        def diffusion(self, t):
            return 0.0

    with pytest.raises(FloatingPointError, match="the state overflowed between t = 0 and 1; take more steps"):
        solve(Blow(), torch.ones(2), torch.linspace(0, 1, 5), "euler_maruyama")


def test_every_rule_runs_in_every_mode(sde):
    """PITFALL 10: ODE mode, where diffusion is the float 0, and every churn, in float32 and float64."""
    from sdekit.sampling.grids import make_grid
    from sdekit.solvers.steppers import RULES

    for name in RULES:
        for churn in (0.0, 0.5, 1.0):
            for dtype in (torch.float32, torch.float64):
                if RULES[name].churn not in (None, churn) and churn:
                    continue
                x = sde.prior_sample((3, 2), seed=0, dtype=dtype)
                out = solve(sde.reverse(gaussian_score(sde), churn), x, make_grid(sde, "karras", 12), name)
                assert out.x.dtype == dtype
                assert out.x.shape == x.shape


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"x": torch.ones(2, dtype=torch.int64)}, "x must be a floating tensor, got torch.int64"),
        ({"x": torch.tensor(1.0)}, r"x must have shape \(B, \*event\)"),
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": torch.tensor([1.0, float("nan")])}, "x holds 1 non-finite values"),
        ({"method": "heum"}, "did you mean 'heun'"),
        ({"method": 3}, "a step rule must be a callable"),
        ({"method": "torchdifeq:dopri5"}, "unknown method 'torchdifeq:dopri5': did you mean 'torchdiffeq:dopri5'"),
        ({"method": "rk45", "rtol": -1e-3}, "rtol must be a finite number > 0"),
        ({"method": "rk45", "atol": 0.0}, "atol must be a finite number > 0"),
        ({"method": "rk45", "max_nfe": 3}, "max_nfe must be at least 8"),
        ({"method": "heun", "max_nfe": 30}, "max_nfe limits an adaptive method"),
        ({"keep": 1}, "keep must be at least 2"),
        ({"keep": 3}, "keep must be at most 2, the times of the grid, got 3"),
        ({"grid": torch.tensor([1.0, 0.0])}, r"grid must lie in \[1e-05, 1\] for Reverse, got \[0, 1\]"),
        ({"grid": torch.tensor([1.0])}, "at least two times"),
    ],
)
def test_bad_input_is_named(kwargs, message):
    sde = VPSDE()
    arguments = {"x": torch.ones(2), "grid": torch.tensor([1.0, 0.5]), "method": "heun", **kwargs}
    with pytest.raises((ValueError, TypeError), match=message):
        solve(sde.probability_flow(gaussian_score(sde)), **arguments)
    with pytest.raises(ValueError, match="churn must be"):
        sde.reverse(gaussian_score(sde), churn=-1)
    with pytest.raises(ValueError, match="rk45 integrates ODEs"):
        solve(sde.reverse(gaussian_score(sde)), torch.ones(2), torch.tensor([1.0, 0.5]), "rk45")
    with pytest.raises(ValueError, match="method must be given where churn = 1 > 0: adaptive_sra1 or a step rule"):
        solve(sde.reverse(gaussian_score(sde)), torch.ones(2), torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("name", ["ddim", "ancestral", "edm"])
def test_churn_is_not_given_to_a_rule_that_ignores_it(name):
    """PITFALL 32: one knob, or an error that says which."""
    sde, x, grid = VPSDE(), torch.ones(2), [1.0, 0.5, 0.1]
    with pytest.raises(
        ValueError, match=r"has its own noise .*, and would ignore the system's churn = 0.5: .*churn = 0"
    ):
        solve(sde.reverse(gaussian_score(sde), 0.5), x, grid, name)
    with pytest.raises(ValueError, match="would ignore the system's churn = 0.5"):
        sample(sde, gaussian_score(sde), (2,), Sampler(RULES[name], churn=0.5), steps=3)
    assert solve(sde.probability_flow(gaussian_score(sde)), x, grid, name).success
    score = gaussian_score(sde)  # the reverse SDE's own noise is what an ancestral step has
    if name == "ancestral":
        one, other = (solve(sde.reverse(score, c), x, grid, name, noise=Noise(x, 0)).x for c in (0.0, 1.0))
        assert torch.equal(one, other)
    assert pc_sample(sde, score, (2,), predictor=name, steps=3, seed=0).shape == (2,)


def test_a_flow_is_solved_by_adams_and_another_ode_by_rk45():
    """TARGETS: rk45 took 161 evaluations where adams takes 15."""
    sde, x = VPSDE(), VPSDE().prior_sample((2, 2), seed=0)
    system = sde.probability_flow(gaussian_score(sde, 0.5))
    default, adams = (solve(system, x, [1.0, 1e-3], *method).x for method in ((), ("adams",)))
    assert torch.equal(default, adams)
    grid = [0.1, 0.2]
    assert torch.equal(solve(Drifting(), x, grid).x, solve(Drifting(), x, grid, "rk45").x)


class Drifting(System):
    churn = 0.0

    def drift(self, x, t):
        return -x


def test_a_callback_cannot_destroy_the_state():
    """PITFALL 38."""
    sde, x = VPSDE(), VPSDE().prior_sample((2, 2), seed=0)

    def wreck(step, t, x):
        x.mul_(float("nan"))

    for name, row in SAMPLERS.items():
        run = partial(sample, sde, gaussian_score(sde), x.shape, row, steps=10, seed=0, x_T=x)
        assert torch.equal(run(callback=wreck), run()), name
    run = partial(solve, sde.probability_flow(gaussian_score(sde)), x, [1.0, 0.1], "adams")
    assert torch.equal(run(callback=wreck).x, run().x)


def test_forward_mode_derivatives_pass_through_a_sampler():
    """d x_0 / d x_T by dual numbers, equal to a difference quotient."""
    sde = VPSDE()
    x = torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    v = torch.tensor([[1.0, 0.5]], dtype=torch.float64)
    for name in ("ddim", "dpmpp_2m", "heun", "dpm_solver_2"):

        def run(x_T, name=name):
            return solve(sde.probability_flow(lambda y, t: -torch.tanh(y)), x_T, [1.0, 0.5, 0.1], name).x

        _, slope = torch.func.jvp(run, (x,), (v,))
        torch.testing.assert_close(slope, (run(x + 1e-6 * v) - run(x - 1e-6 * v)) / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["euler_maruyama", "heun", "rk4", "milstein"])
def test_a_state_that_changes_its_dtype_is_named(name):
    """A user's drift in float64 would take a float32 state along."""

    class Double(System):
        churn = 0.0

        def drift(self, x, t):
            return -x.double()

    with pytest.raises(TypeError, match=r"drift must have x's dtype torch.float32, got torch.float64"):
        solve(Double(), torch.ones(2, 3), [0.0, 0.5, 1.0], name)


def test_a_system_and_a_noise_outlive_inference_mode():
    sde = VPSDE()
    x = torch.ones(2, 3)
    system, noise = sde.reverse(gaussian_score(sde)), Noise(x, 0)
    with torch.inference_mode():
        solve(system, x, [0.9, 0.5, 0.1], "euler_maruyama", noise=noise)
    assert solve(system, x, [0.9, 0.5, 0.1], "euler_maruyama", noise=noise).success


def test_one_system_serves_every_dtype_and_keeps_no_times():
    """The finite check follows the dtype: 1e39 is a number in float64. Times off the grid leave nothing behind."""
    sde = VPSDE()
    system = sde.probability_flow(lambda x, t: x)
    for x in (torch.ones(2), torch.full((2,), 1e39, dtype=torch.float64), torch.ones(2, dtype=torch.float16)):
        assert system.drift(x, 0.5).dtype == x.dtype
        system.settle()
    for k in range(50):
        system.drift(torch.ones(2), 0.1 + k / 100)
    assert not system._nodes


def test_churn_is_not_lost_in_a_composition():
    sde, x, grid = VPSDE(), torch.ones(2), [1.0, 0.5, 0.1, 0.01]
    for rule in (restart(ddim(1.0)), restart(edm(40.0)), chain(ddim(0.0), RULES["heun"]), repeat(ddim(0.0), 2)):
        with pytest.raises(ValueError, match="has its own noise .*, and would ignore the system's churn = 0.5"):
            solve(sde.reverse(gaussian_score(sde), 0.5), x, grid, rule)


def test_a_reverse_system_with_a_drift_of_its_own_is_integrated_as_it_is():
    class Still(Reverse):
        def drift(self, x, t):
            return torch.zeros_like(x)

    system, x = Still(VPSDE(), gaussian_score(VPSDE()), 0.0), torch.ones(2, 2)
    for method in (None, "rk45", "heun", "euler_maruyama"):
        assert torch.equal(solve(system, x, [1.0, 0.5], method).x, x)
    for method in ("adams", "flow_rk45"):
        with pytest.raises(TypeError, match="Still has a drift of its own, which .*adams.* does not know; use rk45"):
            solve(system, x, [1.0, 0.5], method)
