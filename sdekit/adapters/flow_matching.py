"""flow_matching (facebookresearch) and torchcfm (Tong et al. 2024): velocities whose time runs from noise to data.

Their convention: noise x_0 at t = 0, data x_1 at t = 1, x_t = alpha_t x_1 + sigma_t x_0, and the model says
d x_t/dt = alpha_t' x_1 + sigma_t' x_0, x_1 - x_0 for alpha_t = t and sigma_t = 1 - t ("CondOT"). In our letters x_1 is
x_0, x_0 is eps, their t is 1 - t, and the velocity changes its sign with it: alpha' x_0 + sigma' eps = -model.
Traps: the sign; the order of arguments, (x, t) there and (t, x) in torchcfm; torchcfm's MLP takes cat([x, t]).
Data and noise must be independent and the noise standard normal, or there is no score behind the velocity: with
minibatch optimal transport (torchcfm's ExactOptimalTransport...) ODE samplers and the likelihood still follow the
model's own flow, but samplers with noise do not have its marginals.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdekit import _checks
from sdekit.models.network import NetworkScore, as_score
from sdekit.processes.gaussian import RectifiedFlow
from sdekit.processes.sde import SDE
from sdekit.system import as_time

# order of arguments -> call
CALLS: dict[str, Callable[..., Any]] = {
    "keywords": lambda model, x, t, **kwargs: model(x=x, t=t, **kwargs),
    "xt": lambda model, x, t, *args, **kwargs: model(x, t, *args, **kwargs),
    "tx": lambda model, x, t, *args, **kwargs: model(t, x, *args, **kwargs),
    "cat": lambda model, x, t: model(torch.cat([x, t[:, None].to(x)], 1)),
}


def from_flow_matching(
    model: Callable[..., Any], scheduler: Any = None, *, order: str | None = None
) -> tuple[SDE, NetworkScore]:
    """(process, model) of a velocity: flow_matching's model(x=, t=, **extras) or torchcfm's model(t, x, ...).

    ``scheduler``: None or flow_matching's CondOTScheduler for RectifiedFlow(); another of its schedulers, or a path
    that has one, or any callable t -> (.alpha_t, .sigma_t) by torch operations.
    ``order``: "keywords" (x=, t=), "xt", "tx", or "cat" for model(cat([x, t], 1)); unless given, it is read from the
    names of the model's arguments. Conditions: ``score.given(...)``, by their names.

    Raises TypeError or ValueError for a model whose arguments do not tell the order, and for a scheduler that is none,
    or whose velocity vanishes where there is only noise (PolynomialConvexScheduler, n > 1), since it says nothing then.
    """
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"model must be a callable (x, t) -> velocity, got {model!r}")
    scheduler = getattr(scheduler, "scheduler", scheduler)
    straight = scheduler is None or type(scheduler).__name__ == "CondOTScheduler"
    sde: SDE = RectifiedFlow() if straight else Path(scheduler)
    if type(model).__name__ == "torch_wrapper" and order is None:  # torchcfm's, for times 0-d alone
        model, order = model.model, "cat"  # type: ignore[attr-defined]
    call = _order(model) if order is None else _checks.lookup({name: name for name in CALLS}, order, "order")
    return sde, as_score(_Velocity(model, call), sde, "flow", time=_their_time, output=torch.neg)


class Path(SDE):
    """The process of a scheduler  t -> alpha_t, sigma_t  with data at t = 1: alpha and sigma at 1 - t."""

    def __init__(self, scheduler: Any) -> None:
        try:
            ends = scheduler(torch.tensor([0.0, 1.0], dtype=torch.float64))
            alpha, sigma = torch.stack([ends.alpha_t, ends.sigma_t]).tolist()
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise TypeError(
                "scheduler must be one of flow_matching's, or a callable t -> (.alpha_t, .sigma_t), got "
                f"{type(scheduler).__name__}: {error}"
            ) from error
        self.scheduler, name = scheduler, type(scheduler).__name__
        if alpha[0] >= alpha[1] or sigma[0] <= sigma[1]:
            raise ValueError(
                f"scheduler {name} must go from noise at t = 0 to data at t = 1: alpha {alpha}, sigma {sigma}"
            )
        a, s, da, ds2 = (float(y) for y in self._differentiate(as_time(self.T, self.T)))
        d = a * ds2 / (2 * s) - s * da  # x_0 follows from the velocity by 1 over this
        if not 1e-3 < abs(d) < math.inf:
            raise ValueError(
                f"scheduler {name} has no velocity at t = 0, or an infinite one, which says nothing of x_0; take "
                "CondOTScheduler, CosineScheduler, VPScheduler or LinearVPScheduler"
            )

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_{1 - t}."""
        return self.scheduler(1 - t).alpha_t

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_{1 - t}."""
        return self.scheduler(1 - t).sigma_t


def _their_time(t: Tensor) -> Tensor:
    return 1 - t


class _Velocity(nn.Module):
    def __init__(self, model: Callable[..., Any], order: str) -> None:
        super().__init__()
        self.model, self.order = model, order

    def forward(self, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        return CALLS[self.order](self.model, x, t, *args, **kwargs)


def _order(model: Any) -> str:
    """How the names of its arguments say that a model is called."""
    try:
        names = list(inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters)
    except (TypeError, ValueError):
        names = []
    if {"x", "t"} <= set(names):
        return "keywords"
    raise ValueError(
        f"order cannot be read from the model's arguments ({', '.join(names)}): give order='xt' for model(x, t), 'tx' "
        "for model(t, x), 'cat' for model(cat([x, t], 1)), 'keywords' for model(x=x, t=t)"
    )
