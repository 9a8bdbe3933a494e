"""Forward processes. ``alpha(t)`` and ``sigma(t)`` are the only truth; the rest is derived here, once.

Time runs from data (t = 0) to noise (t = T), and  x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.noise.keyed import Noise
from sdekit.processes.inverse import Inverse
from sdekit.processes.reverse import Reverse
from sdekit.system import Coefficients, Score, System, Time, as_time, expand, holds


def _schedule(method: Callable[[Any, Tensor], Any]) -> Callable[[Any, Time], Tensor]:
    """Let a one-line ``alpha`` or ``sigma`` written for a float64 tensor take any t of the surface."""

    @functools.wraps(method)
    def bordered(self: "SDE", t: Time) -> Tensor:
        time = as_time(t, self.T)
        value = torch.as_tensor(method(self, time), dtype=time.dtype, device=time.device)
        value = value.expand(time.shape) if value.ndim == 0 else value
        return value.to(t.dtype) if isinstance(t, Tensor) and t.is_floating_point() else value

    return bordered


class SDE(System):
    """A Gaussian process  x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I),  t in [0, T].

    A subclass gives ``alpha(t)`` and ``sigma(t)`` with torch operations on a float64 tensor t
    (the base class takes care of floats, dtypes, shapes and the range), and, where the defaults
    do not fit, the class attributes ``T``, ``t_min`` (the earliest time a solver may touch),
    ``grid`` (the name of the grid that stands for "uniform" where the process's own time is not one for even steps) and
    ``unit_level`` (the noise level sigma/alpha that hides the data as 1 does those of unit size: few-step grids' unit).

    As a system, an SDE is its own forward equation  dx = f(t) x dt + g(t) dW  with
    f = d log(alpha)/dt and g^2 = d(sigma^2)/dt - 2 f sigma^2  (Song et al. 2021, eq. 5;
    Karras et al. 2022, appendix B). All coefficients come back in t's dtype (float64 for a float).
    A time outside [0, T] raises ValueError; a time of another type raises TypeError.
    """

    T: float = 1.0
    t_min: float = 1e-3
    grid: str | None = None
    unit_level: float = 1.0
    centred: bool = True  # False: x_t has a mean besides alpha x_0, as a ShiftedSDE's has

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("alpha", "sigma"):
            method = getattr(cls, name)  # the class's own, or one that a plain mixin brings
            if method is not getattr(SDE, name) and not hasattr(method, "__wrapped__"):
                setattr(cls, name, _schedule(method))

    @property
    def interval(self) -> tuple[float, float]:
        """[0, T]: the forward equation may start at the data."""
        return 0.0, self.T

    def alpha(self, t: Any) -> Tensor:
        """The signal's scale at t."""
        raise NotImplementedError(f"{type(self).__name__} needs a method alpha(self, t)")

    def sigma(self, t: Any) -> Tensor:
        """The noise's standard deviation at t."""
        raise NotImplementedError(f"{type(self).__name__} needs a method sigma(self, t)")

    def coefficients(self, t: Time) -> Coefficients:
        """alpha, sigma, f, g^2, alpha' and sigma' at t, float64, by one automatic differentiation of alpha and sigma.

        Where sigma(0) = 0 with a vertical tangent (VP), the derivative at t = 0 is its right-hand
        limit, taken at 1e-12 T. Raises ValueError where g^2 < 0: the noise must grow with t.
        """
        time = as_time(t, self.T)
        alpha, sigma, da, ds2 = self._differentiate(time)
        if not holds(torch.isfinite(da) & torch.isfinite(ds2)):
            limit = self._differentiate(torch.where(torch.isfinite(ds2), time, 1e-12 * self.T))
            da, ds2 = torch.where(torch.isfinite(da), da, limit[2]), torch.where(torch.isfinite(ds2), ds2, limit[3])
        f = da / alpha  # infinite where alpha(T) = 0
        if not holds(torch.isfinite(da) & torch.isfinite(ds2) & (torch.isfinite(f) | (alpha == 0))):
            bad = ~(torch.isfinite(f) & torch.isfinite(ds2)).reshape(-1)
            at = float(time.reshape(-1)[bad][0])
            raise ValueError(f"{type(self).__name__}: alpha or sigma has no finite logarithm or slope at t = {at:g}")
        g2 = ds2 - 2 * f * sigma**2
        if not holds(g2 >= -1e-9 * (ds2.abs() + 2 * f.abs() * sigma**2)):
            at = float(time.reshape(-1)[g2.reshape(-1).argmin()])
            raise ValueError(f"{type(self).__name__}: g^2 < 0 at t = {at:g}; sigma/alpha must increase with t")
        # what is left below 0 of g2 is rounding
        return Coefficients(alpha, sigma, f, g2.clamp_min(0.0), da, ds2 / (2 * sigma))

    def velocity(self, t: Time) -> tuple[Tensor, Tensor]:
        """(m, n) of the velocity m x_0 + n eps that a flow-matching network of this process predicts ("flow").

        (alpha', sigma'): the derivative of x_t along a pair (x_0, eps)  (Lipman et al. 2023).
        """
        c = self.coefficients(t)
        return c.dalpha, c.dsigma

    def _differentiate(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def schedule(u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            alpha, sigma = self.alpha(u), self.sigma(u)
            return alpha, sigma, sigma**2

        try:
            (alpha, sigma, _), da, ds2 = _plain_slopes(schedule, time)
        except RuntimeError:  # inside vmap, jvp and the like only the functional form works; it is ten times slower
            values, pull = torch.func.vjp(schedule, time)[:2]
            alpha, sigma, _ = values
            one, zero = torch.ones_like(time), torch.zeros_like(time)
            (da,), (ds2,) = pull((one, zero, zero)), pull((zero, zero, one))
        return alpha, sigma, da, ds2

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f(t) x, like x."""
        return expand(self.coefficients(t).f, x) * x

    def diffusion(self, t: Time) -> Tensor:
        """g(t) >= 0, of t's shape."""
        g = self.coefficients(t).g2.sqrt()
        return g.to(t.dtype) if isinstance(t, Tensor) and t.is_floating_point() else g

    def marginal(self, x0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Mean alpha(t) x_0 and standard deviation sigma(t) of x_t given x_0; both broadcast with x0."""
        time = as_time(t, self.T)  # float64: the coefficients are rounded to x0's dtype only when they meet it
        return expand(self.alpha(time), x0) * x0, expand(self.sigma(time), x0)

    def transition(self, t: Time, u: Time) -> tuple[Tensor, Tensor]:
        """Scale a and standard deviation s of  x_u | x_t ~ N(a x_t, s^2 I)  for t <= u.

        a = alpha_u/alpha_t and s^2 = sigma_u^2 - a^2 sigma_t^2 = sigma_u^2 (1 - SNR_u/SNR_t), computed in float64
        whatever t's dtype. Raises ValueError where u < t.
        """
        if not self.diffuses:
            raise ValueError(f"{type(self).__name__} is no diffusion, and has no transition from one time to another")
        start, end = as_time(t, self.T), as_time(u, self.T)
        if bool((end < start).any()):
            raise ValueError(f"transition(t, u) runs forwards, t <= u; got t = {t}, u = {u}")
        a_t, s_t, a_u, s_u = self.alpha(start), self.sigma(start), self.alpha(end), self.sigma(end)
        same = end == start  # also where alpha or sigma is 0
        r = torch.where(same, 1.0, (a_u * s_t) / (a_t * s_u)).clamp_max(1.0)  # more is rounding, at t near u
        return torch.where(same, 1.0, a_u / a_t), s_u * ((1 - r) * (1 + r)).sqrt()

    def snr(self, t: Time) -> Tensor:
        """Signal-to-noise ratio alpha^2/sigma^2."""
        return (self.alpha(t) / self.sigma(t)) ** 2

    def half_log_snr(self, t: Time) -> Tensor:
        """lambda(t) = log(alpha/sigma)  (Lu et al. 2022)."""
        return self.alpha(t).log() - self.sigma(t).log()

    def inverse_half_log_snr(self, lam: Time) -> Tensor:
        """The time at which ``half_log_snr`` is lam, in float64, to rounding where it is smooth; whatever the process.

        A table of times, then Newton's method between two of them, with a bisection wherever it would leave them.
        Raises ValueError where lam is not reached in [0, T].
        """
        return Inverse(self)(lam)

    def perturb(self, x0: Tensor, t: Time, *, seed: int | None = None, noise: Tensor | None = None) -> Tensor:
        """A draw of x_t = alpha(t) x_0 + sigma(t) noise, like x0; ``noise`` is of :meth:`unit_noise` unless given."""
        _checks.floating(x0.dtype, "x0")
        if noise is None:
            noise = self.unit_noise(Noise(x0, seed, purpose="perturb").normal)
        elif noise.shape != x0.shape:
            raise ValueError(f"noise must have x0's shape {tuple(x0.shape)}, got {tuple(noise.shape)}")
        mean, std = self.marginal(x0, t)
        return mean + std * noise

    def draw(self, x0: Tensor, t: Time, normal: Callable[[], Tensor]) -> Tensor:
        """The same made of a source of standard normal tensors like x0: what training calls."""
        return self.perturb(x0, t, noise=self.unit_noise(normal))

    def score_weight(self, t: Time) -> Tensor:
        """sigma^2: what score matching multiplies the square of a score by, so that all times count alike."""
        return self.sigma(t) ** 2

    def law(self) -> tuple[Any, ...]:
        """What the process is beside its alpha and sigma; () where x_t | x_0 is N(alpha x_0, sigma^2 I)."""
        return ()

    def unit_noise(self, normal: Callable[[], Tensor]) -> Tensor:
        """eps of x_t = alpha x_0 + sigma eps, from a source of standard normal draws: one of them, or L times one."""
        return self.colour(normal())

    @property
    def white(self) -> "SDE":
        """The process of L^-1 x, whose noise is white: itself, but where there is a ``root``."""
        return self

    def whiten(self, x: Tensor) -> Tensor:
        """L^-1 x, like x."""
        return x

    def colour(self, x: Tensor) -> Tensor:
        """L x, like x."""
        return x if self.root is None else self.root(x)

    def log_volume(self) -> float:
        """log |det L|."""
        return 0.0

    def log_kernel(self, off: Tensor, t: Time) -> Tensor:
        """log p(x_t|x_0) but for a constant, -|off|^2/(2 sigma^2), of off = x_t - alpha x_0, (B, *event); (B,)."""
        return -off.square().reshape(len(off), -1).sum(1) / (2 * self.sigma(as_time(t, self.T)).to(off) ** 2)

    def prior_sample(
        self,
        shape: Sequence[int],
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        t: float | None = None,
        ids: Sequence[int] | None = None,
    ) -> Tensor:
        """A draw from the prior N(0, sigma(t)^2 I) of a solver that starts at t (default T), shape (B, *event)."""
        like = torch.empty(_checks.event_shape(shape), device=device, dtype=dtype)
        eps = self.unit_noise(Noise(like, seed, ids, purpose="prior").normal)
        return float(self.sigma(self.T if t is None else t)) * eps

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log density (nats) of the prior N(0, sigma(T)^2 I) at x of shape (B, *event); shape (B,)."""
        std = float(self.sigma(self.T))
        d = math.prod(x.shape[1:])
        return -0.5 * (x / std).square().reshape(x.shape[0], -1).sum(1) - d * math.log(std * math.sqrt(2 * math.pi))

    def reverse(self, score: Score, churn: float = 1.0) -> Reverse:
        """The reverse family  dx = [f x - (g^2 + nu^2)/2 score] dt + nu dW,  nu = churn g,  dt < 0.

        churn 1 is Anderson's reverse SDE, 0 the probability-flow ODE; all have the marginals p_t.
        """
        return Reverse(self, score, churn)

    def probability_flow(self, score: Score) -> Reverse:
        """The probability-flow ODE  dx/dt = f x - g^2/2 score  (Song et al. 2021, eq. 13)."""
        return self.reverse(score, churn=0.0)

    def denoise(self, x: Tensor, t: Time, score: Score) -> Tensor:
        """E[x_0 | x_t = x] = (x + sigma^2 score(x, t))/alpha  (Tweedie), like x."""
        return self.probability_flow(score).denoise(x, as_time(t, self.T))


def _plain_slopes(
    schedule: Callable[[Tensor], tuple[Tensor, ...]], time: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The schedule and the derivatives of its first and last entry, all of which depend on t entry by entry."""
    outside = time.requires_grad  # somebody differentiates with respect to t: keep the graph
    with torch.inference_mode(False), torch.enable_grad():
        u = time if outside else time.clone().requires_grad_()
        values = schedule(u)

        def slope(y: Tensor) -> Tensor:
            if not y.requires_grad:
                return torch.zeros_like(time)
            (dy,) = torch.autograd.grad(y.sum(), u, create_graph=outside, retain_graph=True)
            return dy

        slopes = slope(values[0]), slope(values[-1])
    return (values if outside else tuple(y.detach() for y in values)), *slopes
