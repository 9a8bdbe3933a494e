"""What the exponential rules share: the linear part of the flow solved exactly, the prediction under an integral.

With r = sigma/alpha = e^-lambda, y = x/alpha and k = 1 + churn^2, the reverse family is  dy = k eps dr + noise. What is
predicted (x_0, eps, ...) gives eps as a function of y and the prediction p: eps = (phi'/phi) y + (b/phi) p, and so
    x_s = alpha_s/alpha_t (phi_s/phi_t)^k x_t + k alpha_s integral of (phi_s/phi)^k (b/phi) p dr + std z,
    std^2 = 2 churn^2 alpha_s^2 integral of (phi_s/phi)^(2k) r^2 dlambda,  over [lambda_t, lambda_s].
For x_0 and eps these are the forms of DPM-Solver++ and DPM-Solver (Lu et al. 2022b, proposition 4.1; 2022a,
proposition 3.1) and, with noise, of SA-Solver (Xue et al. 2023, proposition 4.2). A rule puts a polynomial through
predictions under the integral, which is taken by Gauss-Legendre quadrature in float64: nothing cancels as the step goes
to 0, where phi-functions in closed form lose all digits.

Where alpha(T) = 0, lambda starts at -infinity. alpha phi does not: it is sigma for x_0, alpha + sigma for flow, and
only for eps, whose integral has no limit, 0; there rules of eps take eps - x_0/100 instead. What is a polynomial in
lambda becomes one in log(alpha/sigma + 1/1000), and one in r one in the inverse of alpha/sigma + 1/1000: nearly the
same where there is signal, and smooth where there is none.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdekit.processes.kinds import Kind
from sdekit.system import Levels

# Gauss-Legendre points and weights of [0, 1] by their number: 8 are exact to rounding for exponents up to 1/2.
QUADRATURE = {
    n: tuple(torch.from_numpy(a) / 2 for a in (points + 1, weights))
    for n, (points, weights) in ((n, np.polynomial.legendre.leggauss(n)) for n in (8, 24))
}
_ONE = torch.ones((), dtype=torch.float64)
_LITTLE = 1e-3  # of alpha/sigma: 1,000 is a noise level that data of unit size do not tell from infinity
FAR = 1e30  # a node at infinity leaves the polynomial through the others alone


class Prediction(NamedTuple):
    """What a rule interpolates, and how the flow depends on it."""

    log_phi: Callable[[Tensor], Tensor]  # of lambda
    b: float
    kind: Callable[[Tensor, Tensor], Kind]  # of alpha and sigma

    def size(self, lv: Levels) -> Tensor:
        """alpha phi, by which x is divided where the linear part is nothing."""
        m, n = self.kind(lv.alpha, lv.sigma)
        return self.b * (lv.alpha * n - lv.sigma * m)


# phi = r, 1, sqrt(1 + r^2), 1 + r. The unit v is (alpha eps - sigma x_0)/sqrt(alpha^2 + sigma^2); flow is eps - x_0,
# the velocity of the rectified flow that every process becomes when x and time are scaled. All by exp, log and sqrt:
# torch computes these alike at every place of a batch, but not hypot, softplus and sigmoid.
PREDICTIONS: dict[str, Prediction] = {
    "x0": Prediction(lambda lam: -lam, -1.0, lambda a, s: Kind(torch.ones_like(a), torch.zeros_like(a))),
    "eps": Prediction(torch.zeros_like, 1.0, lambda a, s: Kind(torch.zeros_like(a), torch.ones_like(a))),
    "v": Prediction(lambda lam: torch.exp(-2 * lam).log1p() / 2, 1.0, lambda a, s: _unit_v(a, s)),
    "flow": Prediction(
        lambda lam: torch.exp(-lam).log1p(), 1.0, lambda a, s: Kind(-torch.ones_like(a), torch.ones_like(a))
    ),
}


# eps - x_0/100, for grids where alpha = 0: there eps itself has no integral.
_EPS = Prediction(
    lambda lam: (0.01 * torch.exp(-lam)).log1p(),
    1.0,
    lambda a, s: Kind(torch.full_like(a, -0.01), torch.ones_like(a)),
)


def _unit_v(alpha: Tensor, sigma: Tensor) -> Kind:
    size = (alpha * alpha + sigma * sigma).sqrt()
    return Kind(-sigma / size, alpha / size)


def bounded(lam: Tensor) -> Tensor:
    """log(alpha/sigma + 1/1000), which is finite where alpha = 0."""
    return torch.where(lam > 30, lam, (torch.exp(lam.clamp_max(30)) + _LITTLE).log())


def _flow(lam: Tensor) -> Tensor:
    """sigma/(alpha + sigma)."""
    return 1 / (1 + torch.exp(lam))


# The variable that the predictions are a polynomial of, as a function of the system and half log-SNR.
CLOCKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "half_log_snr": lambda system, lam: lam,
    "karras": lambda system, lam: torch.exp(-lam),
    "flow": lambda system, lam: _flow(lam),
    "t": lambda system, lam: system.sde.inverse_half_log_snr(lam.reshape(-1)).reshape(lam.shape),
}
_BOUNDED: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "half_log_snr": lambda system, lam: bounded(lam),
    "karras": lambda system, lam: torch.exp(-bounded(lam)),
}


def fitting(prediction: str, clock: str, lv: Levels) -> tuple[Prediction, Callable[[Any, Tensor], Tensor]]:
    """What to interpolate and in which variable on these levels: what is named, or what stands for it at alpha = 0."""
    if not without_signal(lv):
        return PREDICTIONS[prediction], CLOCKS[clock]
    kind = _EPS if prediction == "eps" else PREDICTIONS[prediction]
    return kind, {**CLOCKS, **_BOUNDED}[clock]


def without_signal(*levels: Levels) -> bool:
    """Whether there is none at one of the levels."""
    return any(bool(torch.isinf(lv.lam.detach()).any()) for lv in levels)


def between(start: Levels, end: Levels, c: float) -> Tensor:
    """The half log-SNR at the fraction c of each step, in whichever form of it is finite."""
    if not without_signal(start, end):
        return torch.lerp(start.lam, end.lam, c)
    place = torch.lerp(bounded(start.lam), bounded(end.lam), c)
    return torch.where(place > 30, place, (torch.exp(place.clamp_max(30)) - _LITTLE).log())


class Integrand(NamedTuple):
    """N steps: x_s = linear x_t + sum over quadrature points of kernel p + std z."""

    linear: Tensor  # (N,)
    std: Tensor  # (N,)
    kernel: Tensor  # (N, Q)
    at: Tensor  # (N, Q), half log-SNR


def grid_levels(system: Any, times: list[float]) -> Levels:
    """The levels of a grid. Raises ValueError where sigma/alpha does not grow with t."""
    lv = system.levels(torch.tensor(times, dtype=torch.float64))
    wrong = (~(lv.lam.diff() * lv.time.diff() < 0)).nonzero()  # NaN, of two nodes with alpha = 0, is wrong too
    if len(wrong):
        at = float(lv.time[wrong[0, 0]])
        raise ValueError(f"{type(system.sde).__name__}: sigma/alpha must increase with t, but does not at t = {at:g}")
    return lv


def integrand(kind: Prediction, churn: float, start: Levels, end: Levels) -> Integrand:
    """The exact solution of the reverse family from each level of ``start`` (N,) to that of ``end`` (N,)."""
    k, lam_s = 1 + churn**2, end.lam[:, None]
    at, dlam = _quadrature(start.lam[:, None], lam_s, k)
    log_phi, log_phi_s = kind.log_phi(at), kind.log_phi(lam_s)
    more = churn**2 * (log_phi_s - log_phi) if churn else 0.0  # log of (phi_s/phi)^(k - 1)
    kernel = -k * kind.b * kind.size(end)[:, None] * torch.exp(more - 2 * log_phi - at) * dlam
    linear, std = kind.size(end) / kind.size(start), torch.zeros_like(end.alpha)
    if churn:
        linear = linear * torch.exp(churn**2 * (kind.log_phi(end.lam) - kind.log_phi(start.lam)))
        noise = torch.exp(2 * k * (log_phi_s - log_phi) - 2 * at) * dlam
        variance = 2 * churn**2 * noise.sum(1)
        if without_signal(start):
            # From -infinity it grows as e^(2 churn^2 lam) alone: by parts, with d log(phi/r)/dlam, which falls as 1/r.
            m, n = kind.kind(torch.exp(at), torch.ones_like(at))
            by_parts = torch.exp(-2 * end.lam) + 2 * k * (noise * n / (n - m * torch.exp(-at))).sum(1)
            variance = torch.where(torch.isinf(start.lam), by_parts, variance)
        std = end.alpha * variance.sqrt()
    return Integrand(linear, std, kernel, at)


def _quadrature(start: Tensor, end: Tensor, k: float) -> tuple[Tensor, Tensor]:
    """Points (N, Q) of half log-SNR in steps from start to end (N, 1), and their weights.

    Towards -infinity the integrands fall like e^(k lam): in z, with lam = end + 4 log z, they are smooth on [0, 1].
    """
    h = end - start
    finite = torch.isfinite(h.detach())
    points = 8 if bool(finite.all()) and k * float(h.detach().abs().max()) <= 0.5 else 24  # what the largest step needs
    nodes, weights = QUADRATURE[points]
    if bool(finite.all()):
        return start + h * nodes, h * weights
    other = torch.where(torch.isinf(start), end, start)
    at = torch.where(finite, start + torch.where(finite, h, 0.0) * nodes, other + 4 * nodes.log())
    dlam = torch.where(finite, torch.where(finite, h, 0.0) * weights, torch.sign(h) * 4 * weights / nodes)
    return at, dlam


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


class Stored(NamedTuple):
    """How predictions a output + b x are stored, in one operation: what is left out of each is in the weights."""

    whole: Tensor  # what is left out
    reach: Tensor  # stored is  x + reach output  or  output + reach x
    x_first: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor, said: Kind, lv: Levels) -> "Stored":
        """With x first where x is not much the smaller term: then half precision has room for both."""
        x, out = torch.hypot(lv.alpha, lv.sigma), torch.hypot(*said)
        x_first = 2 * (b.abs() * x).detach() >= (a.abs() * out).detach()
        whole = torch.where(x_first, b, a)
        return cls(whole, torch.where(x_first, a, b) / whole, x_first)


def stored(x: Tensor, output: Tensor, reach: float, x_first: bool) -> Tensor:
    """The prediction as it is stored."""
    return torch.add(x, output, alpha=reach) if x_first else torch.add(output, x, alpha=reach)


def scalars(values: Tensor, dtype: torch.dtype) -> Sequence[Tensor]:
    """Numbers that multiply x, as 0-d CPU tensors: of its own dtype (at least float32) at half the cost of floats."""
    return values.to(torch.promote_types(dtype, torch.float32)).unbind()


def add_weighted(total: Tensor, terms: Iterable[Tensor], weights: Iterable[float]) -> Tensor:
    """total + sum of weight times term, in total's memory; of the terms only as many as there are weights."""
    for term, weight in zip(terms, weights):  # noqa: B905
        total.add_(term, alpha=weight)
    return total
