"""The variational bound on the negative log probability of discrete data, in discrete and in continuous time."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.likelihood.quantization import Quantization
from sdekit.noise.keyed import Noise
from sdekit.processes.law import require_white
from sdekit.processes.sde import SDE
from sdekit.sampling.grids import Grid, first_level, make_grid
from sdekit.system import NOTHING, Score, Time, float64


@dataclass
class VariationalBound:
    """-log P(x) <= ``nats`` = ``prior`` + ``diffusion`` + ``reconstruction``, each (B,) in nats, float64.

    ``stderr`` (B,): the standard error of ``nats`` over the noise, NaN from a single draw; ``dims``: entries per
    sample, d; ``nfe``: network evaluations.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor
    stderr: Tensor
    dims: int
    nfe: int

    @property
    def nats(self) -> Tensor:
        """The bound, (B,)."""
        return self.prior + self.diffusion + self.reconstruction

    @property
    def bits_per_dim(self) -> Tensor:
        """nats/(d log 2), (B,)."""
        return self.nats / (self.dims * math.log(2))


@torch.no_grad()
def variational_bound(
    sde: SDE,
    score: Score,
    x: Tensor,
    *,
    levels: int = 256,
    data_range: tuple[float, float] = (-1.0, 1.0),
    steps: int | None = None,
    grid: Grid | None = None,
    samples: int = 1,
    dtype: torch.dtype | None = None,
    seed: int | None = None,
    ids: Sequence[int] | None = None,
) -> VariationalBound:
    """An upper bound on -log P(x) of discrete x, by a generative model that starts at the process's prior.

    x, (B, *event), holds integer levels 0 ... levels - 1; x_0 are their values in ``data_range`` (Quantization).
    With eps and eps^ the true and the predicted noise of x_t = alpha x_0 + sigma eps, and lam the half log-SNR:

        prior           KL( q(x_T|x_0) || N(0, sigma_T^2 I) ) = alpha_T^2 |x_0|^2 / (2 sigma_T^2)
        diffusion       sum_{i>1} (e^{2 (lam_{i-1} - lam_i)} - 1)/2 E|eps - eps^(x_{t_i})|^2     ``steps`` = N
                        integral E|eps - eps^(x_t)|^2 dlam from lam(T) to lam(t_min)             ``steps`` = None
        reconstruction  E[-log P(bin of x_0)] under N(x_0^(x_{t_1}), (sigma/alpha)^2 I), the first and last bin open

    ``steps`` = N is the chain t_1 < ... < t_N = T, whose reverse steps have the posterior's variance (Ho et al. 2020,
    eq. 5 and 13; Kingma et al. 2021, eq. 11-14). Its N times are those of ``grid`` (a name, a callable, or a decreasing
    tensor of N times), by default uniform in lam from t_min on: uniform in t, one step may cross most of lam, and the
    bound is loose by that. N = 1 is T alone. ``steps`` = None is the limit (Kingma et al. 2021, eq. 17), in which t_1
    is t_min and only the ends of lam matter.

    Where alpha(T) = 0 the chain's prior term is 0; the integral, which nothing bounds there, is that of a model which
    starts at sigma/alpha = 1,000. ``samples``: draws of the noise per term, and in continuous time of lam, one in each
    of as many equal parts of its range (importance sampling of t by g^2/sigma^2, stratified: Song, Durkan et al. 2021).
    The reconstruction has as many draws of its own: N ``samples`` evaluations of the batch, or 2 ``samples`` in
    continuous time. ``stderr`` takes the draws of a term as independent and alike, so over lam, where they are
    stratified, it is too large on average. ``dtype``: of the state the score sees, torch.float32 or float64 (default:
    torch's default). Sums are in float64. Raises TypeError for x that is not of integers, ValueError for levels that
    are not in range and other bad input, FloatingPointError where the score is not finite.
    """
    require_white(sde, "variational_bound")
    quantization = Quantization.of(levels, data_range)
    samples = _checks.count(samples, "samples")
    dtype = dtype or torch.get_default_dtype()
    if dtype not in (torch.float32, torch.float64):  # half precision loses the noise at t_min
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}; a network may cast within")
    x0 = quantization.values(x, dtype)
    wide = quantization.values(x, float64(x.device))
    system = sde.reverse(score)
    noise = Noise(x0, seed, ids, purpose="bound")

    def noised(t: Time) -> tuple[Tensor, Tensor]:
        eps, node = noise.normal(), system.at(t, x0)
        return eps, node.alpha * x0 + node.sigma * eps

    def error(t: Time, of_x0: bool = False) -> Tensor:
        eps, x_t = noised(t)
        x_0, predicted = system.predict(x_t, t)
        off = wide - x_0.to(wide.dtype) if of_x0 else (eps - predicted).to(wide.dtype)
        return _total(off.square())

    terms = []  # (mean, squared standard error) of each
    if steps is None:
        if grid is not None:
            raise ValueError(f"grid is the chain's and steps is None: give steps, or leave grid out; got {grid!r}")
        first = sde.t_min
        low, high = float(first_level(sde)), float(sde.half_log_snr(sde.t_min))
        signal = math.exp(2 * low) if low > float(sde.half_log_snr(sde.T)) else float(sde.snr(sde.T))
        edges = torch.linspace(low, high, samples + 1, dtype=torch.float64).tolist()
        place = Noise(wide.reshape(len(x), -1)[:, 0].cpu(), seed, ids, purpose="bound level")
        noise.enter(low, high)
        draws = []
        for a, b in pairwise(edges):
            lam = a + (b - a) * torch.special.ndtr(place.normal())
            draws.append((high - low) * error(sde.inverse_half_log_snr(lam).clamp(sde.t_min, sde.T)))
        terms.append(_mean(draws))
    else:
        signal = float(sde.snr(sde.T))
        times = _chain(sde, "log_snr" if grid is None else grid, _checks.count(steps, "steps"))
        lam = sde.half_log_snr(times)
        lam = torch.where(lam < math.log(NOTHING), -math.inf, lam)
        first, *rest = times.tolist()
        system.prepare([first, *rest], x0)
        for s, t, gap in zip([first, *rest], rest, (-lam.diff()).tolist(), strict=False):
            noise.enter(t, s)
            # SNR_s - SNR_t times the error of x_0 is this times that of eps; where SNR_t = 0, only the one has digits.
            blind = math.isinf(gap)
            weight = 0.5 * float(sde.snr(s)) if blind else 0.5 * math.expm1(2 * gap)
            terms.append(_mean([weight * error(t, blind) for _ in range(samples)]))
    noise.enter(first, 0.0)
    std = math.exp(-float(sde.half_log_snr(first)))
    draws = []
    for _ in range(samples):
        mean = system.predict(noised(first)[1], first)[0]
        draws.append(-_total(log_bin_probability(quantization, x, mean, std)))
    reconstruction, variance = _mean(draws)
    system.settle()
    diffusion = sum((mean for mean, _ in terms), torch.zeros_like(reconstruction))
    stderr = sum((v for _, v in terms), variance).sqrt()
    prior = 0.5 * signal * _total(wide.square())
    return VariationalBound(prior, diffusion, reconstruction, stderr, x[0].numel(), system.nfe)


