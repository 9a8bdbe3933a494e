"""What is kept between calls: used again, and never for another process, time, network or dtype."""

import threading
from functools import partial

import pytest
import torch

from sdekit import SAMPLERS, VPSDE, BetaTable, HeatODE, Reverse, as_score, sample, solve, step_rule
from sdekit.processes import kept as module
from sdekit.processes.kept import kept
from sdekit.solvers.steppers import multistep
from tests.conftest import gaussian_score

X = torch.linspace(-2, 2, 8, dtype=torch.float64).reshape(4, 2)


def drawn(sde, name="dpmpp_2m", x_T=X, **kwargs):
    return sample(sde, gaussian_score(sde, 0.5), x_T.shape, name, x_T=x_T, seed=0, **{"nfe": 9, **kwargs})


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_second_call_is_the_first_again(name):
    sde = VPSDE()
    first = drawn(sde, name, nfe=None, steps=8)
    assert torch.equal(drawn(sde, name, nfe=None, steps=8), first)
    assert torch.equal(drawn(VPSDE(), name, nfe=None, steps=8), first)


@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "ddim", "dpm_solver_2", "edm", "sa_solver"])
def test_a_process_that_changes_is_a_new_one(name):
    """t_min, a beta, an entry of a table and what a callable closes over, between two calls."""

    def changed(make, change):
        sde = make()
        drawn(sde, name, nfe=None, steps=8)
        change(sde)
        fresh = make()
        change(fresh)
        assert torch.equal(drawn(sde, name, nfe=None, steps=8), drawn(fresh, name, nfe=None, steps=8))

    changed(VPSDE, lambda sde: setattr(sde, "t_min", 1e-2))
    changed(VPSDE, lambda sde: setattr(sde, "beta_max", 15.0))
    changed(lambda: BetaTable(torch.linspace(1e-3, 0.2, 50)), lambda sde: sde._log_alpha[30:].sub_(0.1))
    factor = [1.0]
    sde = HeatODE(lambda t: t * factor[0])
    before = drawn(sde, name, nfe=None, steps=8)
    factor[0] = 0.5
    after = drawn(sde, name, nfe=None, steps=8)
    factor[0] = 1.0
    assert not torch.equal(before, after)
    assert torch.equal(drawn(sde, name, nfe=None, steps=8), before)


def test_networks_of_several_kinds_and_dtypes_share_a_process():
    sde = VPSDE()
    exact = gaussian_score(sde, 0.5)

    def network(kind):
        def said(x, t):
            s, a = sde.sigma(t).to(x).reshape(-1, 1), sde.alpha(t).to(x).reshape(-1, 1)
            eps = -s * exact(x, t).to(x)
            return eps if kind == "eps" else (x - s * eps) / a

        return as_score(said, sde, kind)

    want = sample(sde, exact, X.shape, nfe=8, x_T=X)
    for kind in ("eps", "x0", "eps", "x0"):
        for dtype in (torch.float64, torch.float32):
            x = sample(sde, network(kind), X.shape, nfe=8, x_T=X, dtype=dtype)
            torch.testing.assert_close(x.double(), want, rtol=0, atol=1e-10 if dtype is torch.float64 else 1e-5)


def test_it_is_used_and_bounded_and_goes_with_its_process(monkeypatch):
    made = []
    sde, times = VPSDE(), torch.linspace(0.1, 1, 5).double()

    def make():
        made.append(1)
        return times

    for _ in range(3):
        assert kept(sde, "grid", make, lambda value: value) is times
    assert len(made) == 1
    monkeypatch.setattr(module, "MOST", 4)
    for k in range(10):
        kept(sde, k, make, lambda value: value)
    assert len(module._of[sde]) == 4
    before = len(module._of)
    del sde
    assert len(module._of) == before - 1


def test_rules_made_anew_for_every_call_do_not_pile_up():
    sde = VPSDE()
    system = sde.probability_flow(gaussian_score(sde))
    for _ in range(200):
        solve(system, X, [1.0, 0.5, 0.1], multistep(2))
    assert len(system._kept) <= module.MOST + 2


def test_a_schedule_that_is_learnt_is_what_it_is_now():
    class Learnt(VPSDE):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

        def integrated_beta(self, t):
            return self.scale * super().integrated_beta(t)

    sde = Learnt()
    before = drawn(sde)
    with torch.no_grad():
        sde.scale.mul_(0.9)
    assert not torch.equal(drawn(sde), before)
    with pytest.raises(ValueError, match="parameters of the process require a gradient, and samples have none to them"):
        drawn(sde, differentiable=True)


