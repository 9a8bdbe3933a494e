"""Processes of one's own drift F(t) x + c(t) and diffusion g(t): their moments by quadrature."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import asked
from sdekit.processes.law import digest
from sdekit.processes.sde import SDE
from sdekit.system import Coefficients, Time, as_time, expand, float64, holds

_NODES, _MOST = 16, 4096
_RTOL = 1e-12


class ShiftedSDE(SDE):
    """A process with a mean of its own beside the data's:  x_t | x_0 ~ N(alpha(t) x_0 + m(t), sigma(t)^2 I).

    A subclass gives ``offset(t, x)``, m(t) as it is added to x. Solvers run on x - m(t), which has none; what they take
    and give, and what a network gets, is x. Models made of models that use x itself (thresholds, posterior scores,
    ``under``, guidance in another kind) do not know m, and are refused.
    """

    centred = False

    def offset(self, t: Time, x: Tensor) -> Tensor:
        """m(t), of a shape that goes with x (B, *event); t is 0-d or (B,)."""
        raise NotImplementedError(f"{type(self).__name__} needs a method offset(self, t, x)")

    def law(self) -> tuple[Any, ...]:
        """A mean of its own."""
        return ("mean", type(self).__name__)

    def centre(self, x: Tensor, t: Time) -> Tensor:
        """x - m(t), like x."""
        return x if self.centred else x - self.offset(t, x)

    def place(self, x: Tensor, t: Time) -> Tensor:
        """x of x - m(t), like x."""
        return x if self.centred else x + self.offset(t, x)

    def common(self, x: Tensor) -> bool:
        """Whether m is the same for all samples like x."""
        return True

    def marginal(self, x0: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        """Mean alpha(t) x_0 + m(t) and standard deviation sigma(t)."""
        mean, std = super().marginal(x0, t)
        return mean + self.offset(t, x0), std

    def prior_sample(self, shape: Any, *, t: float | None = None, **options: Any) -> Tensor:
        """A draw from the prior N(m(t), sigma(t)^2 I), t = T unless given."""
        x = super().prior_sample(shape, t=t, **options)
        return x + self.offset(self.T if t is None else t, x)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log density (nats) of the prior N(m(T), sigma(T)^2 I)."""
        return super().prior_log_prob(x - self.offset(self.T, x))

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """f(t) (x - m(t)) + m'(t), like x; m' by differences of m, in float64."""
        time, wide = as_time(t, self.T), x.to(float64(x.device))
        h = 1e-6 * self.T
        low, high = (time - h).clamp_min(0.0), (time + h).clamp_max(self.T)
        slope = (self.offset(high, wide) - self.offset(low, wide)) / expand(high - low, wide)
        return super().drift(x - self.offset(time, x), time) + slope.to(x.dtype)

    def denoise(self, x: Tensor, t: Time, score: Any) -> Tensor:
        """E[x_0 | x_t = x], like x."""
        return super().denoise(x - self.offset(t, x), t, score)


