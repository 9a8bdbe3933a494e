"""torchdiffeq, torchsde and SciPy behind the same call."""

import pytest
import torch

from sdekit import VPSDE, BridgeSDE, Noise, System, as_score, ode_sample, sample, solve
from sdekit.sampling.grids import make_grid
from sdekit.solvers.backends import ADAPTIVE, METHODS
from tests.conftest import gaussian_score


def test_adaptive_backends_agree_with_the_closed_form(sde):
    """The flow of a Gaussian is a scaling; any event shape, decreasing time, evaluations inside and counted."""
    score, times = gaussian_score(sde, 0.3), []

    def watched(x, t):
        times.append(float(t))
        return score(x, t)

    x = sde.prior_sample((2, 3, 2), seed=0, dtype=torch.float64)

    def spread(t):
        return float((sde.alpha(t) ** 2 * 0.09 + sde.sigma(t) ** 2).sqrt())

    for method in ("torchdiffeq:dopri5", "scipy:RK45", "scipy:DOP853"):
        times.clear()
        out = solve(sde.probability_flow(watched), x, [sde.T, sde.t_min], method, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(out.x, x * spread(sde.t_min) / spread(sde.T), rtol=1e-5, atol=1e-7)
        assert out.nfe == len(times) > 0
        assert sde.t_min <= min(times)
        assert max(times) <= sde.T
        assert out.success
        assert out.accepted is None
        y = ode_sample(sde, score, x.shape, method=method, x_T=x, rtol=1e-8, atol=1e-10, denoise=False)
        assert torch.equal(y, out.x)


def test_fixed_step_backends_are_our_rules(sde):
    """torchdiffeq's euler and torchsde's, on our grid and our noise, take our steps."""
    x = sde.prior_sample((3, 2, 2), seed=0, dtype=torch.float64)
    grid = make_grid(sde, "karras", 20)
    flow, reverse = sde.probability_flow(gaussian_score(sde)), sde.reverse(gaussian_score(sde))
    ours = solve(flow, x, grid, "euler_maruyama")
    theirs = solve(flow, x, grid, "torchdiffeq:euler")
    torch.testing.assert_close(theirs.x, ours.x, rtol=1e-6, atol=1e-8)
    assert theirs.nfe == ours.nfe == 20
    ours = solve(reverse, x, grid, "euler_maruyama", noise=Noise(x, 5))
    theirs = solve(reverse, x, grid, "torchsde:euler", noise=Noise(x, 5))
    torch.testing.assert_close(theirs.x, ours.x, rtol=1e-11, atol=1e-12)  # a coefficient in float32 would show
    forward = solve(sde, x, grid.flip(0), "euler_maruyama", noise=Noise(x, 5)).x
    torch.testing.assert_close(solve(sde, x, grid.flip(0), "torchsde:euler", noise=Noise(x, 5)).x, forward,
                               rtol=1e-11, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("method", ["torchsde:euler", "torchdiffeq:euler"])
def test_fixed_step_backends_keep_the_states_of_our_rules(method, shifted):
    """At the same times of the grid, on the same noise; of a process with a mean of its own, where that is again."""
    sde = BridgeSDE(torch.tensor([2.0, -1.0])) if shifted else VPSDE()
    x, grid = sde.prior_sample((3, 2), seed=0, dtype=torch.float64), make_grid(sde, "karras", 20)
    score = as_score(lambda x, t: -0.3 * x, sde, predicts="v")
    system = sde.reverse(score) if method == "torchsde:euler" else sde.probability_flow(score)
    ours = solve(system, x, grid, "euler_maruyama", noise=Noise(x, 5), keep=7)
    theirs = solve(system, x, grid, method, noise=Noise(x, 5), keep=7)
    assert torch.equal(theirs.trajectory.t, ours.trajectory.t)
    torch.testing.assert_close(theirs.trajectory.x, ours.trajectory.x, rtol=1e-11, atol=1e-12)
    assert torch.equal(theirs.trajectory.x[0], ours.trajectory.x[0])
    assert torch.equal(theirs.trajectory.x[-1], theirs.x)
    assert torch.equal(theirs.x, solve(system, x, grid, method, noise=Noise(x, 5)).x)
    assert solve(system, x, grid, method).trajectory is None
    assert len(solve(system, x, grid, method, keep=21, denoise=True).trajectory.t) == 21


def test_general_noise_keeps_its_path():
    """dx = B dW, by its own sum of increments."""

    class Matrix(System):
        churn, noise_type, B = 1.0, "general", torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0]])

        def drift(self, x, t):
            return torch.zeros_like(x)

        def diffusion(self, x, t):
            return self.B.expand(len(x), 2, 3)

    x, grid = torch.zeros(4, 2), torch.linspace(0, 1, 5, dtype=torch.float64)
    noise, like = Noise(x.new_empty(4, 3), 0), Noise(x.new_empty(4, 3), 0)
    found = solve(Matrix(), x, grid, "torchsde:heun", noise=noise, keep=3).trajectory
    expected = [x]
    for t, s in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        like.enter(t, s)
        expected.append(expected[-1] + like.increment(t, s) @ Matrix.B.mT)
    assert found.t.tolist() == [0, 0.5, 1]
    torch.testing.assert_close(found.x, torch.stack(expected[::2]))


