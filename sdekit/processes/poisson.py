"""Poisson flow: the heat-equation process with a kernel of heavy tails."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import special
from torch import Tensor

from sdekit.batch import first_entry
from sdekit.processes.gaussian import HeatODE
from sdekit.system import Time, as_time


class PoissonFlow(HeatODE):
    """PFGM++: x = x_0 + sigma_t eps,  p(x|x_0) proportional to (|x - x_0|^2 + r^2)^(-(N + D)/2),  r = sigma_t sqrt(D).

    Data of N numbers in a space of D more, whose charges' field leads from a sphere to the data  (Xu et al. 2022; 2023,
    eq. 4 and 8). eps is multivariate Student's of D degrees of freedom, z sqrt(D/chi^2_D). The flow in sigma is EDM's,
    dx/dsigma = (x - E[x_0|x])/sigma = E[eps|x], of another E[x_0|x] and another prior, so that every sampler without
    noise, adaptive or calibrated, and the likelihood are what they are for :class:`sdekit.HeatODE`, which is D ->
    infinity. There is no reverse SDE. "score" stands for -E[eps|x]/sigma: for D < infinity it is a field, not grad log
    p_t, and -(N + D)/(D + |eps|^2) eps/sigma is what a score would be.

    ``D``: 1 (PFGM) to infinity. ``sigma``, ``T``: as of HeatODE. Raises ValueError for D < 1.
    """

    diffuses = False

    def __init__(self, D: float = 128.0, sigma: Callable[[Tensor], Tensor] | None = None, T: float = 80.0) -> None:
        if not (isinstance(D, int | float) and D >= 1):
            raise ValueError(f"D, the number of dimensions added, must be at least 1, got {D!r}")
        self.D = float(D)
        super().__init__(sigma, T)

    def law(self) -> tuple[Any, ...]:
        """Student's, of D degrees of freedom; the Gaussian where D is infinite."""
        return () if math.isinf(self.D) else ("student", self.D)

    def unit_noise(self, normal: Callable[[], Tensor]) -> Tensor:
        """eps = z sqrt(D/chi^2_D): of two draws, one for the direction, one whose first numbers make the lengths."""
        z, w = normal(), normal()
        if math.isinf(self.D):
            return z
        first = first_entry(w).double().cpu().numpy()
        # chi^2_D at the normal's own probability, the smaller tail of it so that neither loses digits
        low, high = special.ndtr(first), special.ndtr(-first)
        half = torch.from_numpy(
            np.where(low < high, special.gammaincinv(self.D / 2, low), special.gammainccinv(self.D / 2, high))
        )
        factor = (self.D / (2 * half)).sqrt().reshape(-1, *(1,) * (z.ndim - 1))
        return z * factor.to(z)

    def log_kernel(self, off: Tensor, t: Time) -> Tensor:
        """log p(x_t|x_0) but for a constant, of off = x_t - x_0, (B, *event); (B,)."""
        if math.isinf(self.D):
            return super().log_kernel(off, t)
        far = off.square().reshape(len(off), -1).sum(1) / (self.D * self.sigma(as_time(t, self.T)).to(off) ** 2)
        return -(off[0].numel() + self.D) / 2 * torch.log1p(far)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log density (nats) of the prior, the kernel about 0 at T, at x of shape (B, *event); shape (B,)."""
        if math.isinf(self.D):
            return super().prior_log_prob(x)
        sigma, d = float(self.sigma(torch.tensor(self.T, dtype=torch.float64))), math.prod(x.shape[1:])
        half = self.D / 2  # log Gamma(half + d/2) - log Gamma(half) by Stirling's series, where its terms would cancel
        rise = math.lgamma(half + d / 2) - math.lgamma(half)
        if half > 1e6 * (d + 1):
            rise = d / 2 * math.log(half) + d * (d - 2) / (8 * half)
        norm = rise - d / 2 * math.log(math.pi * self.D * sigma**2)
        return norm + self.log_kernel(x, self.T)