def log_bin_probability(quantization: Quantization, x: Tensor, mean: Tensor, std: float) -> Tensor:
    """log of N(mean, std^2) integrated over the bin of x, entry by entry, in float64  (Ho et al. 2020, eq. 13).

    The first and the last bin are open, so that over all levels it sums to one. To rounding however far the bin lies
    in a tail: finite wherever (distance/std)^2 is, and so is its gradient with respect to the mean.
    """
    k = quantization.check(x)
    mean = mean.to(float64(mean.device))
    half = quantization.bin / 2 / std
    middle = (quantization.low + k.to(mean.dtype) * quantization.bin - mean) / std
    a = torch.where(k == 0, -math.inf, middle - half)
    b = torch.where(k == quantization.levels - 1, math.inf, middle + half)
    # By symmetry the bin may lie left of the mean, where both distribution functions are small and exact.
    a, b = torch.where(a + b > 0, -b, a), torch.where(a + b > 0, -a, b)
    log_b = torch.special.log_ndtr(b)
    # Every branch below gets arguments at which it is finite, also where another is chosen: 0 times an infinite slope
    # is NaN in the gradient. An open bin has no second edge; any does for it that leaves the bin a probability.
    unbounded = torch.isinf(a)
    a = torch.where(unbounded, b.clamp_max(0.0) - 1, a)
    # log ndtr(b) - log ndtr(a). In a tail, where both are huge, it is (a^2 - b^2)/2 + log of a ratio near one.
    near, tail = log_b - torch.special.log_ndtr(a), b <= -1
    u, v = (torch.special.erfcx(-torch.where(tail, y, -1.0) / math.sqrt(2)) for y in (b, a))
    gap = torch.where(tail, -half * (a + b) + (u / v).log(), near)
    # log(1 - e^-gap), by whichever of the two is exact  (Maechler 2012)
    log2 = math.log(2)
    large, small = torch.log1p(-torch.exp(-gap.clamp_min(log2))), torch.log(-torch.expm1(-gap.clamp_max(log2)))
    return log_b + torch.where(unbounded, 0.0, torch.where(gap > log2, large, small))


def _chain(sde: SDE, grid: Grid, steps: int) -> Tensor:
    """The chain's times t_1 < ... < t_N = T."""
    if isinstance(grid, Tensor) and grid.numel() != steps:
        raise ValueError(f"grid must hold the chain's {steps} times, one per step, got {grid.numel()}")
    if steps == 1:
        return torch.tensor([sde.T], dtype=torch.float64)
    times = make_grid(sde, grid, steps - 1).flip(0)
    if abs(float(times[-1]) - sde.T) > 1e-6 * sde.T:  # the prior is of x_T
        raise ValueError(f"grid must start at T = {sde.T:g}, got {float(times[-1]):g}")
    return times


def _total(y: Tensor) -> Tensor:
    """The sum over the event, (B,)."""
    rows = y.reshape(len(y), -1)
    # A sum that gives one number is split among threads, and rounds otherwise than the same row of a batch.
    return rows.sum(1) if len(y) > 1 else rows.expand(2, -1).sum(1)[:1]


def _mean(draws: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and its squared standard error; added one by one, so that the order does not depend on the batch."""
    n, zero = len(draws), torch.zeros_like(draws[0])
    mean = sum(draws, zero) / n
    spread = sum(((y - mean).square() for y in draws), zero)
    return mean, spread / (n * (n - 1)) if n > 1 else torch.full_like(mean, torch.nan)
