"""The named processes: each is its alpha and its sigma."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.processes.sde import SDE
from sdekit.system import Time, as_time


class VPSDE(SDE):
    """Variance preserving (DDPM's limit): alpha = exp(-b/2), sigma^2 = 1 - alpha^2, b = integral of beta.

    beta(t) rises linearly from ``beta_min`` to ``beta_max`` on [0, 1]. Song et al. 2021, eq. 11 and 33.
    Raises ValueError unless 0 < beta_min < beta_max.
    """

    t_min = 1e-5

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0) -> None:
        self.beta_min, self.beta_max = _increasing("beta_min", beta_min, "beta_max", beta_max)

    def integrated_beta(self, t: Tensor) -> Tensor:
        """b(t) = t beta_min + t^2 (beta_max - beta_min)/2."""
        return t * self.beta_min + t**2 * (self.beta_max - self.beta_min) / 2

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-b/2)."""
        return torch.exp(-self.integrated_beta(t) / 2)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2), by expm1."""
        return torch.sqrt(-torch.expm1(-self.integrated_beta(t)))


class SubVPSDE(VPSDE):
    """Sub-VP: alpha as VP, standard deviation sigma = 1 - alpha^2.  Song et al. 2021, eq. 14 and 36.

    ``t_min`` is 1e-3: sigma falls like t here, to 1e-4 there and below float32's reach at VP's 1e-5.
    """

    t_min = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        """1 - alpha^2, by expm1."""
        return -torch.expm1(-self.integrated_beta(t))


class VESDE(SDE):
    """Variance exploding (SMLD's limit): alpha = 1, sigma = sigma_min (sigma_max/sigma_min)^t.

    Song et al. 2021, eq. 9 and 31. The marginal at t = 0 keeps sigma_min.
    Raises ValueError unless 0 < sigma_min < sigma_max.
    """

    t_min = 1e-5

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        self.sigma_min, self.sigma_max = _increasing("sigma_min", sigma_min, "sigma_max", sigma_max)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_min (sigma_max/sigma_min)^t."""
        return self.sigma_min * torch.exp(t * math.log(self.sigma_max / self.sigma_min))


class HeatODE(SDE):
    """The heat-equation process: alpha = 1, any smooth increasing sigma_t from sigma_0 = 0.

    p_t solves dp/dt = sigma sigma' Laplacian p, and its flow is dx/dt = -sigma sigma' score.
    The default sigma_t = t on [0, 80] is EDM's frame (Karras et al. 2022, eq. 1 and table 1).

    ``sigma``: callable on a float64 tensor, sigma(0) = 0. ``t_min`` is where sigma = 0.002 (Karras's
    lowest level). Raises ValueError where sigma decreases, is negative, or stays below 0.002.
    """

    grid = "karras"

    def __init__(self, sigma: Callable[[Tensor], Tensor] | None = None, T: float = 80.0) -> None:
        self.T = _checks.positive(T, "T")
        if sigma is not None and not callable(sigma):
            raise TypeError(f"sigma must be a callable t -> sigma_t or None, got {sigma!r}")
        self._sigma = sigma
        times = torch.linspace(0.0, self.T, 257, dtype=torch.float64)
        try:
            levels = self.sigma(times)
            torch.func.vjp(self.sigma, times)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"sigma must map a float64 tensor by torch operations (not math's or NumPy's): {error}"
            ) from error
        if not torch.isfinite(levels).all() or levels[0] < 0 or (levels.diff() <= 0).any():
            raise ValueError(f"sigma must be finite, not negative and increasing on [0, {self.T:g}]")
        if levels[0] > 1e-6:
            raise ValueError(f"sigma must start at sigma(0) = 0, got {float(levels[0]):g}; VESDE keeps a sigma_min")
        if levels[-1] <= 0.002:
            raise ValueError(f"sigma(T) must be far above 0.002, the level of t_min, got {float(levels[-1]):g}")
        self.t_min = float(self.inverse_half_log_snr(-math.log(0.002)))

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """The given sigma_t; t unless given."""
        return t if self._sigma is None else self._sigma(t)


class RectifiedFlow(SDE):
    """Rectified flow: alpha = 1 - u, sigma = u, with  u = shift t/(1 + (shift - 1) t),  T = 1, where alpha = 0.

    ``shift`` > 1 gives high noise more of the time (Esser et al. 2024, eq. 23); samples are the same, since u is all
    that there is of t. The velocity that its networks predict ("flow") is that in u, eps - x_0, whatever the shift.
    Lipman et al. 2023; Liu et al. 2023. t_min is where u = 1e-3. Raises ValueError for shift <= 0.
    """

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = _checks.positive(shift, "shift")
        self.t_min = 1e-3 / (self.shift - (self.shift - 1) * 1e-3)

    def alpha(self, t: Tensor) -> Tensor:
        """1 - u, to rounding where it is small."""
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        """u."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def velocity(self, t: Time) -> tuple[Tensor, Tensor]:
        """(-1, 1): eps - x_0."""
        one = torch.ones_like(as_time(t, self.T))
        return -one, one


class CosineVP(SDE):
    """Variance preserving with  alpha = cos(pi/2 (t + s)/(1 + s))/cos(pi/2 s/(1 + s)),  sigma^2 = 1 - alpha^2.

    Nichol & Dhariwal 2021, eq. 17, without their clipping: alpha(1) = 0. Raises ValueError for s < 0.
    """

    t_min = 1e-4

    def __init__(self, s: float = 0.008) -> None:
        self.s = _checks.positive(s, "s", zero=True)

    def _angle(self, t: Any) -> Any:
        return math.pi / 2 * t / (1 + self.s)

    def alpha(self, t: Tensor) -> Tensor:
        """By the sine of what is left to T, which is 0 there."""
        return torch.sin(self._angle(1 - t)) / math.cos(self._angle(self.s))

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2), as a product of sines, which loses no digits."""
        product = torch.sin(self._angle(t)) * torch.sin(self._angle(t + 2 * self.s))
        return product.sqrt() / math.cos(self._angle(self.s))


def _increasing(low_name: str, low: float, high_name: str, high: float) -> tuple[float, float]:
    low, high = _checks.positive(low, low_name), _checks.positive(high, high_name)
    if low >= high:
        raise ValueError(f"{low_name} must be smaller than {high_name}, got {low:g} and {high:g}; are they swapped?")
    return low, high
