"""Few steps: the levels that they leave out, the analytic first step to them, what an error of the model then does."""

import math
from dataclasses import dataclass

import pytest
import torch

from sdekit import (
    SAMPLERS,
    SDE,
    VPSDE,
    BrownianPath,
    CosineVP,
    GaussianMixture,
    HeatODE,
    RectifiedFlow,
    as_score,
    ode_sample,
    pc_sample,
    sample,
    sde_sample,
    step_rule,
)  # fmt: skip
from sdekit.sampling.grids import INNER, make_grid
from sdekit.sampling.sensitivity import sensitivity
from sdekit.sampling.starts import bridge
from tests import oracle
from tests.conftest import gaussian_score

FLOW_ROWS = [name for name, row in SAMPLERS.items() if not row.stochastic]


def level(sde, t):
    return math.exp(-float(sde.half_log_snr(float(t))))


def vp(x, t):
    """A network that knows nothing."""
    return 0.0 * x


@pytest.mark.parametrize("sde", [VPSDE(), HeatODE(), RectifiedFlow(), CosineVP(), RectifiedFlow(3.0)], ids=range(5))
@pytest.mark.parametrize("name", INNER)
def test_inner_grids_lie_between_the_levels_of_their_formula(sde, name):
    for n in (1, 2, 5, 20):
        times = make_grid(sde, name, n)
        assert level(sde, times[0]) == pytest.approx(min(2 * (n + 1), level(sde, sde.T)), rel=1e-6)
        assert level(sde, times[-1]) == pytest.approx(
            max(min(0.4, 0.8 / n**1.5), level(sde, sde.t_min)), rel=1e-6
        )  # fmt: skip
        assert bool((times.diff() < 0).all())


def test_with_many_steps_an_inner_grid_is_the_whole():
    """76 steps reach the noise of VPSDE(), and its t_min = 1e-5 with sigma = 0.001 is reached by 87."""
    sde = VPSDE()
    assert torch.equal(make_grid(sde, "inner_karras", 90), make_grid(sde, "karras", 90))
    assert not torch.equal(make_grid(sde, "inner_karras", 60), make_grid(sde, "karras", 60))


def test_grids_of_levels_do_not_depend_on_a_far_T():
    """Two ways of saying the same: a process to T = .999, to .9999 and to 1, which data cannot tell apart."""
    process = RectifiedFlow()
    short, long = RectifiedFlow(), RectifiedFlow()
    short.T, long.T = 0.999, 0.9999
    score = GaussianMixture(*oracle_parts()).score(process)
    x = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("flow_3m", "unipc_2", "heun"):
        drawn = [sample(sde, score, x.shape, name, nfe=9, x_T=x) for sde in (process, long, short)]
        assert float((drawn[0] - drawn[1]).abs().max()) < 3e-4
        assert float((drawn[0] - drawn[2]).abs().max()) < 3e-3
    for name in ("karras", "vp_quadratic", "log_snr"):  # and the named ones begin at the level 1,000 at most
        times = [make_grid(sde, name, 8) for sde in (process, long)]
        torch.testing.assert_close(times[0][1:], times[1][1:], rtol=1e-12, atol=0)


def oracle_parts():
    g = oracle.grid25()
    return g.m / 4, g.covs, g.w