class AffineSDE(ShiftedSDE):
    """dx = (F(t) x + c(t)) dt + g(t) dW from x_0: alpha, sigma and the mean by the moment equations

        alpha' = F alpha,   m' = F m + c,   (sigma^2)' = 2 F sigma^2 + g^2,   alpha(0) = 1, m(0) = sigma(0) = 0

    (Sarkka & Solin 2019, section 6.1), integrated by Gauss's formula on panels, as many as make 1e-12 of them.

    ``F``, ``c``, ``g``: numbers, or functions of a float64 tensor t by torch operations, entry by entry; c and its
    mean are the same for all entries of x, or ``along`` (*event) times that. Any level of noise: ``T``, ``t_min``.
    Raises ValueError for functions that are not finite on [0, T], not smooth enough for 4,096 panels, or moments that
    explode; TypeError for what is no function.
    """

    def __init__(
        self,
        F: float | Callable[[Tensor], Any],
        g: float | Callable[[Tensor], Any],
        c: float | Callable[[Tensor], Any] = 0.0,
        *,
        along: Tensor | None = None,
        T: float = 1.0,
        t_min: float = 1e-4,
    ) -> None:
        self.T = self._end = _checks.positive(T, "T")  # T may be set lower; the table goes to the end
        self.t_min = _checks.positive(t_min, "t_min")
        self._F, self._g, self._c = (_function(y, name) for y, name in ((F, "F"), (g, "g"), (c, "c")))
        self.along = None if along is None else _checks.state(along[None], "along")[0]
        self._last: tuple[Any, Any] = (None, None)
        panels = 8
        table = self._tabled(panels)
        while True:
            panels *= 2
            finer = self._tabled(panels)
            off = ((finer[::2] - table).abs() / (1e-3 + finer[::2].abs())).amax()
            table = finer
            if off < _RTOL:
                break
            if panels >= _MOST:
                raise ValueError(
                    f"F, c or g is not smooth enough on [0, {self.T:g}]: {_MOST} panels leave {float(off):.2g} of the "
                    "moments open; a process that begins or ends in a singularity needs another T or time"
                )
        self._table, self.centred = table, not bool((table[:, 1] != 0).any())
        if not float(self.half_log_snr(self.t_min)) < math.inf:
            raise ValueError(f"g must be > 0 somewhere before t_min = {self.t_min:g}, where there is no noise yet")

    def _tabled(self, panels: int) -> Tensor:
        """log alpha, m and sigma^2 at the ends of so many panels, (panels + 1, 3)."""
        ends = torch.linspace(0, self.T, panels + 1, dtype=torch.float64)
        steps = self._steps(ends[:-1], ends[1:])
        rows = [torch.zeros(3, dtype=torch.float64)]
        for log_a, m, v in steps.unbind():
            a = log_a.exp()
            rows.append(torch.stack([rows[-1][0] + log_a, a * rows[-1][1] + m, a**2 * rows[-1][2] + v]))
        table = torch.stack(rows)
        if not torch.isfinite(table).all() or bool((table[:, 0].abs() > 600).any()):
            bad = ~(torch.isfinite(table).all(1) & (table[:, 0].abs() <= 600))
            raise ValueError(f"the moments explode by t = {float(ends[int(bad.int().argmax())]):g}: set T lower")
        return table

    def _steps(self, start: Tensor, end: Tensor) -> Tensor:
        """log alpha, m and sigma^2 of the process that is begun at ``start`` in 0, at ``end``, (n, 3)."""
        x, w, q = (y.to(start.device) for y in _gauss())
        h = (end - start)[:, None]
        s = start[:, None] + h * x
        F, c, g = (_finite(f(s), s, name) for f, name in ((self._F, "F"), (self._c, "c"), (self._g, "g")))
        whole = (h * F) @ w  # the integral of F over all of it
        left = whole[:, None] - h * F @ q.mT  # and from each node on
        return torch.stack([whole, (h * c * left.exp()) @ w, (h * g**2 * (2 * left).exp()) @ w], 1)

    def _moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log alpha, m and sigma^2 at t; those of the last t are kept, since alpha, sigma and m are asked in turn."""
        last, known = self._last
        if t.requires_grad or torch.is_inference_mode_enabled():  # what is kept is for a later mode too
            return self._made(t)
        try:
            if last is not None and last.shape == t.shape and last.device == t.device and torch.equal(last, t):
                return known
        except RuntimeError:  # vmap knows no equal
            return self._made(t)
        made = self._made(t)
        self._last = t.clone(), made
        return made

    def _made(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat, table = t.reshape(-1), self._table.to(t.device)
        n = len(table) - 1
        k = (flat.detach() * (n / self._end)).long().clamp(0, n - 1)
        start = (k.to(flat) * (self._end / n)).minimum(flat.detach())
        log_a, m, v = self._steps(start, flat).unbind(1)
        log_0, m_0, v_0 = table[k].unbind(1)
        a = log_a.exp()
        return tuple(y.reshape(t.shape) for y in (log_0 + log_a, a * m_0 + m, a**2 * v_0 + v))  # type: ignore[return-value]

    def law(self) -> tuple[Any, ...]:
        """Its mean, where c is not 0."""
        own = [self._table] if self.along is None else [self._table, self.along]
        return () if self.centred else ("mean", digest(*own))

    def alpha(self, t: Tensor) -> Tensor:
        """exp of the integral of F."""
        return self._moments(t)[0].exp()

    def sigma(self, t: Tensor) -> Tensor:
        """The root of the integral of g(s)^2 (alpha(t)/alpha(s))^2."""
        return self._moments(t)[2].sqrt()

    def mean(self, t: Time) -> Tensor:
        """m(t), of t's shape, float64: the integral of c(s) alpha(t)/alpha(s)."""
        return self._moments(as_time(t, self.T))[1].clone()

    def offset(self, t: Time, x: Tensor) -> Tensor:
        """m(t), ``along`` times it where that is given."""
        m = expand(self.mean(t), x)
        return (m if self.along is None else m * self.along.to(x)).to(x)

    def coefficients(self, t: Time) -> Coefficients:
        """alpha and sigma, and F and g^2 as they were given."""
        time = as_time(t, self.T)
        log_a, _, v = self._moments(time)
        F, g = (torch.as_tensor(f(time), dtype=torch.float64, device=time.device).expand(time.shape)
                for f in (self._F, self._g))  # fmt: skip
        alpha, sigma = log_a.exp(), v.sqrt()
        slope = torch.where(v > 0, (F * v + g**2 / 2) / sigma, math.inf)
        return Coefficients(alpha, sigma, F, g**2, F * alpha, slope)

    def drift(self, x: Tensor, t: Time) -> Tensor:
        """F(t) x + c(t), like x."""
        time = as_time(t, self.T)
        F, c = (expand(torch.as_tensor(f(time), dtype=torch.float64).expand(time.shape), x) for f in (self._F, self._c))
        return F * x + (c if self.along is None else c * self.along.to(x))


