"""Closed forms that checks compare with: the flow of a mixture, and the moments of what is affine in its noise."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit.processes.kinds import Kind, express, kind_of
from sdekit.system import expand

Law = Callable[[Tensor, Any, Any], Tensor]  # (x, alpha, sigma) -> the score, entry by entry

# One dimension: w N(-1, s^2) + (1 - w) N(1, s^2).
_W, _S = 0.35, 0.35
# Independent entries of other means and spreads each, for what is exact on Gaussian data.
MEAN = torch.tensor([1.0, -0.5, 0.3, 0.0, 0.7], dtype=torch.float64)
STD = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.6], dtype=torch.float64)


def two_modes(x: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """grad log of  w N(-alpha, v) + (1 - w) N(alpha, v),  v = alpha^2 s^2 + sigma^2, for every entry of x."""
    v = alpha**2 * _S**2 + sigma**2
    right = torch.sigmoid(2 * alpha * x / v + math.log((1 - _W) / _W))
    return (alpha * (2 * right - 1) - x) / v


def quantile(u: Tensor, alpha: float, sigma: float) -> Tensor:
    """Where that mixture has u of its mass below, by bisection. In one dimension the probability flow keeps u: x_s is
    the quantile at s of the u that x_t has at t, which is the exact flow.
    """
    std = math.hypot(alpha * _S, sigma)
    low, high = torch.full_like(u, -alpha - 9 * std), torch.full_like(u, alpha + 9 * std)
    for _ in range(70):
        x = (low + high) / 2
        below = _W * torch.special.ndtr((x + alpha) / std) + (1 - _W) * torch.special.ndtr((x - alpha) / std) < u
        low, high = torch.where(below, x, low), torch.where(below, high, x)
    return (low + high) / 2


def normals(x: Tensor, alpha: Any, sigma: Any) -> Tensor:
    """The score of N(MEAN, STD^2), for x (B, 5)."""
    return (alpha * MEAN - x) / (alpha**2 * STD**2 + sigma**2)


class Known:
    """A score in closed form as a model of any kind of prediction. Notes the times that it is asked at."""

    def __init__(self, law: Law, sde: Any, predicts: str = "score") -> None:
        self.law, self.sde, self.predicts = law, sde, predicts
        self.asked: list[float] = []

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """The score."""
        return self.law(x, expand(self.sde.alpha(t), x), expand(self.sde.sigma(t), x))

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What it predicts."""
        self.asked += time.reshape(-1).tolist()
        alpha, sigma, a, b = (expand(y, x) for y in self._numbers(time)) if ready is None else ready
        score = self.law(x, alpha, sigma)
        return score if self.predicts == "score" else a * score + b * x

    def prepare(self, times: Sequence[float], x: Tensor) -> list[Any]:
        """All that depends on time alone."""
        numbers = self._numbers(torch.tensor(times, dtype=torch.float64))
        return list(zip(*(y.tolist() for y in numbers), strict=True))

    def _numbers(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, and a and b of  prediction = a score + b x."""
        alpha, sigma = self.sde.alpha(time), self.sde.sigma(time)
        said = Kind(torch.zeros_like(sigma), -1 / sigma)
        return alpha, sigma, *express(kind_of(self.predicts, self.sde, time), said, alpha, sigma)


class Impulses:
    """A noise source whose k-th draw is 1 in row k + 3 and 0 in the others, (rows, *event).

    What is affine in its start and its noises is known from such rows without a Monte-Carlo error: row 0 has the
    start alone, row 1 and 2 one and two of it more, and the others less row 0 the response to each draw.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape, self.draws = tuple(shape), 0

    def enter(self, t: float, s: float) -> None:
        """Nothing: a draw is known by its number."""

    def normal(self) -> Tensor:
        """The next draw."""
        z = torch.zeros(self.shape, dtype=torch.float64)
        z[self.draws + 3 : self.draws + 4] = 1.0  # beyond the rows there are, where draws are only counted
        self.draws += 1
        return z

    def increment(self, t: float, s: float) -> Tensor:
        """W_s - W_t."""
        return self.normal().mul_(abs(s - t) ** 0.5)

    def increment_and_integral(self, t: float, s: float) -> tuple[Tensor, Tensor]:
        """That and the integral of W_u - W_t du from t to s."""
        dW = self.increment(t, s)
        return dW, (s - t) * (dW / 2 + self.normal() * (abs(s - t) / 12) ** 0.5)


class Moments(NamedTuple):
    """Of what comes out, at one time or many: from the middle of the start, from one unit off it, and from noise."""

    mean: Tensor
    slope: Tensor  # the response to the start's unit
    noise: Tensor  # variance
    bend: float  # the largest departure from affine, in units of the standard deviation that comes out

    @property
    def std(self) -> Tensor:
        """For a start whose standard deviation is its unit."""
        return (self.slope**2 + self.noise).sqrt()


def propagate(run: Callable[[Tensor, Impulses], Tensor], start: Tensor, unit: Tensor, draws: int) -> Moments:
    """Exact moments of ``run(x, noise)``, (..., rows, *event), for x (rows, *event) of ``start`` and so many ``unit``.

    ``draws``: rows for so many; where there are more draws it is run again.
    """

    def rows(draws: int) -> tuple[Tensor, int]:
        x = start.expand(3 + draws, *start.shape).clone()
        x[1] += unit
        x[2] += 2 * unit
        noise = Impulses(x.shape)
        return run(x, noise), noise.draws

    out, made = rows(draws)
    if made > draws:
        out, _ = rows(made)
    out = out.movedim(-1 - start.ndim, 0)
    slope, noise = out[1] - out[0], (out[3:] - out[0]).square().sum(0)
    size = (slope**2 + noise).sqrt().clamp_min(1e-300)
    return Moments(out[0], slope, noise, float(((out[2] - 2 * out[1] + out[0]).abs() / size).max()))
