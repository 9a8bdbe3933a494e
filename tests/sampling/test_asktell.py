"""A run turned inside out makes what ``sample`` makes."""

import copy
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdekit import SAMPLERS, VPSDE, BetaTable, HeatODE, RectifiedFlow, Sampler, as_score, calibrate, sample, step_rule
from sdekit.models.thresholding import static_threshold
from sdekit.sampling import AskTell
from sdekit.solvers.steppers import RULES, chain, langevin, restart

BETAS = torch.linspace(1e-4, 0.02, 100, dtype=torch.float64)
PROCESSES = {
    "VP": (VPSDE, "eps"),
    "heat": (HeatODE, "x0"),
    "flow": (RectifiedFlow, "flow"),
    "table": (lambda: BetaTable(BETAS), "v"),
}


def network(x, t):
    return torch.sin(2 * x) * 0.3 + x * 0.5 + t.reshape(-1, 1) * 0.01


def told(run, score):
    """The run's samples, and where it asked."""
    asked = []
    while run.t is not None:
        asked.append(run.t)
        run.tell(score.output(run.x, torch.tensor(run.t, dtype=torch.float64)))
    return run.x, asked


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_the_same_to_the_bit(process, sampler):
    make, predicts = PROCESSES[process]
    sde = make()
    score = as_score(network, sde, predicts)
    x_T = sde.prior_sample((3, 4), seed=0)
    try:
        direct = sample(sde, score, x_T.shape, sampler, steps=6, x_T=x_T, seed=5)
    except ValueError as error:  # what cannot start where alpha = 0
        with pytest.raises(ValueError, match=re.escape(str(error))):
            told(AskTell(sde, x_T, sampler, predicts=predicts, steps=6, seed=5), score)
        return
    x, asked = told(AskTell(sde, x_T, sampler, predicts=predicts, steps=6, seed=5), score)
    assert torch.equal(x, direct)
    rule = SAMPLERS[sampler].rule
    assert len(asked) == 6 * rule.evaluations + rule.extra + 1


@given(st.sampled_from(["unipc_3", "dpm_solver_3", "heun_sde", "pc", "restart"]), st.integers(2, 9), st.booleans())
def test_any_length_with_and_without_denoising(sampler, steps, denoise):
    sde = VPSDE()
    score = as_score(network, sde, "v")
    x_T = sde.prior_sample((2, 3), seed=1, dtype=torch.float64)
    arguments = {"steps": steps, "denoise": denoise, "seed": 2, "ids": [7, 3]}
    direct = sample(sde, score, x_T.shape, sampler, x_T=x_T, **arguments)
    assert torch.equal(told(AskTell(sde, x_T, sampler, predicts="v", **arguments), score)[0], direct)


@pytest.mark.parametrize(
    "rule",
    [
        chain(langevin(), RULES["unipc_3"]),
        restart(RULES["unipc_2"]),
        restart(RULES["deis"]),
    ],
    ids=["corrector and multistep", "restart of unipc_2", "restart of deis"],
)
def test_rules_of_several_evaluations_may_have_a_history(rule):
    """Each replay of a step finds the history as the step before left it, in memory that nothing has written over."""
    sde = HeatODE()
    score = as_score(network, sde, "x0")
    x_T = sde.prior_sample((2, 3), seed=1, dtype=torch.float64)
    row = Sampler(rule, grid="karras")
    direct = sample(sde, score, x_T.shape, row, steps=8, x_T=x_T, seed=3)
    assert torch.equal(told(AskTell(sde, x_T, row, predicts="x0", steps=8, seed=3), score)[0], direct)


def test_a_calibration_and_a_start_and_a_threshold():
    sde = VPSDE()
    score = as_score(network, sde, "eps")
    fitted = calibrate(sde, score, (4, 3), nfe=4, noises=8, iterations=2, batch=4, seed=0)
    x_T = sde.prior_sample((4, 3), seed=1)
    assert torch.equal(
        told(AskTell(sde, x_T, fitted, predicts="eps"), score)[0], sample(sde, score, (4, 3), fitted, x_T=x_T)
    )
    half = sample(sde, score, (4, 3), x_T=x_T, steps=5, start=0.5, grid="log_snr")
    assert torch.equal(told(AskTell(sde, x_T, predicts="eps", steps=5, start=0.5, grid="log_snr"), score)[0], half)
    clipped = sample(sde, static_threshold(sde, score, (-0.2, 0.2)), (4, 3), x_T=x_T, steps=5)
    run = AskTell(sde, x_T, predicts="eps", steps=5, change=lambda model: static_threshold(sde, model, (-0.2, 0.2)))
    assert torch.equal(told(run, score)[0], clipped)


