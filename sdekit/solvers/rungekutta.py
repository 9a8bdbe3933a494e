"""Embedded Runge-Kutta pairs for the adaptive loop."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdekit.solvers.adaptive import State
from sdekit.solvers.solution import rms
from sdekit.system import expand

# y' = rhs(y, t, run) for the samples of the batch that are still running: y (b, *event), t (b,), their indices run (b,)
Rhs = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Tableau:
    """An embedded pair whose last stage is the next step's first; error = sum_i e_i k_i."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    e: tuple[float, ...]
    order: int


# Dormand & Prince 1980; the pair of MATLAB's ode45 and SciPy's RK45. The last row of a is the order-5 step.
DORMAND_PRINCE = Tableau(
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    e=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=5,
)
# Bogacki & Shampine 1989; MATLAB's ode23 and SciPy's RK23.
BOGACKI_SHAMPINE = Tableau(
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    e=(5 / 72, -1 / 12, -1 / 9, 1 / 8),
    order=3,
)
TABLEAUS = {"rk45": DORMAND_PRINCE, "rk23": BOGACKI_SHAMPINE}


@dataclass
class RungeKutta:
    """A pair on  y' = rhs(y, t, run),  in t itself or (:class:`sdekit.solvers.frame.InFrame`) in a variable u.

    The error of a step is norm(error / (atol + rtol max(|y|, |y new|))), by default the RMS over the event.
    """

    rhs: Rhs
    rtol: float
    atol: float
    tableau: Tableau = DORMAND_PRINCE
    norm: Callable[[Tensor], Tensor] = rms

    safety = 0.9
    limits = (0.2, 10.0)

    @property
    def evaluations(self) -> int:
        """Of one attempt: the last stage is the next step's first."""
        return len(self.tableau.c) - 1

    def clock(self, t: Tensor) -> Tensor:
        """t itself."""
        return t

    def time(self, u: Tensor) -> Tensor:
        """u itself."""
        return u.clone()

    def step(self, u: Tensor, h: Tensor, direction: float) -> Tensor:
        """As wanted."""
        return h

    def start(self, y: Tensor, u: Tensor, ends: Tensor, run: Tensor) -> tuple[State, Tensor, int]:
        """The first slope, and a first step from one more, in the interval (Hairer, Norsett & Wanner 1993, II.4)."""
        k = self.rhs(y, u, run)
        scale = self.atol + self.rtol * y.abs()
        d0, d1 = self.norm(y / scale), self.norm(k / scale)
        span = (ends[1] - ends[0]).abs()
        direction = torch.sign(ends[1] - ends[0])
        small = (d0 < 1e-5) | (d1 < 1e-5)
        h0 = torch.where(small, 1e-6 * span, (0.01 * d0 / d1).to(u)).clamp_max(span)
        probe = (u + direction * h0).clamp(ends.min(), ends.max())  # u + span may lie a rounding beyond the end
        d2 = self.norm((self.rhs(y + expand(direction * h0, y) * k, probe, run) - k) / scale).to(u) / h0
        steepest = torch.maximum(d1.to(u), d2)
        flat = torch.maximum(1e-6 * span, h0 * 1e-3)
        h1 = torch.where(steepest <= 1e-15, flat, torch.exp((0.01 / steepest).log() / self.tableau.order))
        h = torch.minimum(100 * h0, h1).clamp_max(span)
        return (k,), torch.where(torch.isfinite(h), h, 1e-6 * span), 2  # not finite: rejected until it underflows

    def attempt(
        self, y: Tensor, u: Tensor, u_new: Tensor, state: State, run: Tensor
    ) -> tuple[Tensor, Tensor, float, State]:
        """One step of the higher order."""
        stages = [state[0]]
        step, y_new = expand(u_new - u, y), y
        for c, row in zip(self.tableau.c[1:], self.tableau.a[1:], strict=True):
            y_new = y + step * sum(a * k for a, k in zip(row, stages, strict=True) if a)
            stages.append(self.rhs(y_new, u_new if c == 1.0 else u + c * (u_new - u), run))
        error = step * sum(e * k for e, k in zip(self.tableau.e, stages, strict=True) if e)
        size = self.norm(error / (self.atol + self.rtol * torch.maximum(y.abs(), y_new.abs())))
        return y_new, size, float(self.tableau.order), (stages[-1],)
