"""Calibration: better than the grid it started from on noises it has not seen, on every kind of score and event."""

import dataclasses
import gc
import importlib
import json
import math
import pickle
import weakref

import numpy as np
import pytest
import torch

from sdekit import VPSDE, GaussianMixture, HeatODE, as_score, calibrate, load_calibration, sample
from sdekit.processes.counted import as_model
from sdekit.sampling.grids import make_grid
from tests import oracle
from tests.conftest import PROCESSES, gaussian_score


@pytest.fixture(scope="module")
def grid25():
    g = oracle.grid25()
    return g, GaussianMixture(g.m, g.covs)


def error_of(sde, score, sampler, x_T, ref, **kwargs):
    return oracle.error(sample(sde, score, x_T.shape, sampler, x_T=x_T, **kwargs).numpy(), ref)


@pytest.fixture(scope="module")
def fresh(digits64):
    """Noises that no calibration has seen, and where the exact flow takes them."""
    x_T = 80 * torch.randn(128, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1234))
    return x_T, digits64[0].flow(x_T.numpy(), 80.0, 0.0)


@pytest.mark.parametrize(("nfe", "bar"), [(5, 0.067), (6, 0.052), (8, 0.027), (20, 0.0030)])
def test_digits64_below_half_of_what_the_best_fixed_samplers_reach(digits64, fresh, nfe, bar):
    """The bars are half the best peer's error at that many evaluations; fresh noises, exact flow."""
    (_, mixture), (x_T, truth), sde = digits64, fresh, HeatODE()
    calibration = calibrate(sde, mixture.score(sde), (4, 64), nfe=nfe, seed=0)
    calls = []

    def counted(x, t):
        calls.append(t)
        return mixture.score(sde)(x, t)

    found = error_of(sde, counted, calibration, x_T, truth)
    assert len(calls) == nfe == calibration.nfe
    assert found < bar
    assert calibration.error < 0.6 * calibration.start_error
    assert found < 2 * calibration.error  # what it says of itself holds


@pytest.mark.parametrize(("nfe", "bar"), [(8, 0.004), (12, 0.002)])
def test_narrow_modes(grid25, nfe, bar):
    """A third and half of the best fixed row. Where additions are in units of x instead of the step: .013 and .005."""
    g, mixture = grid25
    sde = HeatODE()
    x_T = 80 * torch.randn(512, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1234))
    ref = g.flow(x_T.numpy(), 80.0, 0.0)
    calibration = calibrate(sde, mixture.score(sde), (4, 2), nfe=nfe, seed=2)
    assert error_of(sde, mixture.score(sde), calibration, x_T, ref) < bar


@pytest.mark.parametrize("name", PROCESSES)
def test_never_worse_than_its_start_whatever_process_and_event(name):
    sde = PROCESSES[name]()
    for event in ((), (2,), (2, 3, 1)):
        c = calibrate(sde, gaussian_score(sde, 0.5), (3, *event), nfe=4, seed=0, noises=16, iterations=8)
        assert c.error <= c.start_error
        assert sde.t_min <= c.times[-1] < c.times[0] <= sde.T
        x = sample(sde, gaussian_score(sde, 0.5), (3, *event), c, seed=1)
        assert x.shape == (3, *event)
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("nfe", [2, 3, 6, 9])
def test_the_table_before_the_fit_is_the_fixed_sampler(sde, nfe):
    """What is returned where no fit is better: the sampler of that name and grid, to rounding."""
    module = importlib.import_module("sdekit.sampling.calibrate")
    score = gaussian_score(sde, 0.5)
    for sampler in ("ipndm", "flow_3m", "unipc_2", "unipc_3", "dpmpp_3m", "v_3m", "deis"):
        table = module.FittedTable(sde, score, sampler, "karras", make_grid(sde, "karras", nfe - 1), slack=0.0)
        c = table.calibration(0.0, 0.0)
        fixed = sample(sde, score, (5, 2), c.sampler, grid=c.grid, nfe=nfe, seed=3, dtype=torch.float64)
        table = sample(sde, score, (5, 2), c, seed=3, dtype=torch.float64)
        torch.testing.assert_close(table, fixed, rtol=1e-7, atol=1e-9)


