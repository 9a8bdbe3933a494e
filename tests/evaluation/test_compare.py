"""compare: errors to the flow, evaluations counted, budgets kept, and what is left out said."""

import json
import math
import time

import pytest
import torch
from sdekit.guidance import autoguidance

from sdekit import (
    SAMPLERS,
    VPSDE,
    BridgeSDE,
    GaussianMixture,
    PointSet,
    PoissonFlow,
    RectifiedFlow,
    as_score,
    calibrate,
    compare,
    ode_sample,
    sample,
)
from sdekit.evaluation.comparison import Entry
from sdekit.evaluation.metrics import frechet_distance, sliced_wasserstein
from sdekit.sampling.calibrate import price
from sdekit.solvers.steppers import RULES

VP = VPSDE()
LAW = GaussianMixture([[1.0, 0.5], [-1.0, 0.0]], [[[0.05, 0.02], [0.02, 0.04]], [[0.1, 0.0], [0.0, 0.02]]])
SCORE = LAW.score(VP)


def compared(score=SCORE, sde=VP, shape=(24, 2), nfe=(3, 6), **options):
    return compare(sde, score, shape, nfe=nfe, progress=False, seconds=options.pop("seconds", 600.0), **options)


@pytest.fixture(scope="module")
def found():
    return compared()


def entry(comparison, name, nfe=6):
    return next(e for e in comparison.entries if (e.sampler, e.nfe) == (name, nfe))


def test_errors_are_those_to_the_exact_flow(found):
    """To an adaptive solver's, at a tolerance far below what any row leaves."""
    x_T = VP.prior_sample((24, 2), seed=0)
    flow = ode_sample(VP, SCORE, (24, 2), x_T=x_T, rtol=1e-6, atol=1e-6)
    for name in ("unipc_2", "ddim", "heun", "flow_3m"):
        x = sample(VP, SCORE, (24, 2), name, nfe=6, x_T=x_T)
        off = (x - flow).square().mean(1).sqrt()
        e = entry(found, name)
        assert e.error == pytest.approx(float(off.mean()), rel=0.02, abs=2e-4)
        assert e.spread == pytest.approx(float(off.std()) / 24**0.5, rel=0.05, abs=1e-4)
    assert found.reference < 1e-4


def test_distances_are_those_of_laws(found):
    other = sample(VP, SCORE, (24, 2), steps=150, seed=1)
    assert found.floor == pytest.approx(
        sliced_wasserstein(sample(VP, SCORE, (24, 2), steps=300, seed=0), other), rel=0.02
    )
    x = sample(VP, SCORE, (24, 2), "sa_solver", nfe=6, seed=2)
    e = entry(found, "sa_solver")
    assert math.isnan(e.error)
    assert e.distance == pytest.approx(sliced_wasserstein(x, other), rel=1e-3)
    exact = [LAW.sample(4000, seed=seed) for seed in (0, 1)]
    assert sliced_wasserstein(*exact) < 0.05
    assert sliced_wasserstein(exact[0], exact[1] + 1) == pytest.approx(1, abs=0.1)  # a shift of length sqrt(2), in 2-d
    with pytest.raises(ValueError, match="a and b must be of one shape"):
        sliced_wasserstein(exact[0], exact[1][:10])
    features = compared(nfe=(4,), features=lambda x: x**2)
    x = sample(VP, SCORE, (24, 2), "sa_solver", nfe=4, seed=2)
    assert entry(features, "sa_solver", 4).distance == pytest.approx(frechet_distance(x**2, other**2), rel=1e-3)
    assert "Fréchet" in features.settings["distance"]


def test_all_rows_are_there_within_their_budgets(found):
    rows = {e.sampler for e in found.entries if e.nfe == 6}
    assert rows | set(found.refused) >= {
        name for name, row in SAMPLERS.items() if row.rule.evaluations + row.rule.extra + 1 <= 6
    }
    assert all(0 < e.evaluations <= e.nfe for e in found.entries if e.nfe)
    assert entry(found, "ddim").evaluations == 6
    assert entry(found, "heun").evaluations == 5  # two steps of two, and the last denoising
    assert {e.sampler for e in found.entries if e.nfe is None} == {"adams", "flow_rk45", "rk45"}
    errors = [e.error for e in found.entries if e.sampler == "adams"]
    assert errors == sorted(errors, reverse=True)
    assert found.left_out == ()


