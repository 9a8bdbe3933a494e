"""An embedded pair for SDEs with additive noise, on a Brownian path that is kept."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdekit.batch import only_real
from sdekit.noise.brownian import BrownianPath
from sdekit.solvers.adaptive import State
from sdekit.solvers.solution import rms
from sdekit.solvers.steppers.drift import require_additive
from sdekit.system import expand


@dataclass
class SRA1:
    """Roessler's SRA1, of strong order 1.5, with Euler-Maruyama in it, of order 1; their difference is the error.

    The error of a step is the RMS over the event of (SRA1 - Euler-Maruyama)/(atol + rtol max(|x|, |x new|)): that of
    the lower order, while the higher one is kept. All increments are those of one path per sample, so a step that is
    rejected is taken again, shorter, on the noise that it was rejected for: drawn anew, large increments would be
    thrown away and the law be another (Rackauckas & Nie 2017). Steps end at dyadic fractions of the path's interval,
    where the path is cheap to know (Gaines & Lyons 1997). Two evaluations an attempt. Roessler 2010 for the scheme.
    Raises ValueError for noise that is not additive, and for a diffusion that differs over the event.
    """

    system: Any
    rtol: float
    atol: float
    path: BrownianPath

    evaluations = 2
    safety = 0.8
    limits = (0.2, 4.0)

    def __post_init__(self) -> None:
        require_additive(self.system, "adaptive_sra1")
        g = self._diffusion(self.path.time(torch.zeros((), dtype=torch.float64)))
        if g.ndim:
            raise ValueError(
                f"adaptive_sra1 takes a diffusion(t) of t's shape, and that of {type(self.system).__name__} has the "
                f"shape {tuple(g.shape)} at one t; use sra1 on a fixed grid"
            )

    def _diffusion(self, t: Tensor) -> Tensor:
        return torch.as_tensor(self.system.diffusion(t) if self.system.churn else 0.0, dtype=t.dtype)

    def clock(self, t: Tensor) -> Tensor:
        """The fraction of the path's interval."""
        return self.path.fraction(t)

    def time(self, u: Tensor) -> Tensor:
        """t of a fraction."""
        return self.path.time(u)

    def step(self, u: Tensor, h: Tensor, direction: float) -> Tensor:
        """Up to the last multiple of 2^-k within h, where 2^-k is the largest such up to h; at least a quarter of h."""
        unit = torch.exp2((torch.frexp(h).exponent - 1).to(h))
        end = torch.floor((direction * u + h) / unit) * unit
        end = torch.where(end - direction * u < unit / 2, end + unit / 2, end)  # u may lie just before a multiple
        return torch.where(unit < self.path.finest, 0.0, end - direction * u)

    def start(self, y: Tensor, u: Tensor, ends: Tensor, run: Tensor) -> tuple[State, Tensor, int]:
        """Nothing to remember; a first step that the control soon mends."""
        return (), torch.full_like(u, 2.0**-7), 0

    def attempt(
        self, y: Tensor, u: Tensor, u_new: Tensor, state: State, run: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float, State]:
        """One step of the higher order."""
        t, s = self.time(u), self.time(u_new)
        dW, integral = self.path.increment_and_integral(t, s, run)
        h, mean = expand(s - t, y), integral / expand(s - t, y)
        g_t, g_s = expand(self._diffusion(t), y), expand(self._diffusion(s), y)
        d_t = only_real(self.system.drift(y, t).to(y))  # t is float64
        d = only_real(self.system.drift(y + 0.75 * h * d_t + 1.5 * g_s * mean, t + 0.75 * (s - t)).to(y))
        lower = y + h * d_t + g_t * dW
        change = 2 / 3 * h * (d - d_t) + (g_s - g_t) * (dW - mean)
        y_new = lower + change
        size = rms(change / (self.atol + self.rtol * torch.maximum(y.abs(), y_new.abs())))
        return y_new, size, 1.5, ()
