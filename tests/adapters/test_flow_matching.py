"""Velocities from noise to data: the mixture's E[dx/dt|x], in the time and sign of flow_matching and torchcfm."""

import math
import pickle
import types

import pytest
import torch
from torch import nn

from sdekit import RectifiedFlow, log_likelihood, ode_sample
from sdekit.adapters.flow_matching import from_flow_matching
from tests.adapters.exact import EVENT, LABELS, MIXTURE, B, agrees, predictions, samples, state


def straight(t):
    """(alpha, sigma, alpha', sigma') of data at t = 1."""
    return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)


def cosine(t):
    s, c = torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t)
    return s, c, math.pi / 2 * c, -math.pi / 2 * s


def vp(t, low=0.1, high=20.0):
    u = 1 - t
    b, db = u**2 * (high - low) / 2 + u * low, -u * (high - low) - low
    alpha, sigma = torch.exp(-b / 2), torch.sqrt(-torch.expm1(-b))
    return alpha, sigma, -db / 2 * alpha, db / 2 * alpha**2 / sigma


def linear_vp(t):
    sigma = (1 - t**2).sqrt()
    return t, sigma, torch.ones_like(t), -t / sigma


def power(n):
    return lambda t: (t**n, 1 - t**n, n * t ** (n - 1), -n * t ** (n - 1))


def velocity(x, t, path=straight, labels=None):
    alpha, sigma, da, ds = (y.reshape(-1, 1, 1, 1) for y in path(t.double()))
    x0, eps = predictions(x, alpha.flatten(), sigma.flatten(), labels)
    return da * x0 + ds * eps


def scheduler(path):
    """A callable as flow_matching's schedulers are."""
    return lambda t: types.SimpleNamespace(**dict(zip(["alpha_t", "sigma_t"], path(t)[:2], strict=True)))


def levels(path):
    return lambda t: tuple(y.item() for y in path(torch.tensor(1 - t, dtype=torch.float64))[:2])


class Keywords(nn.Module):
    """As a network for flow_matching's ODESolver, which calls velocity_model(x=x, t=t, **extras)."""

    def __init__(self, path=straight):
        super().__init__()
        self.path = path

    def forward(self, x, t, label=None):
        return velocity(x, t, self.path, label)


class TimeFirst(nn.Module):
    """As torchcfm's UNetModelWrapper."""

    def forward(self, t, x, y=None, *args, **kwargs):
        assert t.shape == (len(x),)
        return velocity(x, t, labels=y)


class Flat(nn.Module):
    """As torchcfm's MLP(time_varying=True): state and time in one."""

    def forward(self, x):
        return velocity(x[:, :-1].reshape(-1, *EVENT), x[:, -1]).flatten(1)


