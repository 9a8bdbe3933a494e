"""Dormand-Prince 5(4) with everything per sample."""

import math

import numpy as np
import pytest
import torch

from sdekit import HeatODE, SolverError, System, ode_sample, solve
from sdekit.adaptive import DORMAND_PRINCE, adaptive
from tests.conftest import NAMED, gaussian_score


def test_tableau_is_dormand_prince():
    """Row sums are the nodes; order conditions of both members up to order 4, of the main one up to 5."""
    p = DORMAND_PRINCE
    a = np.zeros((7, 7))
    for i, row in enumerate(p.a):
        a[i, : len(row)] = row
    c = np.array(p.c)
    np.testing.assert_allclose(a.sum(1), c, atol=1e-14)
    b5 = a[-1]
    b4 = b5 - np.array(p.e)
    for b, order in ((b5, 5), (b4, 4)):
        for k in range(1, order + 1):
            assert b @ c ** (k - 1) == pytest.approx(1 / k)
        assert b @ a @ c == pytest.approx(1 / 6)
        assert b @ a @ c**2 == pytest.approx(1 / 12)
    assert b5 @ a @ a @ a @ c == pytest.approx(1 / 120)
    assert abs(b4 @ c**4 - 1 / 5) > 1e-4


def harmonic(y, t, run):
    return torch.stack([y[:, 1], -y[:, 0]], 1)


@pytest.mark.parametrize("ends", [(0.0, 5.0), (5.0, 0.0)])
def test_error_follows_the_tolerance(ends):
    """Both directions of time, over six decades: error proportional to tolerance within a factor of ten."""
    y = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    span = ends[1] - ends[0]
    exact = torch.tensor([[math.cos(span), -math.sin(span)]], dtype=torch.float64)
    ratios = []
    for tol in (1e-4, 1e-6, 1e-8, 1e-10):
        out = adaptive(harmonic, y, torch.tensor(ends, dtype=torch.float64), rtol=tol, atol=tol)
        ratios.append(float((out.x - exact).abs().max()) / tol)
        assert out.success
    assert max(ratios) < 30
    assert max(ratios) / min(ratios) < 10


def test_no_evaluation_outside_the_interval():
    """PITFALL 15: not by the first-step probe, not by a last stage."""
    for name, make in NAMED.items():
        sde, times = make(), []

        def score(x, t, sde=sde, times=times):
            times.append(t.clone())
            return gaussian_score(sde, 0.1)(x, t)

        ode_sample(sde, score, (5, 2), seed=0, dtype=torch.float64, denoise=False)
        seen = torch.cat(times)
        assert float(seen.min()) >= sde.t_min, name
        assert float(seen.max()) <= sde.T, name
        assert float(seen.min()) == pytest.approx(sde.t_min)


def test_a_sample_is_the_same_alone_and_in_any_batch():
    """PITFALL 12: its error, its steps, its finish; hard and easy samples side by side."""
    for make in NAMED.values():
        sde = make()
        system = sde.probability_flow(gaussian_score(sde, 0.05))
        x = sde.prior_sample((6, 3, 5), seed=0) * torch.tensor([0.0, 1e-3, 0.1, 1.0, 3.0, 10.0]).reshape(6, 1, 1)
        grid = torch.tensor([sde.T, sde.t_min])
        whole = solve(system, x, grid, "rk45", keep=4)
        for rows in ([0], [3], [5, 2]):
            part = solve(system, x[rows], grid, "rk45", keep=4)
            assert torch.equal(part.x, whole.x[rows])
            assert torch.equal(part.accepted, whole.accepted[rows])
            assert torch.equal(part.nfe_per_sample, whole.nfe_per_sample[rows])
            assert torch.equal(part.trajectory.x, whole.trajectory.x[:, rows])
        assert len(set(whole.nfe_per_sample.tolist())) > 1


def test_counts_are_consistent():
    """Evaluations: two to start, six a step; finished samples leave the batch the network sees."""
    sde, sizes = NAMED["VP"](), []

    def score(x, t):
        sizes.append(len(x))
        return gaussian_score(sde, 0.05)(x, t)

    x = sde.prior_sample((4, 3), seed=0) * torch.tensor([1e-3, 1.0, 1.0, 30.0]).unsqueeze(1)
    out = solve(sde.probability_flow(score), x, [1.0, 1e-5], "rk45")
    assert out.nfe == len(sizes)
    assert torch.equal(out.nfe_per_sample, 2 + 6 * (out.accepted + out.rejected))
    assert int(out.nfe_per_sample.max()) == out.nfe
    assert int(out.nfe_per_sample.sum()) == sum(sizes)
    assert sizes[-1] < 4
    assert out.success
    assert out.hint == ""
    assert out.t.tolist() == [1e-5] * 4


def test_the_trajectory_hits_its_times_exactly():
    times = torch.linspace(0.0, 2.0, 5, dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    out = adaptive(harmonic, y, times, rtol=1e-9, atol=1e-9, keep=True)
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
    assert "evaluation limit" in out.hint
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
        ode_sample(HeatODE(), lambda x, t: x**2 / t, (3,), x_T=x_T)
    solution = info.value.solution
    assert solution.status == ["step_underflow", "success", "success"]
    assert float(solution.t[0]) == pytest.approx(55, abs=1e-2)


def test_flow_of_a_gaussian_is_exact(sde):
    """The flow scales N(0, a_T^2 v + s_T^2) to N(0, a^2 v + s^2): a closed form for every process."""
    score, std = gaussian_score(sde, 0.3), 0.3
    x = sde.prior_sample((4, 2), seed=0, dtype=torch.float64)

    def spread(t):
        return float((sde.alpha(t) ** 2 * std**2 + sde.sigma(t) ** 2).sqrt())

    out = ode_sample(sde, score, x.shape, x_T=x, rtol=1e-10, atol=1e-12, denoise=False)
    torch.testing.assert_close(out, x * spread(sde.t_min) / spread(sde.T), rtol=1e-7, atol=1e-10)
    mean = ode_sample(sde, score, x.shape, x_T=x, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean, sde.denoise(out, sde.t_min, score), rtol=1e-7, atol=1e-10)
