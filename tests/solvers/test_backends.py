"""torchdiffeq, torchsde and SciPy behind the same call."""

import pytest
import torch

from sdekit import Noise, System, ode_sample, sample, solve
from sdekit.sampling.grids import make_grid
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


def test_a_backend_that_gives_up_is_a_status():
    from sdekit import VPSDE

    system = VPSDE().probability_flow(lambda x, t: x**3 * 1e3)
    out = solve(system, torch.ones(2, dtype=torch.float64), [1.0, 1e-5], "torchdiffeq:dopri5")
    assert out.status == ["failed", "failed"]
    assert torch.isnan(out.x).all()
    assert "gave up" in out.hint
    assert "underflow in dt" in out.hint

    def asserts(x, t):
        raise AssertionError("a user's own")

    with pytest.raises(RuntimeError, match="the score failed: a user's own"):
        solve(VPSDE().probability_flow(asserts), torch.ones(2), [1.0, 0.5], "torchdiffeq:dopri5")
    with pytest.raises(ZeroDivisionError):  # the score's own failure is not the back-end's
        solve(VPSDE().probability_flow(lambda x, t: 1 / 0), torch.ones(2), [1.0, 0.5], "torchdiffeq:dopri5")


def test_bad_use_is_named():
    from sdekit import VPSDE

    sde, x = VPSDE(), torch.ones(2)
    system = sde.reverse(gaussian_score(sde))
    for method in ("torchdiffeq:dopri5", "scipy:RK45"):
        with pytest.raises(ValueError, match=f"{method.split(':')[0]} integrates ODEs"):
            solve(system, x, [1.0, 0.5], method)
    for method in ("torchdiffeq:rk4", "torchdiffeq:euler", "torchsde:euler"):  # one step from T to t_min
        with pytest.raises(ValueError, match=f"unknown adaptive method '{method}'"):
            ode_sample(sde, gaussian_score(sde), (2,), method=method)
    with pytest.raises(ValueError, match="not known to torchsde:euler"):
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
