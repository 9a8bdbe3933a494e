"""A variable-step exponential Adams method for the adaptive loop: about one evaluation a step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdekit.adaptive import State
from sdekit.reverse import Reverse, batch_time
from sdekit.solution import rms
from sdekit.steppers.exponential import CLOCKS, FAR, PREDICTIONS, integrand, interpolate
from sdekit.system import Levels, expand

_ORDER = 3
_FIRST = 0.5  # of half log-SNR


_KIND, _PLACE = PREDICTIONS["v"], CLOCKS["flow"]


@dataclass
class Adams:
    """Predictor of order 3 and corrector of order 4 on the probability flow, in half log-SNR, per sample.

    The linear part of the flow is exact; under the integral stands the polynomial, in sigma/(alpha + sigma), through
    the unit v's of the last three steps (predictor), and through the one at the new level too (corrector). The new v is
    evaluated once, at the predicted x, and serves both (PEC): an attempt costs one evaluation. The first steps have
    lower orders. The error of a step is the RMS over the event of
    (corrected - predicted)/(atol + rtol max(|x|, |x new|)): the predictor's, so that the corrected x, which is kept, is
    better. Raises TypeError for a system that has no score.
    Zhao et al. 2023 (UniPC) for the corrector; Hairer, Norsett & Wanner 1993, III.5, for variable steps.
    """

    system: Reverse
    rtol: float
    atol: float

    evaluations = 1
    safety = 0.8
    limits = (0.25, 2.0)

    def clock(self, t: Tensor) -> Tensor:
        """Half log-SNR; the times, of which the ends are remembered."""
        self._first, self._last = float(t.min()), float(t.max())
        return self.system.levels(t.cpu()).lam

    def time(self, u: Tensor) -> Tensor:
        """t of a half log-SNR, never a rounding beyond the ends; on the CPU."""
        return self.system.sde.inverse_half_log_snr(u.cpu()).clamp(self._first, self._last)

    def step(self, u: Tensor, h: Tensor, direction: float) -> Tensor:
        """As wanted."""
        return h

    def start(self, y: Tensor, u: Tensor, ends: Tensor, run: Tensor) -> tuple[State, Tensor, int]:
        """One prediction behind, and the other places empty, at infinity."""
        levels = self._levels(u)
        p = self._predict(y, levels)
        past = [p, *(torch.zeros_like(y) for _ in range(_ORDER - 1))]
        empty = FAR * torch.arange(1, _ORDER, dtype=u.dtype, device=u.device).expand(len(y), -1)
        places = torch.cat([_PLACE(self.system, u)[:, None], empty], 1)
        state = (torch.stack(levels, 1).to(u), places, torch.ones_like(u), *past)
        return state, (ends[1] - ends[0]).abs().clamp_max(_FIRST).expand(u.shape), 1

    def attempt(
        self, y: Tensor, u: Tensor, u_new: Tensor, state: State, run: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """One step: predict, evaluate, correct."""
        levels, places, have, *past = state
        levels, places = (kept.to("cpu", torch.float64) for kept in (levels, places))  # a few numbers for each sample
        old, new = Levels(*levels.unbind(1)), self._levels(u_new)
        g = integrand(_KIND, 0.0, old, new, points=24)  # a sample's own, whatever the steps of the others
        at, place = _PLACE(self.system, g.at), _PLACE(self.system, new.lam)
        ahead = interpolate(g.kernel, at, places)
        linear = expand(g.linear, y) * y
        predicted = _sum(linear, ahead, past)
        p = self._predict(predicted, new)
        nodes = torch.cat([place[:, None], places], 1)
        corrected = _sum(linear, interpolate(g.kernel, at, nodes), [p, *past])
        size = rms((corrected - predicted) / (self.atol + self.rtol * torch.maximum(y.abs(), corrected.abs())))
        kept = (torch.stack(new, 1).to(u), nodes[:, :-1].to(u), (have + 1).clamp_max(_ORDER), p, *past[:-1])
        return corrected, size, have + 1, kept

    def _levels(self, u: Tensor) -> Levels:
        return self.system.levels(self.time(u))

    def _predict(self, x: Tensor, lv: Levels) -> Tensor:
        score = self.system.score(x, batch_time(lv.time, x))
        return expand(_KIND.scale(lv.alpha, lv.sigma), x) * score + expand(_KIND.mix(lv.alpha, lv.sigma), x) * x


def _sum(x: Tensor, weights: Tensor, terms: list[Tensor]) -> Tensor:
    for weight, term in zip(weights.unbind(1), terms, strict=True):
        x = x + expand(weight, x) * term
    return x
