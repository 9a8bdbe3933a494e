"""The samplers as users call them: surface, seeds, batches, budgets, bad input, and the law of what comes out."""

import inspect
import math

import numpy as np
import pytest
import torch

from sdekit import SAMPLERS, VPSDE, GaussianMixture, Noise, Sampler, ode_sample, pc_sample, sample, solve
from sdekit.sampling.grids import make_grid
from sdekit.solvers.steppers import RULES, ddim
from tests import oracle
from tests.conftest import NAMED, gaussian_score

SHAPES = [(5,), (5, 1), (5, 2, 3), (5, 2, 3, 3)]
CALLS = {
    "pc_sample": lambda sde, score, shape, **k: pc_sample(sde, score, shape, steps=20, **k),
    "ode_sample": lambda sde, score, shape, **k: ode_sample(sde, score, shape, rtol=1e-2, atol=1e-2, **k),
    "sample": lambda sde, score, shape, **k: sample(sde, score, shape, steps=20, **k),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_surface(named, call, shape):
    """Four processes, shapes and dtypes; float32 unless told otherwise; the seed fixes everything."""
    score = gaussian_score(named)
    for dtype in (None, torch.float32, torch.float64):
        x = CALLS[call](named, score, shape, seed=3, dtype=dtype)
        assert x.shape == shape
        assert x.dtype == (dtype or torch.get_default_dtype())
        assert torch.isfinite(x).all()
        assert torch.equal(x, CALLS[call](named, score, shape, seed=3, dtype=dtype))
        assert not torch.equal(x, CALLS[call](named, score, shape, seed=4, dtype=dtype))
    assert not torch.equal(CALLS[call](named, score, shape), CALLS[call](named, score, shape))


@pytest.mark.parametrize("call", CALLS)
def test_standard_deviation_on_gaussian_data(named, call):
    """sample std against the exact one, 6 standard errors (p < 2e-9) and 1.5 % for the discretisation."""
    n, std = 20_000, 0.8
    score = gaussian_score(named, std)
    if call == "pc_sample":
        x = pc_sample(named, score, (n,), steps=300, seed=0, denoise=False)
    elif call == "ode_sample":
        x = ode_sample(named, score, (n,), seed=0, denoise=False)
    else:
        x = sample(named, score, (n,), seed=0, denoise=False)
    exact = float((named.alpha(named.t_min) ** 2 * std**2 + named.sigma(named.t_min) ** 2).sqrt())
    assert abs(float(x.std()) / exact - 1) < 6 / math.sqrt(2 * n) + 0.015
    assert abs(float(x.mean())) < 6 * exact / math.sqrt(n)


@pytest.mark.parametrize("name", SAMPLERS)
def test_nothing_is_written_over_that_somebody_may_hold(named, name):
    """A rule may use its own predictions' memory again: not what the network was given or returned, the start, the
    states that a callback saw, nor the trajectory. What a score writes over its own last result is not taken for old.
    """
    score, seen = gaussian_score(named, 0.5), []

    def keep(*tensors):
        seen.extend((y, y.clone()) for y in tensors)

    def keeping(x, t):
        out = score(x, t)
        keep(x, out)
        return out

    buffer = torch.empty(4, 3)
    row, x = SAMPLERS[name], named.prior_sample((4, 3), seed=0)
    grid = make_grid(named, row.grid, 12)
    keep(x)
    options = {"noise": Noise(x, seed=1), "keep": 5, "denoise": True}
    out = solve(named.reverse(keeping, row.churn), x, grid, row.rule, callback=lambda k, s, x: keep(x), **options)
    assert len(seen) > 30
    for now, then in seen:
        assert torch.equal(now, then)
    assert torch.equal(out.trajectory.x[0], x)
    again = solve(named.reverse(lambda x, t: buffer.copy_(score(x, t)), row.churn), x, grid, row.rule, **options)
    assert torch.equal(again.x, out.x)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("last", [False, True])
def test_x_keeps_its_layout_whatever_the_scores(named, name, last):
    """A network of channels last for contiguous images, and the other way round: it may rely on x.view."""
    score, seen = gaussian_score(named, 0.5), set()
    layouts = [torch.contiguous_format, torch.channels_last]
    x = named.prior_sample((2, 3, 4, 5), seed=0).contiguous(memory_format=layouts[last])

    def other(x, t):
        seen.add(x.stride())
        return score(x, t).contiguous(memory_format=layouts[not last])

    row = SAMPLERS[name]
    grid = make_grid(named, row.grid, 8)
    out = solve(named.reverse(other, row.churn), x, grid, row.rule, noise=Noise(x, seed=1), denoise=True).x
    same = solve(named.reverse(score, row.churn), x, grid, row.rule, noise=Noise(x, seed=1), denoise=True).x
    assert seen == {x.stride()}
    assert torch.equal(out, same)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_is_the_same_alone_and_in_any_batch(named, name):
    """PITFALLS 12, 23: for every sampler; alone, permuted, in chunks, and with a given start."""
    score = gaussian_score(named, 0.5)
    whole = sample(named, score, (6, 2, 3), name, steps=12, seed=7)
    for ids in ([0], [4], [5, 2, 0], [0, 1, 2], [3, 4, 5]):
        assert torch.equal(sample(named, score, (len(ids), 2, 3), name, steps=12, seed=7, ids=ids), whole[ids])
    x_T = named.prior_sample((6, 2, 3), seed=9)
    whole = sample(named, score, (6, 2, 3), name, steps=12, seed=7, x_T=x_T)
    assert torch.equal(sample(named, score, (1, 2, 3), name, steps=12, seed=7, x_T=x_T[3:4], ids=[3])[0], whole[3])


@pytest.mark.parametrize("name", ["euler_maruyama", "reverse_diffusion", "ancestral", "heun_sde", "pc", "ddim", "rk4"])
def test_a_run_is_taken_up_again_in_the_middle(named, name):
    """A rule without a history goes on from a state that was kept, with the noise that it would have had."""
    row, score = SAMPLERS[name], gaussian_score(named, 0.5)
    system, grid = named.reverse(score, row.churn), make_grid(named, "karras", 12)
    x_T = named.prior_sample((3, 2), seed=9)
    whole = solve(system, x_T, grid, row.rule, noise=Noise(x_T, 7), keep=13).trajectory.x
    part = solve(system, whole[5], grid[5:], row.rule, noise=Noise(x_T, 7)).x
    assert torch.equal(part, whole[-1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_nfe_is_a_hard_budget(named, name):
    """Never exceeded, and as many steps as fit are taken; the final denoising counts."""
    calls = []

    def score(x, t):
        calls.append(t)
        return gaussian_score(named)(x, t)

    per_step, extra = SAMPLERS[name].rule.evaluations, SAMPLERS[name].rule.extra
    least = per_step + extra + 1
    for nfe in (least, least + 4, least + 17):
        calls.clear()
        sample(named, score, (2,), name, nfe=nfe, seed=0)
        assert nfe - per_step < len(calls) <= nfe
        calls.clear()
        sample(named, score, (2,), name, nfe=nfe, denoise=False, seed=0)
        assert nfe - per_step < len(calls) <= nfe
    with pytest.raises(ValueError, match=f"nfe must be at least {least}, one step of this sampler and"):
        sample(named, score, (2,), name, nfe=least - 1, seed=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_work_everywhere(sde, name, steps):
    """PITFALL 9: the last step does something, at every step count."""
    seen = []
    x = sample(sde, gaussian_score(sde, 0.5), (4,), name, steps=steps, seed=0, denoise=False,
               callback=lambda k, t, x: seen.append(x))  # fmt: skip
    assert torch.isfinite(x).all()
    assert len(seen) == steps
    if steps > 1:
        assert not torch.equal(seen[-1], seen[-2])


def test_denoise_removes_the_last_noise(sde):
    """PITFALL 17: for data that are one point, denoising on gives the point; off leaves sigma(t_min)."""
    point = torch.tensor([[[1.0]]])
    mixture = GaussianMixture(point[0] * 0.7, point * 1e-12)
    n = 4000
    noisy, clean = (
        sample(sde, mixture.score(sde), (n, 1), "euler_maruyama", steps=400, grid="log_snr", seed=0,
               dtype=torch.float64, denoise=denoise)
        for denoise in (False, True)
    )  # fmt: skip
    assert float((clean - 0.7).abs().max()) < 1e-4
    std = float(sde.sigma(sde.t_min))
    assert abs(float((noisy - 0.7 * float(sde.alpha(sde.t_min))).std()) / std - 1) < 6 / math.sqrt(2 * n) + 0.03


def test_samplers_come_by_name_row_and_rule():
    sde, score = VPSDE(), gaussian_score(VPSDE())
    a = sample(sde, score, (3, 2), "ddim", steps=9, seed=1)
    assert torch.equal(a, sample(sde, score, (3, 2), SAMPLERS["ddim"], steps=9, seed=1))
    b = sample(sde, score, (3, 2), RULES["ddim"], steps=9, grid=SAMPLERS["ddim"].grid, seed=1)
    assert torch.equal(a, b)
    half = sample(sde, score, (3, 2), Sampler(ddim(eta=0.5), grid="karras"), steps=9, seed=1)
    assert not torch.equal(a, half)
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
        ddim(eta=1.5)


def test_pc_sample_is_the_row_pc():
    sde, score = VPSDE(), gaussian_score(VPSDE())
    a = pc_sample(sde, score, (3, 2), steps=9, seed=1)
    assert torch.equal(a, sample(sde, score, (3, 2), "pc", steps=9, seed=1))
    for predictor in ("reverse_diffusion", "ancestral", "euler_maruyama", "none"):
        for corrector in ("langevin", "none") if predictor != "none" else ("langevin",):
            x = pc_sample(sde, score, (3, 2), steps=9, predictor=predictor, corrector=corrector, seed=1)
            assert torch.isfinite(x).all()
    grid = torch.linspace(1.0, 0.01, 10)
    b = pc_sample(sde, score, (3, 2), grid=grid, seed=1)
    assert torch.equal(b, pc_sample(sde, score, (3, 2), steps=9, grid=grid, seed=1))


def test_annealed_langevin_ends_at_the_last_level():
    """Its last correction is at t_min, so that what it leaves is x at t_min, not at the level before."""
    sde, seen = NAMED["VE"](), []

    def score(x, t):
        seen.append(float(t))
        return gaussian_score(sde)(x, t)

    pc_sample(sde, score, (2,), steps=4, predictor="none", seed=0, denoise=False)
    assert seen == pytest.approx(make_grid(sde, "uniform", 4)[1:].tolist())


def test_a_given_grid_and_a_budget():
    sde, score = VPSDE(), gaussian_score(VPSDE())
    grid = torch.linspace(1.0, 0.01, 11)
    a = sample(sde, score, (2,), "ddim", grid=grid, seed=0)
    assert torch.equal(a, sample(sde, score, (2,), "ddim", grid=grid, nfe=20, seed=0))
    with pytest.raises(ValueError, match="grid has 10 steps, but nfe = 10 allows 9"):
        sample(sde, score, (2,), "ddim", grid=grid, nfe=10, seed=0)


def test_the_prior_is_that_of_the_grids_first_time(named):
    """PITFALL 1: a solver that starts below T draws sigma there, not sigma(T). 6 standard errors: p < 2e-9."""
    n, t = 20_000, 0.5 * named.T
    grid = torch.tensor([t, 0.4 * named.T], dtype=torch.float64)
    x = sample(named, gaussian_score(named), (n,), RULES["none"], grid=grid, seed=0, denoise=False)
    assert abs(float(x.std()) / float(named.sigma(t)) - 1) < 6 / math.sqrt(2 * n)


def test_default_steps_follow_the_noise():
    sde = VPSDE()
    for name, steps in (("ancestral", 1000), ("euler_maruyama", 1000), ("ddim", 50), ("dpmpp_2m", 50)):
        seen = []
        sample(sde, gaussian_score(sde), (1,), name, seed=0, callback=lambda k, t, x, seen=seen: seen.append(k))
        assert len(seen) == steps


def test_a_users_rule_is_a_predictor_and_a_sampler():
    """A bare rule runs on the flow; under Sampler(rule, churn=1) it is the row of the reverse SDE."""
    sde, score = VPSDE(), gaussian_score(VPSDE())
    rule = RULES["euler_maruyama"]
    assert torch.equal(
        pc_sample(sde, score, (3,), steps=9, predictor=rule, seed=1), pc_sample(sde, score, (3,), steps=9, seed=1)
    )
    row = sample(sde, score, (3,), Sampler(rule, churn=1.0), steps=9, seed=1)
    assert torch.equal(row, sample(sde, score, (3,), "euler_maruyama", steps=9, seed=1))
    flow = sample(sde, score, (3,), rule, steps=9, grid="quadratic", seed=1)
    assert torch.equal(flow, sample(sde, score, (3,), "euler", steps=9, grid="quadratic", seed=1))


def test_signatures_are_the_contract():
    for call, names in {
        pc_sample: "sde score shape steps predictor corrector corrector_steps snr grid denoise seed x_T device dtype "
        "progress callback",
        ode_sample: "sde score shape method rtol atol denoise seed x_T device dtype progress callback",
        sample: "sde score shape sampler steps nfe grid denoise seed x_T device dtype progress callback",
    }.items():
        assert list(inspect.signature(call).parameters)[: len(names.split())] == names.split()


BAD = {
    "steps 0": (sample, {"steps": 0}, "steps must be at least 1, got 0"),
    "steps -3": (sample, {"steps": -3}, "steps must be at least 1, got -3"),
    "steps 2.5": (sample, {"steps": 2.5}, "steps must be a whole number, got 2.5"),
    "steps True": (sample, {"steps": True}, "steps must be a whole number"),
    "steps and nfe": (sample, {"steps": 5, "nfe": 6}, "steps or nfe, not both"),
    "nfe 1": (sample, {"nfe": 1}, "nfe must be at least 2"),
    "nfe 2.5": (sample, {"nfe": 2.5}, "nfe must be a whole number"),
    "sampler": (sample, {"sampler": "dpmp_2m"}, "unknown sampler 'dpmp_2m': did you mean 'dpmpp_2m'"),
    "grid name": (sample, {"grid": "uniforn"}, "unknown grid 'uniforn': did you mean 'uniform'"),
    "grid increasing": (sample, {"grid": torch.tensor([0.1, 1.0])}, "grid must decrease strictly"),
    "grid outside": (sample, {"grid": torch.tensor([2.0, 1.0])}, "grid must lie in"),
    "empty shape": (sample, {"shape": ()}, r"shape must be \(B, \*event\)"),
    "zero in shape": (sample, {"shape": (4, 0)}, "every entry at least 1"),
    "shape no sequence": (sample, {"shape": 4}, "shape must be a sequence"),
    "x_T shape": (sample, {"x_T": torch.ones(3, 2)}, r"x_T must have the shape asked for, \(4, 2\), got \(3, 2\)"),
    "x_T integer": (sample, {"x_T": torch.ones(4, 2, dtype=torch.int32)}, "x_T must be a floating tensor"),
    "x_T NaN": (sample, {"x_T": torch.full((4, 2), math.nan)}, "x_T holds 8 non-finite values"),
    "dtype": (sample, {"dtype": torch.int64}, "dtype must be floating, got torch.int64"),
    "seed": (sample, {"seed": "a"}, "seed must be a whole number"),
    "ids": (sample, {"ids": [1]}, "ids must hold one number per sample"),
    "method": (ode_sample, {"method": "rk54"}, "unknown adaptive method 'rk54': did you mean 'rk45'"),
    "rtol": (ode_sample, {"rtol": -1.0}, "rtol must be a finite number > 0, got -1.0"),
    "atol": (ode_sample, {"atol": math.nan}, "atol must be a finite number > 0, got nan"),
    "predictor": (pc_sample, {"predictor": "euler_maryama"}, "did you mean 'euler_maruyama'"),
    "corrector": (pc_sample, {"corrector": "langvin"}, "unknown corrector 'langvin': did you mean 'langevin'"),
    "corrector_steps": (pc_sample, {"corrector_steps": 0}, "corrector_steps must be at least 1"),
    "nothing": (pc_sample, {"predictor": "none", "corrector": "none"}, "both 'none': nothing would move x"),
    "snr without a corrector": (pc_sample, {"snr": -0.1, "corrector": "none"}, "snr must be a finite number > 0"),
    "class": (sample, {"sde": VPSDE}, r"sde must be a process, not its class: VPSDE\(\)"),
    "snr": (pc_sample, {"snr": -0.1}, "snr must be a finite number > 0, got -0.1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, kwargs, message = BAD[case]
    sde = VPSDE()
    with pytest.raises((ValueError, TypeError), match=message):
        call(**{"sde": sde, "score": gaussian_score(sde), "shape": (4, 2), **kwargs})


@pytest.fixture(scope="module")
def grid25():
    g = oracle.grid25()
    return g, GaussianMixture(g.m, g.covs)


@pytest.mark.parametrize("call", ["pc", "ode"])
def test_25_modes(named, grid25, call):
    """4,000 samples: within-mode spread, mode weights, sliced W2.

    False alarms: a weight is off by .015 at 4.8 standard errors; the bounds on spread and W2 are far wider than
    their sampling error (1 % and a factor of two). The batch-mean Langevin step of PITFALL 12 in its per-sample
    form gives a spread of .105 and weights off by .10.
    """
    g, mixture = grid25
    n = 4000
    if call == "pc":
        x = pc_sample(named, mixture.score(named), (n, 2), steps=500, seed=1)
    else:
        x = ode_sample(named, mixture.score(named), (n, 2), rtol=1e-6, atol=1e-6, seed=1)
    x = x.double().numpy()
    nearest = ((x[:, None] - g.m) ** 2).sum(-1).argmin(1)
    spread = (x - g.m[nearest]).std()
    # E[x_0|x_t] at t_min has a little less spread than x_0 itself
    assert spread == pytest.approx(0.03, rel=0.10)
    assert np.abs(np.bincount(nearest, minlength=25) / n - 1 / 25).max() < 0.015
    rng = np.random.default_rng(0)
    a, b, c = (g.sample(n, rng) for _ in range(3))
    floor = np.mean([oracle.sliced_w2(a, b), oracle.sliced_w2(a, c), oracle.sliced_w2(b, c)])
    assert oracle.sliced_w2(x, a) < 2 * floor
