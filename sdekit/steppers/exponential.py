"""What the exponential rules share: the linear part of the flow solved exactly, the prediction under an integral.

With r = sigma/alpha = e^-lambda, y = x/alpha and k = 1 + churn^2, the reverse family is  dy = k eps dr + noise. What is
predicted (x_0, eps, ...) gives eps as a function of y and the prediction p: eps = (phi'/phi) y + (b/phi) p, and so
    x_s = alpha_s/alpha_t (phi_s/phi_t)^k x_t + k alpha_s integral of (phi_s/phi)^k (b/phi) p dr + std z,
    std^2 = 2 churn^2 alpha_s^2 integral of (phi_s/phi)^(2k) r^2 dlambda,  over [lambda_t, lambda_s].
For x_0 and eps these are the forms of DPM-Solver++ and DPM-Solver (Lu et al. 2022b, proposition 4.1; 2022a,
proposition 3.1) and, with noise, of SA-Solver (Xue et al. 2023, proposition 4.2). A rule puts a polynomial through
predictions under the integral, which is taken by Gauss-Legendre quadrature in float64: nothing cancels as the step goes
to 0, where phi-functions in closed form lose all digits.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from sdekit.system import Levels

_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(24))
_FRACTIONS = (_NODES + 1) / 2


class Prediction(NamedTuple):
    """What a rule interpolates:  p = scale score + mix x,  and how the flow depends on it."""

    log_phi: Callable[[Tensor], Tensor]  # of lambda
    b: float
    scale: Callable[[Tensor, Tensor], Tensor]  # of alpha and sigma, as mix
    mix: Callable[[Tensor, Tensor], Tensor]


# phi = r, 1, sqrt(1 + r^2), 1 + r. The unit v is (alpha eps - sigma x_0)/sqrt(alpha^2 + sigma^2); flow is eps - x_0,
# the velocity of the rectified flow that every process becomes when x and time are scaled.
PREDICTIONS: dict[str, Prediction] = {
    "x0": Prediction(lambda lam: -lam, -1.0, lambda a, s: s**2 / a, lambda a, s: 1 / a),
    "eps": Prediction(torch.zeros_like, 1.0, lambda a, s: -s, lambda a, s: torch.zeros_like(s)),
    "v": Prediction(
        lambda lam: softplus(-2 * lam) / 2,
        1.0,
        lambda a, s: -s / a * torch.hypot(a, s),
        lambda a, s: -s / a / torch.hypot(a, s),
    ),
    "flow": Prediction(lambda lam: softplus(-lam), 1.0, lambda a, s: -s / a * (a + s), lambda a, s: -1 / a),
}


# The variable that the predictions are a polynomial of, as a function of the system and half log-SNR.
CLOCKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "half_log_snr": lambda system, lam: lam,
    "karras": lambda system, lam: torch.exp(-lam),
    "flow": lambda system, lam: torch.sigmoid(-lam),
    "t": lambda system, lam: system.sde.inverse_half_log_snr(lam.reshape(-1)).reshape(lam.shape),
}


class Integrand(NamedTuple):
    """N steps: x_s = linear x_t + sum over quadrature points of kernel p + std z."""

    linear: Tensor  # (N,)
    std: Tensor  # (N,)
    kernel: Tensor  # (N, Q)
    at: Tensor  # (N, Q), half log-SNR


def integrand(kind: Prediction, churn: float, start: Levels, end: Levels) -> Integrand:
    """The exact solution of the reverse family from each level of ``start`` (N,) to that of ``end`` (N,)."""
    k, lam_s = 1 + churn**2, end.lam[:, None]
    h = lam_s - start.lam[:, None]
    at, dlam = start.lam[:, None] + h * _FRACTIONS, h * _WEIGHTS / 2
    log_phi, log_phi_s = kind.log_phi(at), kind.log_phi(lam_s)
    kernel = -k * kind.b * end.alpha[:, None] * torch.exp(k * (log_phi_s - log_phi) - log_phi - at) * dlam
    linear = end.alpha / start.alpha * torch.exp(k * (kind.log_phi(end.lam) - kind.log_phi(start.lam)))
    std = torch.zeros_like(linear)
    if churn:
        std = churn * end.alpha * (2 * (torch.exp(2 * k * (log_phi_s - log_phi) - 2 * at) * dlam).sum(1)).sqrt()
    return Integrand(linear, std, kernel, at)


def frozen(g: Integrand, place: Tensor) -> Integrand:
    """The kernel's mean for the kernel, over steps between the nodes ``place`` (N + 1,) of a clock."""
    at = place[:-1, None] + place.diff()[:, None] * _FRACTIONS
    return g._replace(kernel=g.kernel.sum(1, keepdim=True) * _WEIGHTS / 2, at=at)


def interpolate(kernel: Tensor, at: Tensor, nodes: Tensor) -> Tensor:
    """The integrals of kernel times each Lagrange polynomial through ``nodes`` (N, k), all in one clock: (N, k)."""
    k = nodes.shape[1]
    factors = [
        [(at - nodes[:, m, None]) / (nodes[:, j, None] - nodes[:, m, None]) for m in range(k) if m != j]
        for j in range(k)
    ]
    return torch.stack([reduce(torch.mul, f, kernel).sum(1) for f in factors], dim=1)


def predict(x: Tensor, score: Tensor, scale: float, mix: float) -> Tensor:
    """scale score + mix x, always in a new tensor: a network may write its next result where this score is."""
    p = score * scale
    return p.add_(x, alpha=mix) if mix else p


def weighted(x: Tensor, linear: float, terms: tuple[Tensor, ...], weights: list[float]) -> Tensor:
    """linear x + sum of weight times term, in a new tensor; in place where it is already ours."""
    total = x * linear
    for term, weight in zip(terms, weights, strict=False):
        total.add_(term, alpha=weight)
    return total