def test_what_a_table_depends_on_besides_alpha_and_sigma():
    """T, above which edm must not look; and the velocity that a flow network predicts."""
    seen = []

    def network(x, t):
        seen.append(float(t[0]))
        return 0.1 * x

    sde, grid = VPSDE(), torch.linspace(0.5, 0.01, 6)
    score = as_score(network, sde, "eps")
    sample(sde, score, (1, 2), "edm", grid=grid, seed=0)
    assert max(seen) > 0.51
    sde.T = 0.5
    seen.clear()
    sample(sde, score, (1, 2), "edm", grid=grid, seed=0)
    assert max(seen) <= 0.5 + 1e-6

    class Scaled(VPSDE):
        k = 1.0

        def velocity(self, t):
            return tuple(self.k * y for y in super().velocity(t))

    one, two = Scaled(), Scaled()
    two.k = 2.0
    draw = lambda sde: sample(sde, as_score(lambda x, t: 0.1 * x, sde, "flow"), X.shape, "ddim", nfe=6, x_T=X)  # noqa: E731
    first = draw(one)
    one.k = 2.0
    assert torch.equal(draw(one), draw(two))
    assert not torch.equal(draw(one), first)


def test_a_system_at_hand_looks_at_its_process_again():
    sde = VPSDE()
    system = sde.probability_flow(as_score(lambda x, t: 0.3 * x, sde, "x0"))
    solve(system, X, [1.0, 0.5, 0.1], "heun")
    first = system.drift(X, 0.5)
    sde.beta_max = 5.0
    fresh = sde.probability_flow(as_score(lambda x, t: 0.3 * x, sde, "x0"))
    assert torch.equal(system.drift(X, 0.5), fresh.drift(X, 0.5))
    assert not torch.equal(system.drift(X, 0.5), first)
    assert system.drift(X[:2], 0.5).shape == (2, 2)  # and of another batch


def test_a_model_may_change_the_time_that_it_is_given():
    """Its own tensors: neither the next evaluation nor the next call sees what it made of them."""
    sde = VPSDE()

    def bare(seen):
        def score(x, t):
            seen.append(float(t))
            t.mul_(0.5)
            return -x

        return score

    def wrapped(seen, **clock):
        def network(x, t):
            seen.append(float(t[0]))
            t.mul_(0.5)
            return -x

        return as_score(network, sde, "score", **clock)

    for name in ("dpmpp_2m", "heun", "dpm_solver_2"):
        for make in (bare, wrapped, partial(wrapped, time=lambda t: 999 * t)):
            runs = []
            for _ in range(2):
                runs.append([])
                sample(sde, make(runs[-1]), X.shape, name, steps=3, x_T=X)
            assert runs[0] == runs[1]
            want = []
            sample(sde, lambda x, t, want=want: want.append(float(t)) or -x, X.shape, name, steps=3, x_T=X)
            if make is not bare or name == "dpmpp_2m":
                scale = runs[0][0] / want[0]
                assert runs[0] == pytest.approx([scale * t for t in want], rel=1e-6)


def test_a_rule_may_ask_for_another_batch():
    sde = VPSDE()

    @step_rule(evaluations=1)
    def twice(system, x, t, s, noise, state):
        x_0, eps = (y[: len(x)] for y in system.predict(torch.cat([x, x + 0.01]), t))
        n = system.at(s, x)
        return n.alpha * x_0 + n.sigma * eps, state

    for score in (as_score(lambda x, t: 0.3 * x * t[:, None], sde, "x0"), gaussian_score(sde)):
        draw = partial(sample, sde, score, X.shape, steps=4, x_T=X, grid="uniform")
        torch.testing.assert_close(draw(sampler=twice), draw(sampler="ddim"))


def test_inference_mode_leaves_nothing_behind():
    sde, x = VPSDE(), X.clone().requires_grad_()
    score = as_score(lambda x, t: 0.3 * x * t[:, None].to(x), sde, "x0")
    for name in ("dpmpp_2m", "unipc_3", "dpm_solver_2", "edm", "ddim", "heun"):
        with torch.inference_mode():
            sample(sde, score, X.shape, name, steps=12)
        assert sample(sde, score, X.shape, name, steps=12, x_T=x, seed=0, differentiable=True).requires_grad


def test_two_equal_processes_share_what_is_kept(monkeypatch):
    """as_score(network, VPSDE()) and sample(VPSDE(), ...): the common way to write it."""
    counted, sde = [], VPSDE()
    levels = Reverse.levels
    monkeypatch.setattr(Reverse, "levels", lambda self, times: counted.append(1) or levels(self, times))
    score = as_score(lambda x, t: 0.3 * x, VPSDE(), "x0")
    first = sample(sde, score, X.shape, nfe=8, x_T=X)
    counted.clear()
    assert torch.equal(sample(sde, score, X.shape, nfe=8, x_T=X), first)
    assert not counted
    score.sde.beta_max = 5.0
    with pytest.raises(ValueError, match="wrapped for another process"):
        sample(sde, score, X.shape, nfe=8, x_T=X)


def test_threads_draw_what_one_does():
    sde, found, errors = VPSDE(), {}, []
    want = {(n, name): drawn(VPSDE(), name, nfe=n) for n in (6, 9, 12) for name in ("dpmpp_2m", "heun", "unipc_2")}

    def work(k):
        try:
            for key in list(want)[k:] + list(want)[:k]:
                found[k, key] = drawn(sde, key[1], nfe=key[0])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.equal(x, want[key]) for (_, key), x in found.items())