def test_a_moved_state_is_gone_on_from():
    """As a run of the rest of the grid that begins there."""
    sde = HeatODE()
    score = as_score(network, sde, "x0")
    x_T = sde.prior_sample((2, 3), seed=1, dtype=torch.float64)
    times = torch.tensor([80.0, 5.0, 1.0, 0.2], dtype=torch.float64)
    run = AskTell(sde, x_T, "ddim", predicts="x0", grid=times)
    run.tell(score.output(run.x, torch.tensor(run.t)))
    moved = run.x + 1
    assert (run.t, run.done, run.within) == (5.0, 1, False)
    run.tell(score.output(moved, torch.tensor(run.t)), moved)
    direct = sample(sde, score, (2, 3), "ddim", grid=times[1:], x_T=moved)
    assert torch.allclose(told(run, score)[0], direct, rtol=1e-12)


def test_half_precision_answers_leave_the_state_as_it_is():
    sde = VPSDE()
    run = AskTell(sde, torch.ones(2, 3), predicts="eps", steps=3)
    while run.t is not None:
        run.tell(run.x.bfloat16())
    assert run.x.dtype is torch.float32


def test_a_rule_may_change_its_state_in_place():
    @step_rule(evaluations=2)
    def counting(system, x, t, s, noise, state):
        state = [] if state is None else state
        state.append(1)
        d = system.drift(x, t)
        return x + (s - t) / 2 * (d + system.drift(x + (s - t) * d, s)) * len(state), state

    sde = VPSDE()
    score = as_score(network, sde, "eps")
    x_T = sde.prior_sample((2, 3), seed=1)
    direct = sample(sde, score, (2, 3), counting, steps=3, x_T=x_T, grid="uniform")
    assert torch.equal(told(AskTell(sde, x_T, counting, predicts="eps", steps=3, grid="uniform"), score)[0], direct)


@pytest.mark.parametrize("sampler", ["heun", "rk4", "dpm_solver_3", "restart", "pc", "unipc_3"])
def test_a_network_that_writes_its_results_into_one_place(sampler):
    sde, place = VPSDE(), torch.empty(2, 3)
    score = as_score(lambda x, t: place.copy_(network(x, t)), sde, "eps")
    x_T = sde.prior_sample((2, 3), seed=1)
    direct = sample(sde, score, (2, 3), sampler, steps=4, x_T=x_T, seed=2)
    assert torch.equal(told(AskTell(sde, x_T, sampler, predicts="eps", steps=4, seed=2), score)[0], direct)


def test_the_budget_is_kept_and_a_run_is_not_copied():
    @step_rule()
    def two(system, x, t, s, noise, state):
        return x + (s - t) / 2 * (system.drift(x, t) + system.drift(x, s)), state

    sde = VPSDE()
    score = as_score(network, sde, "eps")
    run = AskTell(sde, torch.ones(2, 3), two, predicts="eps", nfe=5, grid="uniform")
    with pytest.raises(RuntimeError, match="more than the nfe budget of 5 evaluations"):
        told(run, score)
    with pytest.raises(TypeError, match="cannot be copied on its way"):
        copy.deepcopy(run)


def test_what_is_wrong_is_said():
    sde, x_T = VPSDE(), torch.ones(2, 3)
    run = AskTell(sde, x_T, "heun", predicts="eps", steps=2, grid="log_snr")
    with pytest.raises(ValueError, match=r"output must be what the model says at x, of shape \(2, 3\), got \(2,\)"):
        run.tell(torch.ones(2))
    run.tell(torch.zeros(2, 3))
    assert run.within
    with pytest.raises(ValueError, match="x can be moved where a step begins"):
        run.tell(torch.zeros(2, 3), torch.ones(2, 3))
    while run.t is not None:
        run.tell(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="the run is at its end"):
        run.tell(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="unknown prediction"):
        AskTell(sde, x_T, predicts="noise", steps=3)
    bad = AskTell(sde, x_T, predicts="eps", steps=1, grid="uniform")
    bad.tell(torch.full((2, 3), float("nan")))
    with pytest.raises(FloatingPointError, match="NaN"):
        bad.tell(torch.zeros(2, 3))

    @step_rule()
    def by_score(system, x, t, s, noise, state):
        return x + (s - t) * system.score(x, t), state

    rows = AskTell(sde, x_T, by_score, predicts="eps", steps=2)  # the score is made of what was told
    assert rows.t == 1.0