@pytest.mark.parametrize("method", [m for m in METHODS if not m.startswith("torchsde:")])
def test_backends_of_odes_keep_states_that_are_right(method):
    """x0 exp(-t): at times of the grid, or evenly between its ends."""

    class Decay(System):
        churn = 0.0

        def drift(self, x, t):
            return -x

    x, grid = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64), [0.1 * k * k for k in range(5)]
    chosen = method in ADAPTIVE
    fine = grid if chosen else torch.linspace(0, 1.6, 1601, dtype=torch.float64)
    tolerance = {"rtol": 1e-8, "atol": 1e-8} if chosen else {}
    plain = solve(Decay(), x, fine, method, **tolerance)
    out = solve(Decay(), x, fine, method, keep=9, **tolerance)
    t = out.trajectory.t
    torch.testing.assert_close(t, torch.linspace(0, 1.6, 9, dtype=torch.float64))
    expected = x * (-t[:, None, None]).exp()
    torch.testing.assert_close(out.trajectory.x, expected, rtol=0, atol=2e-3 if method.endswith(":euler") else 3e-6)
    assert torch.equal(out.trajectory.x[0], x)
    assert torch.equal(out.trajectory.x[-1], out.x)
    torch.testing.assert_close(out.x, plain.x, rtol=0, atol=2e-6)
    if not (chosen and method.startswith("torchdiffeq")):  # which steps onto those times
        assert torch.equal(out.x, plain.x)


@pytest.mark.parametrize("method", ["torchdiffeq:dopri5", "torchdiffeq:rk4", "torchsde:euler"])
def test_kept_states_have_their_gradients(method):
    """d x(t)/d x(0) = exp(-t) at each kept time."""

    class Decay(System):
        churn, noise_type = 0.0, "additive"

        def drift(self, x, t):
            return -x

        def diffusion(self, x, t):
            return 0.0

    x = torch.ones(1, 1, dtype=torch.float64, requires_grad=True)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    path = solve(Decay(), x, grid, method, keep=3, differentiable=True).trajectory
    for k in range(3):
        (slope,) = torch.autograd.grad(path.x[k].sum(), x, retain_graph=True)
        torch.testing.assert_close(float(slope), float((-path.t[k]).exp()), rtol=1e-3, atol=0)


def test_a_backend_that_gives_up_is_a_status():
    system = VPSDE().probability_flow(lambda x, t: x**3 * 1e3)
    out = solve(system, torch.ones(2, dtype=torch.float64), [1.0, 1e-5], "torchdiffeq:dopri5")
    assert out.status == ["failed", "failed"]
    assert torch.isnan(out.x).all()
    assert "gave up" in out.hint
    assert "underflow in dt" in out.hint
    kept = solve(system, torch.ones(2, dtype=torch.float64), [1.0, 1e-5], "torchdiffeq:dopri5", keep=4).trajectory
    assert torch.equal(kept.x[0], torch.ones(2, dtype=torch.float64))
    assert torch.isnan(kept.x[1:]).all()

    def asserts(x, t):
        raise AssertionError("a user's own")

    with pytest.raises(RuntimeError, match="the score failed: a user's own"):
        solve(VPSDE().probability_flow(asserts), torch.ones(2), [1.0, 0.5], "torchdiffeq:dopri5")
    with pytest.raises(ZeroDivisionError):  # the score's own failure is not the back-end's
        solve(VPSDE().probability_flow(lambda x, t: 1 / 0), torch.ones(2), [1.0, 0.5], "torchdiffeq:dopri5")