def test_the_bridge_is_exact_where_there_is_one_datum():
    """E[x_0|x] = m whatever x: the flow is x_s = alpha_s m + sigma_s/sigma_t (x - alpha_t m); nothing is guessed."""
    m = torch.tensor([0.3, -1.2, 0.8], dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sde in (VPSDE(), HeatODE(), RectifiedFlow(), CosineVP()):
        for predicts in ("x0", "v", "flow"):

            def network(x, t, sde=sde, predicts=predicts):
                alpha, sigma = (f(t.double())[:, None] for f in (sde.alpha, sde.sigma))
                eps = (x - alpha * m) / sigma
                slopes = [y[:, None] for y in sde.velocity(t.double())]
                return {"x0": m.expand_as(x), "v": alpha * eps - sigma * m, "flow": slopes[0] * m + slopes[1] * eps}[
                    predicts
                ]

            system = sde.probability_flow(as_score(network, sde, predicts))
            s = float(sde.inverse_half_log_snr(torch.tensor(-math.log(3.0), dtype=torch.float64)))
            (a, b), (alpha, sigma) = ((float(sde.alpha(t)), float(sde.sigma(t))) for t in (sde.T, s))
            there = bridge(system, b * x, float(sde.T), s)
            torch.testing.assert_close(there, alpha * m + sigma / b * (b * x - a * m), rtol=1e-9, atol=1e-12)
            # what it tells is what the model would say there, and costs no other evaluation
            said = system.model(there, system.at(s, there).time)
            assert system.nfe == 1
            torch.testing.assert_close(said, network(there, torch.full((5,), s)), rtol=1e-5, atol=1e-6)


def test_the_bridge_errs_by_the_square_of_the_signal():
    """From T to the level r, on digits64: its error falls as 1/r^2, the variance-matched guess's as 1/r alone."""
    g = oracle.digits64()
    sde = HeatODE()
    score = GaussianMixture(g.m, g.covs, g.w).score(sde)
    x = 80 * torch.randn(32, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = {False: [], True: []}
    for r in (5.0, 10.0, 20.0):
        exact = torch.from_numpy(g.flow(x.numpy(), 80.0, r, rtol=1e-11, atol=1e-12))
        for noisy, errors in found.items():
            there = bridge(sde.probability_flow(score), x, 80.0, r, noisy)
            errors.append(float((there - exact).square().mean().sqrt()) / r)
    orders = {noisy: math.log2(errors[0] / errors[2]) / 2 for noisy, errors in found.items()}
    assert 1.7 < orders[False] < 2.6, found
    assert 0.8 < orders[True] < 1.3, found
    assert found[False][1] < 0.3 * found[True][1]


@pytest.mark.parametrize("name", FLOW_ROWS)
def test_the_first_step_costs_no_evaluation(name):
    """Every row asks for the very state that the bridge has evaluated."""
    for sde in (VPSDE(), RectifiedFlow()):
        calls = []
        score = as_score(lambda x, t, calls=calls: calls.append(float(t[0])) or 0.1 * x, sde, "v")
        rule = SAMPLERS[name].rule
        sample(sde, score, (2, 3), name, steps=4, seed=0)
        assert len(calls) == 4 * rule.evaluations + rule.extra + 1
        assert calls[0] < 0.999 * sde.T  # not at T
        assert level(sde, calls[-1]) == pytest.approx(0.1, rel=1e-4)  # where x_0 is read


def test_without_denoising_x_is_at_t_min():
    sde, times = VPSDE(), []
    sample(sde, gaussian_score(sde), (2, 3), seed=0, steps=6, denoise=False, callback=lambda k, t, x: times.append(t))
    assert times[-1] == sde.t_min


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_an_error_of_the_model_is_not_amplified(predicts):
    """On VPSDE(), sigma/alpha = 152 at T: one of .03 in eps moved x by 4 of its size in all rows from T's own level on.

    Now it is moved no more than 2 N times, and by v and x_0 less than 1.3 and 2.5 times.
    """
    for name in FLOW_ROWS:
        for nfe in (5, 6, 8, 10, 20):
            worst = sensitivity(VPSDE(), name, nfe=nfe, predicts=predicts).worst
            assert worst < {"eps": 2.0 * nfe, "v": 1.3, "x0": 2.5}[predicts], (name, nfe)
    old = [sensitivity(VPSDE(), name, nfe=6, grid="vp_quadratic").worst for name in ("flow_3m", "unipc_2", "ddim")]
    assert min(old) > 100  # what the test is for


def test_sensitivities_are_the_derivatives():
    """Against difference quotients of a run with an error put into one evaluation."""
    sde, nfe = VPSDE(), 7
    x = torch.randn(1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("flow_3m", "heun", "ddim"):
        found = sensitivity(sde, name, nfe=nfe, predicts="v")

        def run(at, name=name):
            calls = []
            score = as_score(lambda x, t: torch.full_like(x, float(calls.append(0) or len(calls) - 1 == at)), sde, "v")
            return float(sample(sde, score, x.shape, name, nfe=nfe, x_T=x))

        base = run(-1)
        for k, slope in enumerate(found.result.tolist()):
            assert run(k) - base == pytest.approx(slope, abs=1e-12)
    with pytest.raises(ValueError, match="must draw no noise"):
        sensitivity(sde, "sa_solver", nfe=9)


def test_a_start_half_way_is_the_explicit_grid():
    """img2img (SDEdit): named grids, an explicit one that begins there, and the adaptive methods."""
    for sde in (VPSDE(), RectifiedFlow()):
        score = as_score(lambda x, t: torch.tanh(x) - 0.3 * x, sde, "v")
        x = sde.perturb(torch.full((3, 2), 0.4, dtype=torch.float64), 0.5, seed=0)
        for name in ("unipc_2", "heun", "flow_3m", "sa_solver"):
            grid = make_grid(sde, "karras", 7, 0.5)
            assert grid[0] == 0.5
            same = sample(sde, score, x.shape, name, grid=grid, x_T=x, seed=0)
            for how in ({"grid": "karras", "steps": 7}, {"grid": grid}):
                assert torch.equal(sample(sde, score, x.shape, name, x_T=x, start=0.5, seed=0, **how), same)
        fine = sample(sde, score, x.shape, "rk4", grid=make_grid(sde, "log_snr", 200, 0.5), x_T=x)
        torch.testing.assert_close(
            ode_sample(sde, score, x.shape, x_T=x, start=0.5, rtol=1e-8, atol=1e-8), fine, rtol=0, atol=1e-6
        )
        torch.testing.assert_close(sample(sde, score, x.shape, nfe=40, x_T=x, start=0.5), fine, rtol=0, atol=1e-3)
        assert torch.isfinite(pc_sample(sde, score, x.shape, steps=20, x_T=x, start=0.5, seed=0)).all()


def test_adaptive_steps_of_the_sde_start_half_way_too():
    """The path is on [t_min, start]: the law of Gaussian data, z-tests at 6.5 sigma, false alarms below 1e-9."""
    sde, n, t = VPSDE(), 4000, 0.4
    score = gaussian_score(sde, 0.5)
    std = float((sde.alpha(t) ** 2 * 0.25 + sde.sigma(t) ** 2) ** 0.5)
    x = std * torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = sde_sample(sde, score, x.shape, x_T=x, start=t, seed=0, rtol=0.01, atol=0.01, denoise=False)
    assert abs(float(drawn.var()) / 0.25 - 1) < 6.5 * (2 / n) ** 0.5 + 0.01
    assert BrownianPath(x, 0, start=t, end=sde.t_min).finest > 0


def test_a_schedule_that_knows_its_T_is_cut_not_stretched():
    """And a process that cannot be changed has grids too."""

    @dataclass(frozen=True)
    class Own(SDE):
        T: float = 10.0

        def alpha(self, t):
            return torch.cos(0.4995 * torch.pi * t / self.T)

        def sigma(self, t):
            return torch.sin(0.4995 * torch.pi * t / self.T)

    sde = Own()
    roots = torch.tensor([level(sde, t) for t in make_grid(sde, "inner_karras", 5)]) ** (1 / 7)
    torch.testing.assert_close(roots.diff().diff(), torch.zeros(4), rtol=0, atol=1e-5)
    assert torch.isfinite(sample(sde, gaussian_score(sde), (2, 2), nfe=5, seed=0)).all()


def test_a_low_start_is_not_read_off_early():
    """From a level of .07 to .3 few steps do no worse than the whole grid does, or what is left of it would be lost."""
    sde = VPSDE()
    score = GaussianMixture(*oracle_parts()).score(sde)
    for r in (0.07, 0.15, 0.3):
        t = float(sde.inverse_half_log_snr(torch.tensor(-math.log(r), dtype=torch.float64)))
        x = sde.perturb(torch.full((32, 2), 0.5, dtype=torch.float64), t, seed=0)
        fine = ode_sample(sde, score, x.shape, x_T=x, start=t, rtol=1e-9, atol=1e-9)
        errors = [
            float((sample(sde, score, x.shape, "unipc_2", nfe=6, x_T=x, start=t, grid=grid) - fine).square().mean())
            for grid in (None, "vp_cubic")
        ]
        assert errors[0] < 9 * errors[1], (r, errors)


def test_what_was_told_is_of_an_x_that_did_not_change():
    """A rule that works in place on its x, or asks elsewhere first, gets an evaluation of its own."""

    @step_rule(order=1)
    def in_place(system, x, t, s, noise, state):
        x.mul_(1.5)
        return x + (s - t) * system.drift(x, t), state

    @step_rule(order=1)
    def out_of_place(system, x, t, s, noise, state):
        y = 1.5 * x
        return y + (s - t) * system.drift(y, t), state

    sde = VPSDE()
    score = gaussian_score(sde, 0.5)
    drawn = [
        sample(sde, score, (3, 2), rule, steps=5, grid="inner_karras", seed=0) for rule in (in_place, out_of_place)
    ]
    assert torch.equal(*drawn)


def test_a_clock_that_is_trained_keeps_its_gradient():
    sde, w = VPSDE(), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    score = as_score(lambda x, t: 0.1 * x * t[:, None], sde, "v", time=lambda t: w * t)
    x = torch.ones(2, 2, dtype=torch.float64)
    (slope,) = torch.autograd.grad(sample(sde, score, x.shape, nfe=6, x_T=x, differentiable=True).sum(), w)
    again = as_score(lambda x, t: 0.1 * x * t[:, None], sde, "v", time=lambda t: (2.0 + 1e-6) * t)
    plain = as_score(lambda x, t: 0.1 * x * t[:, None], sde, "v", time=lambda t: 2.0 * t)
    quotient = (sample(sde, again, x.shape, nfe=6, x_T=x) - sample(sde, plain, x.shape, nfe=6, x_T=x)).sum() / 1e-6
    assert float(slope) == pytest.approx(float(quotient), rel=1e-4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"start": 0.0}, r"must lie in \(t_min, T\] = \(1e-05, 1\], got 0"),
        ({"start": 1.5}, r"must lie in \(t_min, T\] = \(1e-05, 1\], got 1.5"),
        ({"start": "T"}, "start must be a number"),
        ({"start": torch.full((2,), 0.5)}, r"one time for the whole batch, got a tensor of shape \(2,\)"),
        ({"start": 0.3, "x_T": None}, r"start = 0.3 needs x_T, .* sde.perturb\(x, 0.3\)"),
        ({"start": 0.5, "grid": torch.tensor([0.3, 0.1])}, "grid begins at 0.3, and x_T is at start = 0.5"),
        ({"start": 0.3, "grid": torch.tensor([0.5, 0.1])}, r"grid must lie in \[t_min, start\] = \[1e-05, 0.3\]"),
    ],
)
def test_a_start_that_is_none_is_named(kwargs, message):
    sde = VPSDE()
    with pytest.raises((ValueError, TypeError), match=message):
        sample(sde, gaussian_score(sde), (2, 2), seed=0, **{"x_T": torch.ones(2, 2), **kwargs})


def test_a_network_of_eps_is_still_refused_where_there_is_no_signal():
    sde = RectifiedFlow()
    with pytest.raises(ValueError, match="says nothing"):
        sample(sde, as_score(vp, sde, "eps"), (2, 2), nfe=5, seed=0)
