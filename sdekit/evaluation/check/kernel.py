"""The kernel against the process's own equation: moments of x_t from a point at t_min, without Monte-Carlo error."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from sdekit.batch import samples
from sdekit.evaluation.check.exact import Impulses, Moments, propagate
from sdekit.evaluation.check.lines import table, verdict
from sdekit.evaluation.parts import Line
from sdekit.processes.sde import SDE
from sdekit.solvers import solve

_SHOWN = 6
_STEP = 0.05  # of log alpha and log sigma together; what Heun's method leaves open of a smooth schedule is 2e-3
_MOST = 1200
_OFF = 0.01, 0.02  # tables with kinks come to .006, smooth schedules to .002
_FAINT = math.log(1e-2)  # of alpha/sigma: no further, since f is infinite where alpha = 0
_REMEDY = "drift and diffusion must be f x and g of this alpha and sigma: leave them out, and they are derived"


class Simulated(NamedTuple):
    """What came of it, at some times; the last axes are the event's."""

    t: Tensor  # (1 + C,), the first of them t_min
    moments: Moments  # (C, *event)
    mean: Tensor  # what the process says of a start in 0, (C, *event)
    gain: Tensor  # alpha_t/alpha_start, (C, 1, ...)
    std: Tensor  # (C, 1, ...)


def simulate(sde: SDE, times: Tensor, shape: Sequence[int] | None) -> Simulated:
    """By Heun's method on the process's own drift and diffusion, in steps that are even in what alpha and sigma do.

    The rows of :func:`sdekit.evaluation.check.exact.propagate` are all the first sample's. ``shape``: (B, *event).
    """
    event = (1,) if sde.centred or shape is None else tuple(shape[1:])
    times = times[sde.half_log_snr(times) > _FAINT]
    way = sde.alpha(times).log().diff().abs() + sde.sigma(times).log().diff().abs()
    way = torch.cat([way.new_zeros(1), way.cumsum(0)])
    every = min(math.ceil(float(way[-1]) / (_STEP * _SHOWN)), _MOST // _SHOWN)
    place = torch.linspace(0, float(way[-1]), every * _SHOWN + 1, dtype=torch.float64)
    i = torch.searchsorted(way, place).clamp(1, len(way) - 1)
    grid = torch.lerp(
        times[i - 1], times[i], ((place - way[i - 1]) / (way[i] - way[i - 1])).nan_to_num(0.0).clamp(0, 1)
    )

    def first(rows: int) -> AbstractContextManager[None]:
        return samples(torch.zeros(rows, dtype=torch.long), shape[0] if shape else rows)

    def run(x: Tensor, noise: Impulses) -> Tensor:
        seen: list[Tensor] = []

        def look(k: int, t: float, y: Tensor) -> None:
            if k % every == 0:
                seen.append(y)

        with first(len(x)):
            solve(sde, x, grid, "heun", noise=noise, callback=look)  # type: ignore[arg-type]
        return torch.stack(seen)

    zero, t = torch.zeros(event, dtype=torch.float64), grid[::every]
    moments = propagate(run, zero, zero + 1, len(grid) - 1)
    one = (-1, *(1,) * (moments.mean.ndim - 1))
    gain, std = (sde.alpha(t) / sde.alpha(t[0]))[1:].reshape(one), sde.sigma(t)
    own = torch.zeros_like(moments.mean)
    if not sde.centred:
        with first(1):
            own = torch.stack([sde.marginal(own[:1], float(u))[0][0] for u in t])
        own = own[1:] - gain * own[0]
    added = (std[1:].reshape(one) ** 2 - (gain * std[0]) ** 2).sqrt()
    return Simulated(t, moments, own, gain, added)


def kernel_mean(s: Simulated) -> Line:
    """The response to the start is alpha_t/alpha_0, and from 0 the mean is the process's own."""
    if s.moments.bend > 1e-6:
        return Line(
            "kernel mean", "fail", s.moments.bend,
            f"drift is not of the form f(t) x + c(t): off a line by {s.moments.bend:.2g} standard deviations",
            "a process of alpha and sigma has the drift f(t) x; for another, subclass ItoSDE",
        )  # fmt: skip
    gain = (s.moments.slope - s.gain).abs() / s.gain
    shift = (s.moments.mean - s.mean).abs() / s.std
    off = float(torch.maximum(gain, shift).max())
    said = verdict(off, *_OFF)
    rows = zip(s.t[1:].tolist(), s.gain.flatten().tolist(), _worst(s.moments.slope, s.gain), strict=True)
    text = f"off by {off:.2g} of it at most\n" + table(["t", "alpha_t/alpha_0", "simulated"], [*rows])
    return Line("kernel mean", said, off, text, "" if said == "pass" else _REMEDY)


def kernel_spread(s: Simulated) -> Line:
    """The standard deviation, of what is added to a point at t_min."""
    std = s.moments.noise.sqrt()
    off = float((std / s.std - 1).abs().max())
    said = verdict(off, *_OFF)
    rows = zip(s.t[1:].tolist(), s.std.flatten().tolist(), _worst(std, s.std), strict=True)
    text = f"off by {off:.2g} of it at most\n" + table(["t", "sigma from t_min", "simulated"], [*rows])
    return Line("kernel spread", said, off, text, "" if said == "pass" else _REMEDY)


def _worst(made: Tensor, wanted: Tensor) -> list[float]:
    """Of the entries of an event, the one that is furthest off, for each time."""
    flat = made.reshape(len(made), -1)
    at = (flat - wanted.reshape(-1, 1)).abs().argmax(1, keepdim=True)
    return flat.gather(1, at)[:, 0].tolist()
