"""What a model says of noisy data at a few noise levels, and how near that is to the data."""

import copy
import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

from sdekit.batch import samples
from sdekit.noise.keyed import Noise
from sdekit.processes.counted import Model
from sdekit.processes.kinds import express, kind_of
from sdekit.processes.sde import SDE

LEVELS = 10
# Levels in units of the data's spread. Below the first nothing is left to learn; above the last an eps network says
# nothing of x_0 (its error times sigma/alpha), and every model the mean.
LOWEST, HIGHEST = 0.01, 10.0


class Probe:
    """Data x_0 (n, *event), standard normal eps for each level, and the levels: r = sigma/alpha, from low to high.

    Of N < ``n`` data each comes with several noises; chance is then reckoned over the N (:meth:`fold`).
    ``spread``: the root mean square of the data about their mean. ``trivial``: (levels,), what the best denoiser that
    knows the data's mean and spread alone errs a number, s^2 r^2/(s^2 + r^2); losses here are in units of it.
    """

    def __init__(
        self, sde: SDE, model: Model, data: Tensor, n: int, seed: int, batch: int,
        highest: float = HIGHEST, levels: int = LEVELS,
    ) -> None:  # fmt: skip
        self.seed = seed
        self.sde, self.model, self.batch, self.data = sde, model, batch, data
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        self.rows = order[:n] if n < len(data) else order.repeat(-(-n // len(data)))
        self.asked = self.rows  # whose conditions the model gets
        self.mean = data.mean(0)
        of_sample = float((data - self.mean).double().square().mean())
        self.spread = math.sqrt(of_sample * len(data) / (len(data) - 1))  # of the law that they are from
        if self.spread <= 1e-6 * float(data.abs().max()):
            raise ValueError(f"data must be samples that differ, and all {len(data)} are the same")
        self.x0 = data[self.rows.to(data.device)]
        first, last = (float((-sde.half_log_snr(t)).exp()) for t in (sde.t_min, sde.T))
        low, high = max(first, LOWEST * self.spread), min(last * (1 - 1e-6), highest * self.spread)
        if not low < high:
            raise ValueError(
                f"the noise levels of {type(sde).__name__}, sigma/alpha = {first:g} ... {last:g}, and the "
                f"data's spread of {self.spread:g} have nothing in common; scale the data to about unit size"
            )
        self.r = torch.logspace(math.log10(low), math.log10(high), levels, dtype=torch.float64)
        self.trivial = self.spread**2 * self.r**2 / (self.spread**2 + self.r**2)
        self.times = sde.inverse_half_log_snr(-self.r.log())
        noise = Noise(self.x0, seed, purpose="check")
        self.eps = [sde.unit_noise(noise.normal) for _ in range(levels)]

    def below(self, highest: float, levels: int, least: int) -> "Probe":
        """The same with so many levels below ``highest``, in the data's spread, and at least so many samples."""
        n = max(least, len(self.x0))
        return Probe(self.sde, self.model, self.data, n, self.seed, self.batch, highest, levels)

    def with_others_conditions(self) -> "Probe":
        """The same, where the model is given each sample's neighbour's conditions."""
        other = copy.copy(self)
        other.asked = self.rows.roll(1)
        return other

    def of(self, x: Tensor, first: int = 0) -> AbstractContextManager[None]:
        """Within, x are the samples from ``first`` on: a process may have a y for each of the data."""
        return samples(self.rows[first : first + len(x)], len(self.data))

    def fold(self, values: Tensor) -> Tensor:
        """Values (n, ...) of the samples as the means of those of one datum, which are not independent."""
        N = len(self.data)
        return values if len(values) <= N else values[: len(values) // N * N].unflatten(0, (-1, N)).mean(0)

    def state(self, k: int, sde: SDE | None = None, x0: Tensor | None = None, t: float | None = None) -> Tensor:
        """x_t = alpha x_0 + sigma eps of the k-th level, like the data; of another process or other data if given."""
        process, t = sde or self.sde, float(self.times[k]) if t is None else t
        x0 = self.x0 if x0 is None else x0
        with self.of(x0):
            return process.perturb(x0, t, noise=self.eps[k][: len(x0)])

    def centre(self, x: Tensor, t: Any, sde: SDE | None = None, first: int = 0) -> Tensor:
        """x less the process's own mean at t."""
        with self.of(x, first):
            return (sde or self.sde).centre(x, t)

    def ask(self, x: Tensor, clock: Tensor, first: int = 0, graph: bool = False) -> Tensor:
        """What the model says at x (m, *event), of the samples from ``first`` on, at this value of its clock."""
        parts = []
        with torch.set_grad_enabled(graph):
            for part in torch.arange(len(x)).split(self.batch):
                with samples(self.asked[part + first], len(self.data)):
                    parts.append(told(self.model, x[int(part[0]) : int(part[-1]) + 1].clone(), clock).clone())
        return torch.cat(parts)

    def at_time(self, x: Tensor, t: float, first: int = 0, graph: bool = False) -> Tensor:
        """E[x_0|x_t = x] as the model has it."""
        time = torch.tensor(t, dtype=torch.float64)
        out = self.ask(x, own_clock(self.model, time), first, graph)
        a, b = self._of("x0", time)
        return a.to(x) * out + b.to(x) * self.centre(x, time, first=first)

    def said(self, k: int) -> Tensor:
        """What the model itself says at the k-th level."""
        return self.ask(self.state(k), own_clock(self.model, self.times[k]))

    def target(self, k: int) -> Tensor:
        """What a perfect model says on average: m x_0 + n eps."""
        m, n = kind_of(self.model.predicts, self.model.sde, self.times[k])
        return m.to(self.x0) * self.x0 + n.to(self.x0) * self.eps[k]

    def denoised(self, k: int, x: Tensor | None = None) -> Tensor:
        """E[x_0|x_t] of the k-th level as the model has it, (n, *event)."""
        return self.at_time(self.state(k) if x is None else x, float(self.times[k]))

    def _of(self, kind: str, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of that kind of prediction, a output + b x."""
        return express(kind_of(kind, self.sde, t), kind_of(self.model.predicts, self.model.sde, t), *self.at(t))

    def at(self, t: Tensor, sde: SDE | None = None) -> tuple[Tensor, Tensor]:
        """(alpha, sigma)."""
        return (sde or self.sde).alpha(t), (sde or self.sde).sigma(t)

    def loss(self, x_0: Tensor, k: int) -> Tensor:
        """|x_0 - data|^2 a number in units of the trivial denoiser's, float64, on the CPU, for each of the data."""
        off = flat(x_0 - self.x0[: len(x_0)])
        return self.fold(off.square().mean(1)).cpu() / float(self.trivial[k])


def flat(x: Tensor) -> Tensor:
    """x (n, *event) as vectors, float64."""
    return x.double().reshape(len(x), -1)


def chance(values: Tensor, sigmas: float) -> float:
    """What the mean of independent values may be off by chance, as rarely as a normal number by so many sigmas.

    By Student's t: a deviation that is reckoned from a few values may be much too small.
    """
    n = len(values)
    return float(-stdtrit(n - 1, ndtr(-sigmas)) * float(values.double().std()) / math.sqrt(n))


def own_clock(model: Any, t: Tensor) -> Tensor:
    """What the model's network is told of t, () or (1, ...): t itself where there is no clock."""
    time = getattr(model, "_time", None)
    return t if time is None else time(t.reshape(1).clone())


def told(model: Any, x: Tensor, clock: Tensor) -> Tensor:
    """What the model says at x when its network is told this of the time: a number, or a tensor (1, ...)."""
    if not hasattr(model, "clocks"):  # no network: t is all the clock that there is
        out = model.output(x, clock.reshape(()))
    elif clock.is_floating_point() and clock.numel() == 1:
        out = model.output(x, clock, float(clock))
    else:
        out = model.output(x, clock, clock.reshape(1, *clock.shape[1:]).expand(len(x), *clock.shape[1:]).to(x.device))
    return out.to(x.dtype)
