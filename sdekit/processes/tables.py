"""Discrete-time tables as processes: DDPM's betas and SMLD's sigmas, exact at the table's own times."""

from typing import Any

import torch
from torch import Tensor

from sdekit.processes.sde import SDE


class BetaTable(SDE):
    """DDPM's chain  x_i | x_{i-1} ~ N(sqrt(1 - beta_i) x_{i-1}, beta_i I),  i = 1 ... N, as a process.

    At t = i/N  alpha^2 = prod_{j<=i} (1 - beta_j)  and sigma^2 = 1 - alpha^2 (Ho et al. 2020, eq. 4). In between
    log alpha is linear in t, so g^2 = -N log(1 - beta_i) is constant on ((i-1)/N, i/N]; alpha(0) = 1. The last beta
    may be 1 (zero terminal SNR, Lin et al. 2024): alpha is linear in t on the last interval, to alpha(T) = 0.

    ``betas`` (N,): numbers in (0, 1), kept in float64; ``times`` (N,): i/N. t_min = 1/N and T = 1.
    Raises ValueError unless betas is 1-D with at least 2 entries, all finite and between 0 and 1 (the last <= 1).
    """

    def __init__(self, betas: Any) -> None:
        self.betas = _table(betas, "betas")
        if not ((self.betas > 0).all() and (self.betas[:-1] < 1).all() and self.betas[-1] <= 1):
            low, high = float(self.betas.min()), float(self.betas.max())
            raise ValueError(f"betas must lie between 0 and 1, got {low:g} ... {high:g}")
        self.times = _times(self.betas)
        self.t_min = 1 / len(self.betas)
        self._log_alpha = torch.cat([torch.zeros(1).double(), torch.log1p(-self.betas).cumsum(0) / 2])
        self._to_zero = bool(self.betas[-1] == 1)
        if self._to_zero:  # on the last interval alpha is what it was before it times what is left of the interval
            self._log_alpha[-1] = self._log_alpha[-2]

    def _left(self, t: Tensor) -> Tensor:
        n = len(self.betas)
        return torch.where(n * t > n - 1, n * (1 - t), 1.0) if self._to_zero else torch.ones_like(t)

    def alpha(self, t: Tensor) -> Tensor:
        """exp(log alpha), linear in between, times what is left of an interval to 0."""
        return torch.exp(_between(self.times, self._log_alpha, t)) * self._left(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2), by expm1."""
        twice, left = 2 * _between(self.times, self._log_alpha, t), self._left(t)
        return torch.sqrt(-torch.expm1(twice) + torch.exp(twice) * (1 - left) * (1 + left))


class SigmaTable(SDE):
    """SMLD's noise levels as a process: alpha = 1 and sigma = sigma_i at t = i/N  (Song & Ermon 2019).

    In between log sigma is linear in t; below the first level sigma is, from sigma(0) = 0.

    ``sigmas`` (N,): increasing and positive, kept in float64; ``times`` (N,): i/N. t_min = 1/N and T = 1.
    Raises ValueError unless sigmas is 1-D with at least 2 entries, all finite, positive and increasing.
    """

    def __init__(self, sigmas: Any) -> None:
        self.sigmas = _table(sigmas, "sigmas")
        if not (self.sigmas[0] > 0 and (self.sigmas.diff() > 0).all()):
            raise ValueError("sigmas must be positive and increase from data to noise; turn a decreasing table round")
        self.times = _times(self.sigmas)
        self.t_min = 1 / len(self.sigmas)
        self._log_sigma = torch.cat([self.sigmas[:1], self.sigmas]).log()  # what it holds for t = 0 is not used

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """exp(log sigma) between the levels, sigma_1 N t below the first."""
        n, above = len(self.sigmas), _between(self.times, self._log_sigma, t).exp()
        return torch.where(n * t <= 1, self.sigmas[0].to(t) * n * t, above)  # t_min may be set to something else


def _between(times: Tensor, nodes: Tensor, t: Tensor) -> Tensor:
    """The line through nodes (N + 1,) at 0 and ``times``. A node belongs to the interval on its left, as beta_i."""
    i = torch.searchsorted(times.to(t), t.detach().contiguous()).clamp_max(len(times) - 1)
    low, high = (nodes.to(t).index_select(0, j.reshape(-1)).reshape(j.shape) for j in (i, i + 1))
    return low + (len(times) * t - i) * (high - low)


def _times(table: Tensor) -> Tensor:
    return torch.arange(1, len(table) + 1, dtype=torch.float64) / len(table)


def _table(values: Any, name: str) -> Tensor:
    """A 1-D table of finite numbers, a float64 copy on the CPU."""
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=torch.float64)
        table = tensor.detach().to("cpu", torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be a 1-D sequence of numbers, got {type(values).__name__}: {error}") from error
    if table.ndim != 1 or len(table) < 2:
        raise ValueError(f"{name} must be 1-D with at least 2 entries, got shape {tuple(table.shape)}")
    if not torch.isfinite(table).all():
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(table)).sum())} entries that are not")
    return table
