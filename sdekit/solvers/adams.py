"""A variable-step Adams method for the adaptive loop: one evaluation a step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdekit.solvers.adaptive import State
from sdekit.solvers.rungekutta import Rhs
from sdekit.solvers.solution import rms
from sdekit.solvers.steppers.exponential import FAR, QUADRATURE, interpolate
from sdekit.system import expand

_ORDER = 3
_POINTS, _WEIGHTS = QUADRATURE[8]
_FIRST = 0.01  # of the interval, at most


@dataclass
class Adams:
    """Bashforth's predictor of order 3 and Moulton's corrector of order 4 on  y' = rhs(y, u, run),  per sample.

    Both integrate the polynomial in u through the last slopes; the corrector's goes through the one at the new u too.
    That one is evaluated once, at the predicted y, and serves both (PEC): an attempt costs one evaluation. The first
    steps have lower orders. The error of a step is the RMS over the event of
    (corrected - predicted)/(atol + rtol max(|y|, |y new|)): the predictor's, so that the corrected y, which is kept, is
    better. Higher orders gain on closed-form scores, but lose on networks, whose flow limits their steps: on the digits
    model order 5 takes twice the evaluations. Hairer, Norsett & Wanner 1993, III.5, variable steps.
    """

    rhs: Rhs
    rtol: float
    atol: float

    evaluations = 1
    safety = 0.8
    limits = (0.25, 2.0)

    def step(self, u: Tensor, h: Tensor, direction: float) -> Tensor:
        """As wanted."""
        return h

    def start(self, y: Tensor, u: Tensor, ends: Tensor, run: Tensor) -> tuple[State, Tensor, int]:
        """One slope behind, and the other places empty, at infinity."""
        past = [self.rhs(y, u, run), *(torch.zeros_like(y) for _ in range(_ORDER - 1))]
        empty = FAR * torch.arange(1, _ORDER, dtype=u.dtype, device=u.device).expand(len(y), -1)
        first = _FIRST * (ends[1] - ends[0]).abs()
        return (torch.cat([u[:, None], empty], 1), torch.ones_like(u), *past), first.expand(u.shape), 1

    def attempt(
        self, y: Tensor, u: Tensor, u_new: Tensor, state: State, run: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """One step: predict, evaluate, correct."""
        places, have, *past = state
        step = Step(u, u_new)
        predicted = y + step.integral(places, past)
        slope = self.rhs(predicted, u_new, run)
        nodes, slopes = torch.cat([u_new[:, None], places], 1), [slope, *past]
        corrected = y + step.integral(nodes, slopes)
        y_new, size = self.judge(y, predicted, corrected, lambda: y + step.integral(_shorter(nodes, have), slopes))
        return y_new, size, have + 1, (nodes[:, :-1], (have + 1).clamp_max(_ORDER), *slopes[:-1])

    def judge(
        self, y: Tensor, predicted: Tensor, corrected: Tensor, lower: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The new y, and its error in units of the tolerance. ``lower()`` is the corrected y of one order less."""
        scale = self.atol + self.rtol * torch.maximum(y.abs(), corrected.abs())
        return corrected, rms((corrected - predicted) / scale)


class Step:
    """Steps from u to u_new, (b,), over which polynomials are integrated; a few numbers for each sample, on the CPU."""

    def __init__(self, u: Tensor, u_new: Tensor) -> None:
        u, u_new = (a.to("cpu", torch.float64)[:, None] for a in (u, u_new))
        self.at, self.kernel = u + (u_new - u) * _POINTS, (u_new - u) * _WEIGHTS

    def integral(self, nodes: Tensor, slopes: list[Tensor]) -> Tensor:
        """Of the polynomial through the slopes at the nodes (b, k)."""
        weights = interpolate(self.kernel, self.at, nodes.to("cpu", torch.float64))
        return sum(
            (expand(w, slope) * slope for w, slope in zip(weights.unbind(1), slopes, strict=True)),
            start=torch.zeros_like(slopes[0]),
        )


def _shorter(nodes: Tensor, have: Tensor) -> Tensor:
    """The nodes without the oldest of those that are not empty, of which there are have + 1."""
    place = torch.arange(nodes.shape[1], dtype=nodes.dtype, device=nodes.device)
    return torch.where(place < have[:, None], nodes, FAR * (1 + place))