def test_a_score_without_gradient_gets_its_times(digits64):
    """A black box, here NumPy: Powell's COBYLA on the grid gains 11 to 16 % (three seeds)."""
    g, _ = digits64
    sde = HeatODE()

    def black_box(x, t):
        return torch.from_numpy(g.score(x.double().numpy(), float(t))).to(x)

    with pytest.warns(UserWarning, match="only the times are fitted"):
        c = calibrate(sde, black_box, (2, 64), nfe=5, seed=0, noises=16, iterations=80, sampler="ipndm")
    assert c.error < 0.95 * c.start_error


def test_networks_keep_their_gradients_and_the_global_generator(digits64):
    with torch.random.fork_rng():
        network = torch.nn.Linear(2, 2, dtype=torch.float32)
    with torch.no_grad():
        network.weight.copy_(torch.eye(2))
        network.bias.zero_()
    sde = VPSDE()
    score = as_score(lambda x, t: network(x) * (1 - t[:, None]), sde, predicts="eps")
    c = calibrate(sde, score, (3, 2), nfe=4, seed=0, noises=8, iterations=4)
    assert network.weight.grad is None
    assert c.nfe == 4


def test_inference_mode_changes_nothing():
    sde = VPSDE()
    arguments = {"nfe": 4, "seed": 0, "noises": 8, "iterations": 5}
    with torch.inference_mode():
        inside = calibrate(sde, gaussian_score(sde, 0.5), (3, 2), **arguments)
    assert inside == calibrate(sde, gaussian_score(sde, 0.5), (3, 2), **arguments)


def test_same_seed_same_calibration_and_files(tmp_path):
    sde = VPSDE()
    score = gaussian_score(sde, 0.5)
    a, b = (calibrate(sde, score, (3, 2), nfe=4, seed=0, noises=8, iterations=5) for _ in range(2))
    assert a == b
    a.save(tmp_path / "a.json")
    assert load_calibration(tmp_path / "a.json") == a
    assert (tmp_path / "a.json").stat().st_size < 5000