class BridgeSDE(ShiftedSDE):
    """Between data and a known y: the Brownian bridge  x_t = (1 - t) x_0 + t y + s sqrt(t (1 - t)) eps,  s = ``scale``.

    Its reverse leads from y, restored with noise, to x_0  (Liu et al. 2023, I2SB, eq. 11 with constant beta; Li et al.
    2023, BBDM). ``y``: (*event) for all samples, or (B, *event), each sample's own, which follows it. T is .9999, where
    the prior N(T y, s^2 T (1 - T)) leaves out (1 - T) x_0, which is .01 x_0/s of its standard deviations. The bundled
    trainer, which shuffles, takes a y for all samples alone. Raises ValueError for scale <= 0.
    """

    T = 0.9999

    def __init__(self, y: Tensor, scale: float = 1.0) -> None:
        self.y, self.scale = _checks.state(y, "y"), _checks.positive(scale, "scale")

    def law(self) -> tuple[Any, ...]:
        """Its y."""
        return ("mean", digest(self.y))

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """s sqrt(t (1 - t))."""
        return self.scale * (t * (1 - t)).sqrt()

    def common(self, x: Tensor) -> bool:
        """Whether y is one for all samples like x."""
        return self.y.ndim < x.ndim or len(self.y) == 1

    def offset(self, t: Time, x: Tensor) -> Tensor:
        """t y, of the samples that x are."""
        return expand(as_time(t, self.T), x) * _own(self.y, x)


def _own(y: Tensor, x: Tensor) -> Tensor:
    """y of the samples that x are, like x."""
    y = y.to(x)
    if y.ndim < x.ndim:
        return y
    here = asked()
    rows, total = (None, len(x)) if here is None else here
    if len(y) not in (1, total):
        raise ValueError(f"y was given for {len(y)} samples, and x has {total}: one for each, or one for all")
    return y[rows.to(y.device)] if rows is not None and len(y) == total else y


def _function(y: Any, name: str) -> Callable[[Tensor], Any]:
    if callable(y):
        return y
    y = y.item() if isinstance(y, Tensor) and y.ndim == 0 else y
    if isinstance(y, int | float) and math.isfinite(y):
        return partial(torch.full_like, fill_value=float(y))
    raise TypeError(f"{name} must be a finite number or a function of t by torch operations, got {y!r}")


def _finite(value: Any, at: Tensor, name: str) -> Tensor:
    value = torch.as_tensor(value, dtype=at.dtype, device=at.device).expand(at.shape)
    if not holds(torch.isfinite(value)):
        t = float(at[~torch.isfinite(value)][0])
        raise ValueError(
            f"{name} must be finite on [0, T]: at t = {t:g} it is {float(value[~torch.isfinite(value)][0])}"
        )
    return value


@cache
def _gauss() -> tuple[Tensor, Tensor, Tensor]:
    """Gauss's nodes and weights on [0, 1], and q[i, j]: the integral of j's interpolating polynomial from 0 to i."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    degrees = np.arange(_NODES)
    values = np.polynomial.legendre.legvander(nodes, _NODES - 1)
    integrals = np.stack(
        [
            np.polynomial.legendre.legval(nodes, np.polynomial.legendre.legint(np.eye(_NODES)[k], lbnd=-1))
            for k in degrees
        ],
        1,
    )
    q = integrals @ np.linalg.inv(values) / 2
    with torch.inference_mode(False):  # they are kept
        return torch.from_numpy((nodes + 1) / 2), torch.from_numpy(weights / 2), torch.from_numpy(q)
