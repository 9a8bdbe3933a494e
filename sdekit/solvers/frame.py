"""The probability flow where its linear part is exact: a scaled state in a bounded variable."""

from typing import Any

import torch
from torch import Tensor

from sdekit.processes.counted import Moment
from sdekit.processes.inverse import Inverse
from sdekit.processes.kinds import Kind
from sdekit.processes.reverse import Reverse, batch_time
from sdekit.processes.sde import SDE
from sdekit.system import Levels, expand


class FlowFrame:
    """The probability flow as the rectified flow that every process is when x and time are scaled:

    y = x/(alpha + sigma) = (1 - u) x_0 + u eps,  u = sigma/(alpha + sigma),  dy/du = E[eps - x_0 | x].

    What the flow has of alpha, sigma and linear terms is exact, and y and u are bounded, whatever the highest level,
    alpha(T) = 0 included. From a network that predicts eps or a score the velocity loses digits like eps/alpha(T) in
    float32: below alpha(T) = 1e-5 use float64. Liu et al. 2023. Raises TypeError for a system that has no score.
    """

    def __init__(self, system: Any) -> None:
        if getattr(type(system), "drift", None) is not Reverse.drift and isinstance(system, Reverse):
            raise TypeError(
                f"{type(system).__name__} has a drift of its own, which the flow's frame (adams, flow_rk45, flow_rk23) "
                "does not know; use rk45 or a rule such as heun"
            )
        self.system = system

    def clock(self, t: Tensor) -> Tensor:
        """u at the times t, of which the ends are remembered."""
        self._first, self._last = float(t.min()), float(t.max())
        lv = self.system.levels(t.cpu())
        self._lam = float(lv.lam.min()), float(lv.lam.max())
        sde = self.system.sde
        plain = getattr(type(sde), "inverse_half_log_snr", None) is SDE.inverse_half_log_snr
        self._time_of = Inverse(sde) if plain else sde.inverse_half_log_snr
        return lv.sigma / (lv.alpha + lv.sigma)

    def time(self, u: Tensor) -> Tensor:
        """t of u, never a rounding beyond the ends; on the CPU."""
        lam = torch.log((1 - u) / u).cpu().clamp(*self._lam)  # 1 - u has few digits left where alpha is small
        return self._time_of(lam).clamp(self._first, self._last)

    def levels(self, u: Tensor) -> Levels:
        """The process at u."""
        return self.system.levels(self.time(u))

    def scale(self, u: Tensor) -> Tensor:
        """alpha + sigma, by which y is x divided."""
        lv = self.levels(u)
        return lv.alpha + lv.sigma

    def velocity(self, y: Tensor, u: Tensor, run: Tensor) -> Tensor:
        """dy/du; one evaluation."""
        lv = self.levels(u)
        x = y * expand(lv.alpha + lv.sigma, y)
        a, b = self.linear(lv)
        return expand(a, x) * self.system.model(x, moment(lv, x)) + expand(b, x) * x

    def linear(self, lv: Levels) -> tuple[Tensor, Tensor]:
        """(a, b) of dy/du = a output + b x, with what the model says for output."""
        one = torch.ones_like(lv.alpha)
        return self.system.express(Kind(-one, one), lv)


def moment(lv: Levels, x: Tensor) -> Moment:
    """What a model is given at per-sample levels."""
    return Moment(batch_time(lv.time, x), None, None, None)


class InFrame:
    """A method for y in u as one for x in t: :func:`sdekit.solvers.adaptive.adaptive`'s. Errors and tolerances are
    those of y, which at the data is x.
    """

    def __init__(self, frame: FlowFrame, method: Any) -> None:
        self.frame, self.method = frame, method
        self.clock, self.time, self.step = frame.clock, frame.time, method.step
        self.safety, self.limits = method.safety, method.limits

    @property
    def evaluations(self) -> int:
        """The method's."""
        return int(self.method.evaluations)

    def start(self, x: Tensor, u: Tensor, ends: Tensor, run: Tensor) -> Any:
        """The method's, from y."""
        return self.method.start(x / expand(self.frame.scale(u), x), u, ends, run)

    def attempt(self, x: Tensor, u: Tensor, u_new: Tensor, state: Any, run: Tensor) -> Any:
        """The method's, from y and back."""
        y, *rest = self.method.attempt(x / expand(self.frame.scale(u), x), u, u_new, state, run)
        return y * expand(self.frame.scale(u_new), x), *rest