def test_bad_input_is_named(tmp_path):
    sde = VPSDE()
    score = gaussian_score(sde, 0.5)
    c = calibrate(sde, score, (3, 2), nfe=4, seed=0, noises=4, iterations=1)
    for other in (VPSDE(beta_max=19.0), HeatODE()):
        with pytest.raises(ValueError, match=r"calibration was made for another process .* than (VPSDE|HeatODE)"):
            sample(other, score, (3, 2), c)
    with pytest.raises(ValueError, match="leave steps and grid out"):
        sample(sde, score, (3, 2), c, grid="uniform")
    with pytest.raises(ValueError, match="leave steps and grid out"):
        sample(sde, score, (3, 2), c, steps=4)
    with pytest.raises(ValueError, match="nfe = 3 allows 2"):
        sample(sde, score, (3, 2), c, nfe=3)
    with pytest.raises(ValueError, match="another process"):
        sample(sde, score, (3, 2), dataclasses.replace(c, prior_std=0.5))
    with pytest.raises(TypeError, match="x_T must be a floating tensor"):
        sample(sde, score, (3, 2), c, x_T=torch.ones(3, 2, dtype=torch.int64))
    for arguments, message in (
        ({"nfe": 1}, "nfe must be at least 2"),
        ({"sampler": "ipndn"}, "unknown sampler 'ipndn': did you mean 'ipndm'"),
        ({"sampler": "heun"}, "'heun' cannot be calibrated: it is no multistep rule of the flow; take"),
        ({"sampler": "dpmpp_2m_sde"}, "cannot be calibrated"),
        ({"noises": 0}, "noises must be at least 2"),
        ({"batch": 2.5}, "batch must be a whole number"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            calibrate(sde, score, (3, 2), **{"nfe": 4, "noises": 4, "iterations": 1, **arguments})
    with pytest.raises(FloatingPointError, match="score returned NaN or infinite values at t"):
        calibrate(sde, lambda x, t: x * math.nan, (3, 2), nfe=4, noises=4)
    for content in ("", "[]", '{"sdekit_calibration": 2}', json.dumps({"sdekit_calibration": 1, "times": [1.0]})):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match="is not a calibration of sdekit"):
            load_calibration(tmp_path / "bad.json")
    c.save(tmp_path / "long.json")
    content = json.loads((tmp_path / "long.json").read_text())
    content["weights"][2] += [0.1, 0.1]  # of predictions that are not there yet
    (tmp_path / "long.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not a calibration of sdekit: incomplete"):
        load_calibration(tmp_path / "long.json")


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.filterwarnings("ignore:score carries no gradient")
def test_the_network_is_called_on_four_batches_at_most(gradient):
    """Whatever the number of noises: by the teacher, the choice of a start and the verdict; on one with gradient."""
    sde, sizes = VPSDE(), []
    score = gaussian_score(sde, 0.5)

    def counted(x, t):
        sizes.append((x.requires_grad, len(x)))
        return score(x, t) if gradient else score(x.detach(), t.detach())

    calibrate(sde, counted, (3, 2), nfe=4, seed=0, noises=20, batch=8, iterations=8)
    assert max(n for graph, n in sizes if graph) <= 8
    assert max(n for _, n in sizes) == 32


def test_graphs_are_kept_where_they_fit_and_made_again_elsewhere(monkeypatch):
    """With one result; a call more of every evaluation that the gradient goes through is the price."""
    module, sde, calls = importlib.import_module("sdekit.sampling.calibrate"), VPSDE(), []
    score = gaussian_score(sde, 0.5)

    def counted(x, t):
        calls.append(x.requires_grad or t.requires_grad)
        return score(x, t)

    found, counts = [], []
    for memory in (2**30, 0):
        monkeypatch.setattr(module, "_MEMORY", memory)
        calls.clear()
        found.append(calibrate(sde, counted, (3, 2), nfe=4, seed=0, noises=8, iterations=5))
        counts.append(sum(calls))
    assert found[0] == found[1]
    assert counts[0] == 3 + 5 * 4  # three looks at the graph before
    assert counts[1] == 3 + 2 * 5 * 4


def test_the_memory_of_a_graph_is_that_of_the_tensors_it_saves():
    """Those of one more evaluation: what all share, such as weights, is there once. And it is given back."""
    module = importlib.import_module("sdekit.sampling.calibrate")
    factor, saved, one = torch.ones(7, 3), [], 7 * 3 * 4

    def graph_bytes(score):
        noises = module.Noises(torch.zeros(7, 3), torch.arange(7), 7)
        return module._graph_bytes(as_model(score, VPSDE()), noises, torch.tensor(0.5).double())

    def exponential(x, t):
        out = (x * factor[: len(x)]).exp()
        saved.append(weakref.ref(out))
        return out + t.float()

    assert graph_bytes(lambda x, t: x * factor[: len(x)] + t) == 0
    assert graph_bytes(exponential) == one  # exp saves its result
    gc.collect()
    assert [graph() for graph in saved] == [None] * 3
    assert graph_bytes(lambda x, t: (x * factor[: len(x)]) * t.float()) >= one  # for the way through t
    assert graph_bytes(lambda x, t: x) is None


def test_a_score_by_torch_func_is_fitted_too():
    """It bears none of the hooks that making graphs again takes."""
    sde, mixture = VPSDE(), GaussianMixture(torch.zeros(1, 2), 0.25 * torch.eye(2)[None])
    by_func = torch.func.grad(lambda x, t: mixture.at(sde, t).log_prob(x).sum())
    arguments = {"nfe": 4, "seed": 0, "noises": 8, "iterations": 5, "dtype": torch.float64}
    a, b = (calibrate(sde, score, (3, 2), **arguments) for score in (by_func, mixture.score(sde)))
    np.testing.assert_allclose(a.times, b.times, rtol=1e-9)
    np.testing.assert_allclose(a.error, b.error, rtol=1e-6)


def test_x_T_is_a_draw_at_T():
    """Given and drawn starts are the same: the scale to the first time is the calibration's business."""
    sde = VPSDE()
    score = gaussian_score(sde, 0.5)
    c = calibrate(sde, score, (3, 2), nfe=4, seed=0, noises=8, iterations=20)
    x_T = sde.prior_sample((4, 2), seed=5)
    given, drawn = sample(sde, score, (4, 2), c, x_T=x_T), sample(sde, score, (4, 2), c, seed=5)
    np.testing.assert_allclose(given.numpy(), drawn.numpy(), rtol=1e-4, atol=1e-6)


def test_a_calibration_pickles_after_use():
    sde = VPSDE()
    made = calibrate(sde, gaussian_score(sde, 0.5), (2, 2), nfe=3, noises=8, iterations=2, seed=0)
    x = sample(sde, gaussian_score(sde, 0.5), (2, 2), made, seed=0)
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert torch.equal(sample(sde, gaussian_score(sde, 0.5), (2, 2), again, seed=0), x)


@pytest.mark.parametrize("nfe", [2, 5, 9])
@pytest.mark.parametrize("sampler", ["flow_3m", "v_3m", "flow_unipc_3", "unipc_3", "dpmpp_3m", "ipndm"])
def test_a_grid_from_below_T_has_its_analytic_step_in_the_first_row(sde, sampler, nfe):
    """Before the fit it is the sampler on that grid."""

    def gaussian(x, t, var=0.25):  # E[x_0|x] of N(0.3, var)
        a, s = (f(t).reshape(-1, *(1,) * (x.ndim - 1)) for f in (sde.alpha, sde.sigma))
        return 0.3 + var * a * (x - 0.3 * a) / (a**2 * var + s**2)

    module = importlib.import_module("sdekit.sampling.calibrate")
    x_T = sde.prior_sample((5, 2), seed=3, dtype=torch.float64)
    for predict, near in ((lambda x, t: torch.full_like(x, 0.7), 1e-12), (gaussian, 1e-11)):
        for grid in ("inner_quadratic", "inner_cubic"):
            score = as_score(predict, sde, "x0")
            table = module.FittedTable(sde, score, sampler, grid, make_grid(sde, grid, nfe - 1), slack=0.0)
            c = table.calibration(0.0, 0.0)
            fixed = sample(sde, score, (5, 2), sampler, grid=grid, nfe=nfe, x_T=x_T)
            assert c.times[0] < sde.T
            assert float((sample(sde, score, (5, 2), c, x_T=x_T) - fixed).abs().max()) < near
            assert float((table(x_T).detach() - sample(sde, score, (5, 2), c, x_T=x_T)).abs().max()) < 1e-12


def test_few_evaluations_of_a_network_start_below_T():
    """An error of eps counts sigma/alpha times in x_0: nothing is asked at T, where rows of eps too start no grid."""
    from sdekit.sampling.grids import INNER

    module, sde = importlib.import_module("sdekit.sampling.calibrate"), VPSDE()
    exact = GaussianMixture([[1.0, 0.0], [-0.5, 0.5]], [0.1 * np.eye(2)] * 2).score(sde)

    def eps(x, t):  # a network's, with its errors
        return -sde.sigma(t).reshape(-1, 1) * exact(x, t) + 0.03 * torch.sin(3 * x)

    score = as_score(eps, sde, "eps")
    c = calibrate(sde, score, (3, 2), nfe=4, seed=0, noises=32, iterations=20)
    assert c.grid in INNER
    assert c.error < c.start_error
    of_eps = calibrate(sde, score, (3, 2), nfe=4, seed=0, noises=32, iterations=1, sampler="ipndm")
    assert of_eps.grid not in INNER
    from_T = sample(sde, score, (64, 2), c.sampler, grid="vp_cubic", nfe=4, seed=1)
    flow = sample(sde, score, (64, 2), "unipc_3", grid="inner_cubic", steps=300, seed=1)
    errors = [float((x - flow).square().mean().sqrt()) for x in (sample(sde, score, (64, 2), c, seed=1), from_T)]
    assert errors[0] < 0.5 * errors[1]
    for name, sound in (("flow_3m", True), ("v_3m", True), ("unipc_2", True), ("ipndm", False), ("deis", False)):
        assert module._sound(sde, score, name, "inner_cubic", 4) is sound
