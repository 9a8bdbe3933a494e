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

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdekit.system import Levels

# Gauss-Legendre points and weights of [0, 1] by their number: 8 are exact to rounding for exponents up to 1/2.
QUADRATURE = {
    n: tuple(torch.from_numpy(a) / 2 for a in (points + 1, weights))
    for n, (points, weights) in ((n, np.polynomial.legendre.leggauss(n)) for n in (8, 24))
}
_ONE = torch.ones((), dtype=torch.float64)
FAR = 1e30  # a node at infinity leaves the polynomial through the others alone


class Prediction(NamedTuple):
    """What a rule interpolates:  p = scale score + mix x,  and how the flow depends on it."""

    log_phi: Callable[[Tensor], Tensor]  # of lambda
    b: float
    scale: Callable[[Tensor, Tensor], Tensor]  # of alpha and sigma, as mix
    mix: Callable[[Tensor, Tensor], Tensor]


# phi = r, 1, sqrt(1 + r^2), 1 + r. The unit v is (alpha eps - sigma x_0)/sqrt(alpha^2 + sigma^2); flow is eps - x_0,
# the velocity of the rectified flow that every process becomes when x and time are scaled. All by exp, log and sqrt:
# torch computes these alike at every place of a batch, but not hypot, softplus and sigmoid.
PREDICTIONS: dict[str, Prediction] = {
    "x0": Prediction(lambda lam: -lam, -1.0, lambda a, s: s**2 / a, lambda a, s: 1 / a),
    "eps": Prediction(torch.zeros_like, 1.0, lambda a, s: -s, lambda a, s: torch.zeros_like(s)),
    "v": Prediction(
        lambda lam: torch.exp(-2 * lam).log1p() / 2,
        1.0,
        lambda a, s: -s / a * (a * a + s * s).sqrt(),
        lambda a, s: -s / a / (a * a + s * s).sqrt(),
    ),
    "flow": Prediction(lambda lam: torch.exp(-lam).log1p(), 1.0, lambda a, s: -s / a * (a + s), lambda a, s: -1 / a),
}


# The variable that the predictions are a polynomial of, as a function of the system and half log-SNR.
CLOCKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "half_log_snr": lambda system, lam: lam,
    "karras": lambda system, lam: torch.exp(-lam),
    "flow": lambda system, lam: 1 / (1 + torch.exp(lam)),
    "t": lambda system, lam: system.sde.inverse_half_log_snr(lam.reshape(-1)).reshape(lam.shape),
}


class Integrand(NamedTuple):
    """N steps: x_s = linear x_t + sum over quadrature points of kernel p + std z."""

    linear: Tensor  # (N,)
    std: Tensor  # (N,)
    kernel: Tensor  # (N, Q)
    at: Tensor  # (N, Q), half log-SNR


def grid_levels(system: Any, times: list[float]) -> Levels:
    """The levels of a grid. Raises ValueError where sigma/alpha does not grow with t."""
    lv = system.levels(torch.tensor(times, dtype=torch.float64))
    wrong = (lv.lam.diff() * lv.time.diff() >= 0).nonzero()
    if len(wrong):
        at = float(lv.time[wrong[0, 0]])
        raise ValueError(f"{type(system.sde).__name__}: sigma/alpha must increase with t, but does not at t = {at:g}")
    return lv


def integrand(kind: Prediction, churn: float, start: Levels, end: Levels) -> Integrand:
    """The exact solution of the reverse family from each level of ``start`` (N,) to that of ``end`` (N,)."""
    k, lam_s = 1 + churn**2, end.lam[:, None]
    h = lam_s - start.lam[:, None]
    points = 8 if k * float(h.detach().abs().max()) <= 0.5 else 24  # what the largest step needs
    nodes, weights = QUADRATURE[points]
    at, dlam = start.lam[:, None] + h * nodes, h * weights
    log_phi, log_phi_s = kind.log_phi(at), kind.log_phi(lam_s)
    kernel = -k * kind.b * end.alpha[:, None] * torch.exp(k * (log_phi_s - log_phi) - log_phi - at) * dlam
    linear = end.alpha / start.alpha * torch.exp(k * (kind.log_phi(end.lam) - kind.log_phi(start.lam)))
    std = torch.zeros_like(linear)
    if churn:
        std = churn * end.alpha * (2 * (torch.exp(2 * k * (log_phi_s - log_phi) - 2 * at) * dlam).sum(1)).sqrt()
    return Integrand(linear, std, kernel, at)


def frozen(g: Integrand, place: Tensor) -> Integrand:
    """The kernel's mean for the kernel, over steps between the nodes ``place`` (N + 1,) of a clock."""
    points, weights = QUADRATURE[g.kernel.shape[1]]
    at = place[:-1, None] + place.diff()[:, None] * points
    return g._replace(kernel=g.kernel.sum(1, keepdim=True) * weights, at=at)


def interpolate(kernel: Tensor, at: Tensor, nodes: Tensor) -> Tensor:
    """The integrals of kernel times each Lagrange polynomial through ``nodes`` (N, k), all in one clock: (N, k)."""
    away = [at - node for node in nodes[..., None].unbind(1)]
    before = accumulate(away[:-1], torch.mul, initial=kernel)
    after = [*accumulate(away[:0:-1], torch.mul)][::-1]
    integrals = torch.stack([(b * a).sum(1) for b, a in zip_longest(before, after, fillvalue=_ONE)], dim=1)
    apart = nodes[:, :, None] - nodes[:, None, :] + torch.eye(nodes.shape[1], dtype=torch.float64)
    return integrals / apart.prod(2)


def unit(scale: Tensor, mix: Tensor) -> Tensor:
    """What is left out of a prediction where it is stored: p = unit (x + scale/mix score), or unit score without x.

    So every prediction is one operation on tensors, and the rest is in the weights.
    """
    return torch.where(mix == 0, scale, mix)


def scalars(values: Tensor, x: Tensor) -> Sequence[Tensor]:
    """Numbers that multiply x, as 0-d CPU tensors: of its own dtype (at least float32) at half the cost of floats."""
    return values.to(torch.promote_types(x.dtype, torch.float32)).unbind()


def add_weighted(total: Tensor, terms: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """total + sum of weight times term, in total's memory; of the terms only as many as there are weights."""
    for term, weight in zip(terms, weights):  # noqa: B905
        total.add_(term, alpha=weight)
    return total
