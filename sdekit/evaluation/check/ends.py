"""Lines on a process's two ends: t_min and the data's own scale, T and the prior."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import samples
from sdekit.evaluation.check.lines import verdict
from sdekit.evaluation.parts import Line
from sdekit.noise import Noise
from sdekit.processes.sde import SDE
from sdekit.system import NOTHING

_DRAWS = 20_000  # a mean or spread beyond 6 standard errors, 3 % of sigma: false alarms below 1e-8
_LEFT = 0.05, 0.2  # noise at t_min, of the data's spread, from which on to warn and to fail
_ROUNDING = 0.02, 0.2  # of x, of the noise at t_min
_NATS = 1e-3, 0.05  # a dimension


@dataclass(frozen=True)
class Data:
    """What is known of the data: means and spreads of its entries, and perhaps a shape (B, *event) and samples."""

    mean: Tensor
    std: Tensor
    shape: tuple[int, ...] | None = None
    values: Tensor | None = None

    @classmethod
    def of(cls, data: Tensor | None, mean: float, std: float, shape: Sequence[int] | None) -> "Data":
        """From samples, or from numbers. Raises ValueError or TypeError for what is neither."""
        if data is None:
            if not math.isfinite(mean):
                raise ValueError(f"mean must be a finite number, got {mean!r}")
            one = torch.ones(1, dtype=torch.float64)
            return cls(
                mean * one, _checks.positive(std, "std") * one, None if shape is None else _checks.event_shape(shape)
            )
        values = _checks.state(data, "data").detach().cpu().double()
        flat = values.reshape(len(values), -1)
        if len(flat) < 2 or not bool((flat[0] != flat[1:]).any()):
            raise ValueError(f"data must be at least two samples that differ, (N, *event), got {tuple(data.shape)}")
        return cls(flat.mean(0), flat.std(0, correction=0), values.shape, values)

    @property
    def spread(self) -> float:
        """The root mean square of the entries' spreads."""
        return float(self.std.square().mean().sqrt())

    @property
    def size(self) -> float:
        """The root mean square of the entries."""
        return float((self.std.square() + self.mean.square()).mean().sqrt())


def noise(sde: SDE, shape: Sequence[int], seed: int) -> Line:
    """L is linear, of each sample alone, and what is called its inverse is it."""
    like = torch.empty(4, *shape[1:], dtype=torch.float64)
    z = Noise(like, seed, purpose="probe").normal()
    y = sde.colour(z)
    scale = y.abs().max()
    alone = torch.cat([sde.colour(row[None]) for row in z])
    bent = sde.colour(z[:1] - 2 * z[1:2]) - y[0] + 2 * y[1]
    off = float(max((alone - y).abs().max(), bent.abs().max()) / scale)
    text = f"L z is linear and of each sample alone to {off:.2g}"
    remedy = "root must be a linear map (B, *event) -> (B, *event) of each sample alone"
    if off > 1e-4:
        return Line("noise", "fail", off, text, remedy)
    if getattr(sde, "inverse", None) is None:
        return Line("noise", "pass", off, f"{text}; without an inverse there are no likelihoods and exact scores")
    sde.whiten(y)  # raises, where what is called its inverse is not
    return Line("noise", "pass", off, f"{text}, and inverse is its inverse")