def test_best_is_the_least_of_the_table(found):
    for nfe in (3, 6):
        least = min((e for e in found.entries if e.nfe and e.nfe <= nfe and e.error == e.error), key=lambda e: e.error)
        assert found.best(nfe) == least.sampler
        assert f"{least.sampler} in {nfe}" in str(found)
        assert f"**{least.error:.3g}**" in found.table()
    noisy = min((e for e in found.entries if e.nfe and e.error != e.error), key=lambda e: e.distance)
    assert found.best(6, noise=True) == noisy.sampler
    with pytest.raises(ValueError, match=r"nothing was measured within nfe = 2; budgets are \[3, 6\]"):
        found.best(2)


def test_calls_are_counted_at_the_network():
    """A network that counts; guidance of two; a closure of two networks, which nobody was told of."""
    asked = [0]

    def network(x, t):
        asked[0] += 1
        return SCORE.output(x.double(), t.double()).to(x)

    one = as_score(network, VP, "v")
    guided = compared(autoguidance(one, SCORE, 1.5), nfe=(6,))
    assert {e.evaluations for e in guided.entries if e.sampler == "ddim"} == {6.0}
    assert entry(guided, "heun").evaluations == 6

    def closure(x, t):
        return 0.5 * one(x, t) + 0.5 * one(x, t)

    both = compared(closure, nfe=(6,), samplers={"mine": "ddim"})
    assert entry(both, "ddim").evaluations == entry(both, "mine").evaluations == 6
    counted = compared(one, nfe=(7,))
    for name in ("ipndm", "heun", "dpm_solver_3", "sa_solver"):
        asked[0] = 0
        sample(VP, one, (24, 2), name, nfe=7, seed=0)
        assert entry(counted, name, 7).evaluations == asked[0]


def test_rules_and_calibrations_of_one_s_own():
    fitted = calibrate(VP, SCORE, (4, 2), nfe=4, noises=16, iterations=2, batch=8, seed=0)
    own = {"mine": RULES["heun"], "four": fitted, "noisy": SAMPLERS["sa_solver"]}
    found = compared(nfe=(6, 3, 6), samplers=own)
    assert [e.nfe for e in found.entries if e.sampler == "four"] == [6]  # once, where it fits
    assert entry(found, "four").evaluations == 4
    x_T = VP.prior_sample((24, 2), seed=0)
    exact = ode_sample(VP, SCORE, (24, 2), x_T=x_T, rtol=1e-6, atol=1e-6)
    off = (sample(VP, SCORE, (24, 2), fitted, x_T=x_T) - exact).square().mean(1).sqrt().mean()
    assert entry(found, "four").error == pytest.approx(float(off), rel=0.02)
    assert [e.nfe for e in found.entries if e.sampler == "mine"] == [3, 6]
    assert math.isnan(entry(found, "noisy").error)
    assert "no budget is as large" in compared(nfe=(3,), samplers={"four": fitted}).refused["four"]
    with pytest.raises(ValueError, match="samplers: 'ddim' is the name of one"):
        compared(samplers={"ddim": "heun"})


def test_what_does_not_take_the_process_is_left_out_and_said():
    flow = RectifiedFlow()
    found = compared(LAW.score(flow), flow, nfe=(2, 6))
    assert "no finite drift" in found.refused["euler_maruyama"]
    assert "euler_maruyama is left out: " in str(found)
    assert found.best(6)
    poisson, points = PoissonFlow(8.0), PointSet(LAW.sample(50, seed=0))
    found = compared(points.score(poisson), poisson, nfe=(6,))
    assert "no reverse SDE" in found.refused["sa_solver"]
    assert not any(math.isnan(e.error) for e in found.entries)


def test_a_row_that_fails_does_not_end_the_others():
    """Of a network that is NaN where none but edm's noise leads."""
    found = compared(lambda x, t: torch.where(x.abs() > 50, torch.nan, SCORE(x, t)), nfe=(3,))
    assert "NaN or infinite" in found.refused["edm"]
    assert found.best(3)
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        compared(lambda x, t: torch.nan * x)