class TorchWrapper(nn.Module):
    """As torchcfm's torch_wrapper, which takes 0-d times alone."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, t, x, *args, **kwargs):
        return self.model(torch.cat([x, t.repeat(x.shape[0])[:, None]], 1))


TorchWrapper.__name__ = "torch_wrapper"


@pytest.mark.parametrize("model", [Keywords(), TimeFirst(), lambda t, x: velocity(x, t)], ids=["xt", "tx", "function"])
def test_the_score_is_exact(model):
    sde, score = from_flow_matching(model)
    assert isinstance(sde, RectifiedFlow)
    agrees(sde, score, levels(straight), [0.01, 0.4, 0.99])
    for sampler in ("unipc_2", "flow_unipc_3", "heun"):
        samples(sde, score, sampler)


def test_arguments_without_names_are_called_in_the_order_given():
    for order, model in {"xt": lambda a, b: velocity(a, b), "tx": lambda a, b: velocity(b, a)}.items():
        agrees(*from_flow_matching(model, order=order), levels(straight), [0.4])
        with pytest.raises(ValueError, match=r"order cannot be read from the model's arguments \(a, b\)"):
            from_flow_matching(model)


@pytest.mark.parametrize(("model", "order"), [(Flat(), "cat"), (TorchWrapper(Flat()), None)], ids=["mlp", "wrapped"])
def test_state_and_time_in_one(model, order):
    sde, score = from_flow_matching(model, order=order)
    for t in (sde.t_min, 0.4, 1.0):
        x = state(1 - t, t)
        exact = -predictions(x, 1 - t, t)[1] / t
        assert float((score(x.flatten(1), t).reshape(x.shape) - exact).abs().max()) < 1e-10 * float(exact.abs().max())


@pytest.mark.parametrize("path", [straight, cosine, vp, linear_vp])
def test_other_schedulers(path):
    sde, score = from_flow_matching(Keywords(path), scheduler(path))
    agrees(sde, score, levels(path), [0.01, 0.4, 0.99])
    held = types.SimpleNamespace(scheduler=scheduler(path))  # a path of theirs
    samples(*from_flow_matching(Keywords(path), held))


def test_labels_follow_their_samples():
    sde, score = from_flow_matching(Keywords())
    agrees(sde, score.given(label=LABELS), levels(straight), [0.4], LABELS)
    agrees(sde, from_flow_matching(TimeFirst())[1].given(y=LABELS), levels(straight), [0.4], LABELS)


def test_likelihood_is_the_mixtures():
    sde, score = from_flow_matching(Keywords())
    x = state(1.0, 0.0)
    found = log_likelihood(sde, score, x, divergence="exact").log_prob
    assert float((found - MIXTURE.log_prob(x)).abs().max()) < 0.02


def test_it_is_pickled():
    model = from_flow_matching(pickle.loads(pickle.dumps(Keywords())))[1]
    x = state(0.5, 0.5)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x, 0.5), model(x, 0.5))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="unknown order 'x,t'"):
        from_flow_matching(Keywords(), order="x,t")
    with pytest.raises(TypeError, match="model must be a callable"):
        from_flow_matching(Keywords)
    with pytest.raises(TypeError, match="scheduler must be one of flow_matching's.*got str"):
        from_flow_matching(Keywords(), "cosine")
    for path in (power(2), power(0.5)):
        with pytest.raises(ValueError, match="has no velocity at t = 0, or an infinite one"):
            from_flow_matching(Keywords(path), scheduler(path))
    with pytest.raises(ValueError, match="must go from noise at t = 0 to data at t = 1"):
        from_flow_matching(Keywords(), scheduler(lambda t: straight(1 - t)))


NAMES = {"CondOTScheduler": straight, "CosineScheduler": cosine, "VPScheduler": vp, "LinearVPScheduler": linear_vp}


@pytest.mark.parametrize("name", NAMES)
def test_the_packages_own_schedulers_and_solver(name):
    """From the same noise, its ODESolver and ours arrive at the same samples."""
    schedulers = pytest.importorskip("flow_matching.path.scheduler")
    solvers, wrapper = pytest.importorskip("flow_matching.solver"), pytest.importorskip("flow_matching.utils")
    path = NAMES[name]
    model = type("Wrapped", (wrapper.ModelWrapper,), {})(Keywords(path))
    theirs = getattr(schedulers, name)()
    sde, score = from_flow_matching(model, theirs)
    agrees(sde, score, levels(path), [0.01, 0.4, 0.99])
    x_T = sde.prior_sample((B, *EVENT), seed=0, dtype=torch.float64)
    end = 1 - sde.t_min

    class EveryTime(wrapper.ModelWrapper):
        def forward(self, x, t, **extras):
            return self.model(x=x, t=t.expand(len(x)), **extras)

    solver = solvers.ODESolver(velocity_model=EveryTime(Keywords(path)))
    grid = torch.tensor([0.0, end], dtype=torch.float64)
    x = solver.sample(x_init=x_T, step_size=end / 500, method="rk4", time_grid=grid)  # dopri5 looks beyond the end
    ours = ode_sample(sde, score, x_T.shape, x_T=x_T, method="rk45", rtol=1e-8, atol=1e-8, denoise=False)
    assert float((x - ours).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="scheduler PolynomialConvexScheduler has no velocity at t = 0"):
        from_flow_matching(Keywords(power(2)), schedulers.PolynomialConvexScheduler(2))