def prior(sde: SDE, data: Data, seed: int) -> Line:
    """Draws of the prior against N(m(T), sigma(T)^2), of white noise."""
    inner = sde.white
    event = (1,) if sde.centred or data.shape is None else data.shape[1:]
    n = max(2, _DRAWS // math.prod(event))
    with samples(torch.zeros(n, dtype=torch.long), data.shape[0] if data.shape else n):
        x = inner.prior_sample((n, *event), seed=seed, dtype=torch.float64)
        x = inner.centre(x, inner.T)
    sigma = float(inner.sigma(inner.T))
    z = (x / sigma).flatten()
    mean, var = float(z.mean()), float(z.square().mean())
    off = max(abs(mean) * math.sqrt(len(z)), abs(var - 1) * math.sqrt(len(z) / 2))
    text = f"{len(z)} draws have mean {mean:.2g} and spread {var**0.5:.4g} in units of sigma(T) = {sigma:.4g}"
    said = verdict(off, 6, 6)
    return Line("prior", said, off, text, "" if said == "pass" else "prior_sample must draw N(m(T), sigma(T)^2)")


def t_min(sde: SDE, data: Data, dtype: torch.dtype) -> Line:
    """Little noise left, and more than rounding."""
    alpha, sigma = float(sde.alpha(sde.t_min)), float(sde.sigma(sde.t_min))
    left = sigma / (alpha * data.spread)
    unit = torch.finfo(dtype).eps / 2
    rounding = unit * math.hypot(alpha * data.size, sigma) / sigma
    text = (
        f"noise that is left at t_min = {sde.t_min:g} is {left:.2g} of the data's spread; x in "
        f"{str(dtype).removeprefix('torch.')} is rounded by {rounding:.2g} of that noise"
    )
    said = max(verdict(left, *_LEFT), verdict(rounding, *_ROUNDING), key=("pass", "warn", "fail").index)
    if said == "pass":
        return Line("t_min", said, left, text)
    least, most = 1.05 * unit * data.size / _ROUNDING[0], _LEFT[0] * data.spread  # levels sigma/alpha
    lowest = float((sde.sigma(0.0) / sde.alpha(0.0)).nan_to_num(0.0, math.inf))
    if least >= most:
        remedy = f"no t_min will do in this dtype for data of this size, {data.size:.2g}: keep x in float32"
    elif lowest >= most:
        remedy = f"the process keeps sigma/alpha = {lowest:.2g} at t = 0: make it smaller, {most:.2g} or less"
    else:
        level = min(max(least, 0.2 * most, 2 * lowest), most)
        remedy = (
            f"set t_min = {float(sde.inverse_half_log_snr(-math.log(level))):.3g}, where sigma/alpha is {level:.2g}"
        )
    return Line("t_min", said, max(left, rounding), text, remedy)


def mismatch(sde: SDE, data: Data, seed: int) -> Line:
    """KL divergence, in nats a dimension, of Gaussian data's law at T and the prior, where the noise is white."""
    means, stds, where = data.mean, data.std, ""
    if sde.root is not None:
        where = "; without L, for which give its inverse, and data or shape"
        if data.shape is not None and getattr(sde, "inverse", None) is not None:
            means, stds, where = *_whitened(sde, data, seed), ""
    r2 = float((sde.alpha(sde.T) / sde.sigma(sde.T)) ** 2)
    nats = float((r2 * (means**2 + stds**2) - torch.log1p(r2 * stds**2)).mean() / 2)
    total = f", {nats * math.prod(data.shape[1:]):.2g} an event" if data.shape is not None else ""
    said = verdict(nats, *_NATS)
    text = f"the data's law at T = {sde.T:g} is {nats:.2g} nats a dimension{total} from the prior{where}"
    remedy = "more noise at T (a larger T, beta_max or sigma_max), centred data, or start below T at the data's own law"
    return Line("prior mismatch", said, nats, text, "" if said == "pass" else remedy)


def _whitened(sde: SDE, data: Data, seed: int) -> tuple[Tensor, Tensor]:
    """Means and spreads of L^-1 x; of numbers instead of samples those of independent entries."""
    if data.values is not None:
        flat = sde.whiten(data.values).reshape(len(data.values), -1)
        return flat.mean(0), flat.std(0, correction=0)
    like = torch.empty(1000, *(data.shape or ())[1:], dtype=torch.float64)
    z = sde.whiten(data.std * Noise(like, seed, purpose="data").normal()).reshape(len(like), -1)
    return sde.whiten(data.mean * torch.ones_like(like[:1])).flatten(), z.square().mean(0).sqrt()


def terminal(sde: SDE, data: Data) -> Line:
    """Signal that is left at T, in the data's spread."""
    left = float(sde.alpha(sde.T) / sde.sigma(sde.T))
    ratio = (left * data.spread) ** 2
    if left < NOTHING:
        text = "alpha(T) = 0: networks must predict v, x0 or flow, since eps and score say nothing of x_0 there"
        return Line("terminal snr", "pass", ratio, text)
    said = verdict(ratio, 1e-3, math.inf)
    text = f"alpha^2 s^2/sigma^2 at T is {ratio:.2g}, for data of spread s = {data.spread:.3g}"
    remedy = "networks see the data's mean at T, and a sampler starts without it (Lin et al. 2024): more noise at T"
    return Line("terminal snr", said, ratio, text, "" if said == "pass" else remedy)