def test_time_is_kept():
    def slow(x, t):
        time.sleep(0.002)
        return SCORE(x, t)

    start = time.perf_counter()
    found = compared(slow, shape=(64, 2), nfe=(6, 10), seconds=0.2)
    assert time.perf_counter() - start < 10
    assert found.settings["samples"] == 8
    assert "ddim in 10" in found.left_out
    assert "raise seconds=" in str(found)
    assert all(seconds > 0 for _, seconds in found.prices.values())
    assert found.section().rows == []
    with pytest.raises(ValueError, match="nothing was measured: give compare more seconds"):
        found.figure("a.png")


def test_one_sample_and_no_error_at_all():
    one = compared(shape=(1, 2), nfe=(6,))
    assert entry(one, "ddim").error > 0
    assert math.isnan(one.floor)
    assert "nan" not in str(one)
    still = compared(as_score(lambda x, t: 0 * x, VP, "x0"), nfe=(3,))  # data that are 0: all rows are exact
    assert still.best(3)
    assert still.table()


def test_conditions_and_a_y_of_each_sample_follow_them():
    y = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    bridge, at_0 = BridgeSDE(y), BridgeSDE(torch.zeros(2))
    score = as_score(
        lambda x, t, y: LAW.score(at_0).output((x - t[:, None] * y).double(), t.double()).to(x), bridge, "v"
    )
    assert compared(score.given(y), bridge, nfe=(6,)).reference < 1e-3


def test_the_same_seed_is_the_same_comparison(found):
    again = compared()
    assert str(again.entries) == str(found.entries)
    assert str(compared(seed=1).entries) != str(found.entries)
    with torch.inference_mode():
        assert str(compared().entries) == str(found.entries)


def test_json_page_and_figure(found, tmp_path):
    pytest.importorskip("matplotlib")
    found.save(tmp_path / "c.json")
    read = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))
    kept = tuple(Entry(*(math.nan if v is None else v for v in e.values())) for e in read["entries"])
    assert [(e.sampler, e.evaluations) for e in kept] == [(e.sampler, e.evaluations) for e in found.entries]
    named = {e.sampler: e._replace(nfe=None if e.nfe != e.nfe else e.nfe) for e in kept}
    assert named["ddim"].nfe == 6
    assert read["settings"]["samples"] == 24
    found.save(tmp_path / "c.html")
    assert "compare: samplers on this model" in (tmp_path / "c.html").read_text(encoding="utf-8")
    for name in ("f.png", "f.svg"):
        found.figure(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(ValueError, match="ending of the figure's path"):
        found.figure(tmp_path / "f.gif")


@pytest.mark.parametrize(("nfe", "noises", "iterations", "batch"), [(4, 64, 20, 16), (6, 32, 10, 8)])
def test_the_price_of_a_calibration_is_what_it_takes(nfe, noises, iterations, batch):
    made = [0]

    def network(x, t):
        made[0] += len(x)
        out = SCORE.output(x.double(), t.double()).to(x)
        if out.requires_grad:
            out.register_hook(lambda g: made.__setitem__(0, made[0] + 2 * len(g)))
        return out

    score = as_score(network, VP, "v")
    calibrate(VP, score, (4, 2), nfe=nfe, noises=noises, iterations=iterations, batch=batch, seed=0)
    assert price(nfe, noises, iterations, batch) == pytest.approx(made[0], rel=0.1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"nfe": 6}, ValueError, r"nfe must be budgets, one at least, such as \(6, 10\), got 6"),
        ({"nfe": ()}, ValueError, "nfe must be budgets"),
        ({"nfe": (1, 6)}, ValueError, "nfe must be at least 2"),
        ({"nfe": (2.5,)}, TypeError, "nfe must be a whole number"),
        ({"shape": 3}, TypeError, "shape must be a sequence"),
        ({"seconds": 0.0}, ValueError, "seconds must be a finite number > 0"),
        ({"samplers": {"a": "nosuch"}}, ValueError, "unknown sampler 'nosuch'"),
        ({"sde": VPSDE}, TypeError, "not its class"),
        ({"score": 3}, TypeError, "score must be a callable"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        compared(**options)