def test_bad_use_is_named():
    sde, x = VPSDE(), torch.ones(2)
    system = sde.reverse(gaussian_score(sde))
    for method in ("torchdiffeq:dopri5", "scipy:RK45"):
        with pytest.raises(ValueError, match=f"{method.split(':')[0]} integrates ODEs"):
            solve(system, x, [1.0, 0.5], method)
    for method in ("torchdiffeq:rk4", "torchdiffeq:euler", "torchsde:euler"):  # one step from T to t_min
        with pytest.raises(ValueError, match=f"unknown adaptive method '{method}'"):
            ode_sample(sde, gaussian_score(sde), (2,), method=method)
    with pytest.raises(ValueError, match="callback, max_nfe and progress are not known to torchsde:euler"):
        solve(system, x, [1.0, 0.5], "torchsde:euler", max_nfe=30)
    with pytest.raises(ValueError, match="keep must be at most 2, the times of the grid, got 3"):
        solve(system, x, [1.0, 0.5], "torchsde:euler", keep=3)
    with pytest.raises(ValueError, match="unknown sampler 'rk45'.*ode_sample"):
        sample(sde, gaussian_score(sde), (2,), "rk45")
    with pytest.raises(ValueError, match="unknown method 'torchdiffeq:dopri6': did you mean"):
        solve(sde.probability_flow(gaussian_score(sde)), x, [1.0, 0.5], "torchdiffeq:dopri6")


@pytest.mark.parametrize("after", [2.0, 0.5])
@pytest.mark.parametrize("method", ["RK45", "DOP853", "LSODA", "Radau", "BDF"])
def test_a_drift_that_is_not_finite_is_a_status(method, after):
    """From the start and on the way: SciPy's RK45 never returned, and its LSODA called NaN a success."""

    class Broken(System):
        churn = 0.0

        def drift(self, x, t):
            return torch.full_like(x, torch.nan) if t < after else -x

    out = solve(Broken(), torch.ones(2, 3), [1.0, 0.0], f"scipy:{method}")
    assert out.status == ["failed"] * 2
    assert "drift is not finite" in out.reason
    kept = solve(Broken(), torch.ones(2, 3), [1.0, 0.0], f"scipy:{method}", keep=3).trajectory
    assert torch.equal(kept.x[0], torch.ones(2, 3))
    assert torch.isnan(kept.x[1:]).all()


class Cubed(System):
    """dx = 5 x^3 dt, which leaves for infinity."""

    churn = 0.0

    def drift(self, x, t):
        return 5 * x**3


@pytest.mark.parametrize("method", ["torchdiffeq:rk4", "torchdiffeq:euler", "torchsde:euler", "torchsde:heun"])
def test_a_state_that_overflows_is_said(method):
    """As by the project's own rules, with steps that the grid chose."""
    for own in (method, "euler_maruyama"):
        with pytest.raises(FloatingPointError, match="overflowed between t = 0 and 1; take more steps"):
            solve(Cubed(), torch.full((2, 1), 3.0), torch.linspace(0, 1, 11), own)


@pytest.mark.parametrize(("method", "calls"), [("euler", 10), ("milstein", 10), ("euler_heun", 10), ("heun", 20)])
def test_torchsde_evaluates_as_often_as_its_method_needs(method, calls):
    """It looks at the first drift of every call to see its shape; that one serves its step too."""
    sde = VPSDE()
    system = sde.reverse(as_score(lambda x, t: 0.5 * x, sde, "eps"))
    assert solve(system, torch.ones(3, 2), torch.linspace(1, 0.5, 11), f"torchsde:{method}").nfe == calls


def test_scipy_has_no_gradients():
    sde = VPSDE()
    for way in (True, "checkpoint"):
        with pytest.raises(ValueError, match="scipy:RK45 has no gradients, which differentiable asks for"):
            solve(sde.probability_flow(lambda x, t: -x), torch.ones(3, 2), [1.0, 0.5], "scipy:RK45", differentiable=way)
