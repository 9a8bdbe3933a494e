"""Scores of p(x_t | y) from a score of p(x_t): a model in, a model out.

With x̂ = E[x_0|x_t] and V = Cov[x_0|x_t] = (sigma^2/alpha) dx̂/dx (Tweedie, differentiated), all methods here take
p(y|x_t) to be N(A x̂, S) and differ in S:  E[x_0|x_t, y] = x̂ + V A' S^-1 (y - A x̂).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import only_real
from sdekit.models.derived import Derived, columns, fitting, leaf
from sdekit.models.guided import each
from sdekit.posterior.local import NO_GRADIENT, Local, conjugate_gradients
from sdekit.posterior.observation import Observation
from sdekit.processes.counted import as_model, ask
from sdekit.processes.kinds import Kind, express, kind_of
from sdekit.processes.law import require_white
from sdekit.processes.reverse import levels_of
from sdekit.processes.sde import SDE
from sdekit.system import Score, differentiating, holds, ordinary

DENSE = 128  # up to so many entries of y a covariance is made whole where its determinant is asked for


_POSITIVE = 1 - 1e-3  # of S over std^2 along any direction, but for rounding

# (local, dense) -> (V A' S^-1 (y - A x̂) like x, log N(y; A x̂, S) + constant (B,)). ``dense``: with log det S, and of
# the first as much as a step to local.ahead reaches, where the method knows.
Method = Callable[[Local, bool], tuple[Tensor, Tensor]]


def mmps(iterations: int | None = None, rtol: float | None = None) -> Method:
    """S = std^2 + A V A', by conjugate gradients on vector-Jacobian products; exact where the data are Gaussian.

    Rozet et al. 2024, algorithm 1-3. ``iterations``: at most, d_y up to 100 unless given (theirs: 1 to 5, which is
    enough for most networks). ``rtol``: of the residual's length, the root of the dtype's rounding unless given. A
    network's V is not positive, as a covariance is, nor symmetric: a sample stops before the first direction along
    which S would be less than std^2. Without that networks diverge where std is small.
    """
    n = None if iterations is None else _checks.count(iterations, "iterations")
    return partial(_mmps, iterations=n, rtol=None if rtol is None else _checks.positive(rtol, "rtol"))


def _mmps(local: Local, dense: bool, iterations: int | None, rtol: float | None) -> tuple[Tensor, Tensor]:
    if dense and local.off.shape[1] <= DENSE:
        va, ava = local.columns()
        # A network's V is neither symmetric nor positive to rounding: the nearest that is.
        wide = torch.promote_types(ava.dtype, torch.float32)
        ev, u = (y.to(ava.dtype) for y in torch.linalg.eigh((ava + ava.mT).to(wide) / 2))
        s = 1 + ev.clamp_min(0.0)
        z = torch.einsum("bij,bi->bj", u, local.off)
        w = torch.einsum("bij,bj->bi", u, z / s * local.reached(ev.clamp_min(0.0), u))
        shift = torch.einsum("bdi,bi->bd", va, w).reshape(local.x_0.shape)
        return shift, -0.5 * (z.square() / s + s.log()).sum(1)
    n = min(local.off.shape[1], 100) if iterations is None else iterations
    small = torch.finfo(local.off.dtype).eps ** 0.5 if rtol is None else rtol
    w = conjugate_gradients(lambda p: p + local.seen(local.covary(local.back(p))), local.off, n, small, _POSITIVE)
    return local.covary(local.back(w)), -0.5 * (local.off * w).sum(1)


def tmpd() -> Method:
    """S = std^2 + the row sums of A V A', where they are positive  (Boys et al. 2024, eq. 11 and section 3.3)."""
    return _tmpd


def _tmpd(local: Local, dense: bool) -> tuple[Tensor, Tensor]:
    ones = local.std.expand_as(local.off)  # A V A' 1, over the noise's
    s = 1 + (local.seen(local.covary(local.back(ones))) / local.std).clamp_min(0.0)
    return local.covary(local.back(local.off / s)), -0.5 * (local.off**2 / s + s.log()).sum(1)


def pigdm(data_std: float = 1.0) -> Method:
    """S = std^2 + v A A',  v = sigma^2 r^2/(sigma^2 + alpha^2 r^2), as if the data were N(0, r^2), r = ``data_std``.

    Song et al. 2023, eq. 7-8 and appendix A.3.
    """
    return partial(_pigdm, r2=_checks.positive(data_std, "data_std") ** 2)


def _pigdm(local: Local, dense: bool, r2: float) -> tuple[Tensor, Tensor]:
    v = local.spread * r2 / (local.spread + r2)
    v = v if isinstance(v, float) else v.reshape(len(v), *(1,) * (local.x_0.ndim - 1))
    small = torch.finfo(local.off.dtype).eps ** 0.5
    n = min(local.off.shape[1], 500)
    w = conjugate_gradients(lambda p: p + local.seen(only_real(v * local.back(p))), local.off, n, small)
    return local.covary(local.back(w)), -0.5 * (local.off * w).sum(1)


def dps(gamma: float = 0.0, strength: float | None = None) -> Method:
    """S = std^2 + gamma sigma^2/alpha^2, an A that need not be linear. gamma = 0 takes x̂ for x_0.

    Chung et al. 2023, eq. 11, and with gamma Rozet & Louppe 2023, eq. 15. It is stiff where std is small: the flow and
    the SDE then need as many steps as 1/std^2, and are off in fewer. ``strength``: instead, as published (algorithm 1),
    a step of this length along each sample's own residual, at each of a thousand steps of equal time. Its direction
    flips where the residual passes 0, which no adaptive method gets through.
    """
    length = None if strength is None else _checks.positive(strength, "strength")
    return partial(_dps, gamma=_checks.positive(gamma, "gamma", zero=True), length=length)


def _dps(local: Local, dense: bool, gamma: float, length: float | None) -> tuple[Tensor, Tensor]:
    extra = gamma * local.spread
    s = 1 + (extra if isinstance(extra, float) else extra[:, None]) / local.std**2
    w = local.off / s
    twist = -0.5 * (local.off * w + s.log().expand_as(w)).sum(1)
    if length is not None:
        w = local.off * local.std**2
        size = (local.off * local.std).norm(dim=1, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
        rate = local.rate if isinstance(local.rate, float) else local.rate[:, None]
        w = w * (length * rate / size)
    return local.covary(local.back(w)), twist


METHODS: dict[str, Callable[..., Method]] = {"mmps": mmps, "tmpd": tmpd, "pigdm": pigdm, "dps": dps}


class PosteriorScore(Derived):
    """The model of p(x_t | y), of the kind of the one inside; made by :func:`posterior_score`."""

    def __init__(
        self, sde: SDE, score: Score, observation: Observation, method: Method, nonlinear: bool, reach: float
    ) -> None:
        super().__init__(score, as_model(score, sde))
        self.observation, self._method, self._nonlinear, self._reach = observation, method, nonlinear, reach

    def prepare(self, times: Sequence[float], x: Tensor) -> list[Any]:
        """What the model inside makes of the times, and its numbers there."""
        self._check(x)
        numbers = columns(self._numbers(torch.tensor(times, dtype=torch.float64)))
        return list(zip(self.inside.prepare(times, x), numbers, strict=True))

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What the model inside says, of E[x_0|x_t, y]."""
        if ready is None:
            self._check(x)
        graph = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(graph):
            local, back = self.local(x, time, ready)
            return local.out + back * self._within(self._method(local, False)[0])

    def local(self, x: Tensor, time: Tensor, ready: Any = None) -> tuple[Local, Any]:
        """The model at x, one evaluation, and what E[x_0|x_t] adds to what it says. ValueError where alpha = 0."""
        inside, numbers = (None, None) if ready is None else ready
        time = ordinary(time)
        if numbers is None:
            given = self._numbers(time)
            a, b, back, gain = fitting(given[:4], x)
            spread, rate = (y.to(x) if y.ndim else float(y) for y in given[4:])
            numbers = a, b, back, gain, spread, rate
        a, b, back, gain = numbers[:4]
        if not holds(torch.isfinite(torch.as_tensor(gain))):
            raise ValueError(
                f"where alpha = 0, at T = {self.sde.T:g}, the model does not tell the covariance of x_0: set T a "
                f"little lower (for example sde.T = {0.999 * self.sde.T:g}), or use posterior_sample, which can start "
                "there"
            )
        graph = torch.is_grad_enabled()
        with differentiating("score"):
            y = leaf(x, graph)
            out = ask(self.inside, y, time, inside).to(x.dtype)
            if not out.requires_grad:
                raise ValueError(NO_GRADIENT)
            mean = only_real(a * out + b * y)
        return Local(self.observation, y, out, mean, numbers, graph), back

    def pull(self, x: Tensor, time: Tensor, ready: Any, ahead: float) -> tuple[Tensor, Tensor, Tensor]:
        """What the model inside says, how far to move E[x_0|x_t] in a step that ends where (sigma/alpha)^2 is
        ``ahead``, and log p~(y|x_t) (B,) but for a constant.
        """
        with torch.inference_mode(False), torch.no_grad():
            local, _ = self.local(x, time, ready)
            local.ahead = ahead
            shift, twist = self._method(local, True)
            return local.out, self._within(shift), twist

    def _within(self, shift: Tensor) -> Tensor:
        """At most ``reach`` in its largest entry, sample by sample."""
        if math.isinf(self._reach):
            return shift
        most = shift.reshape(len(shift), -1).abs().amax(1)
        return shift * each(self._reach / most.clamp_min(self._reach), shift)

    def _check(self, x: Tensor) -> None:
        self.observation.check(x)
        if not self.observation.linear and not self._nonlinear:
            raise ValueError('A must be linear for this method; "dps" takes one that is not')

    def _numbers(self, time: Tensor) -> tuple[Tensor, ...]:
        """a, b of x_0 = a o + b x; what x_0 adds to o; sigma^2/alpha; (sigma/alpha)^2; DPS's steps over g^2."""
        lv = levels_of(self.sde, time.cpu())
        said, x_0 = (
            kind_of(self.predicts, self.sde, lv.time),
            Kind(torch.ones_like(lv.alpha), torch.zeros_like(lv.alpha)),
        )
        gain = lv.sigma**2 / lv.alpha
        rate = 1000 / (self.sde.T * self.sde.coefficients(lv.time).g2)
        a, b = express(x_0, said, lv.alpha, lv.sigma)
        return a, b, express(said, x_0, lv.alpha, lv.sigma)[0], gain, gain / lv.alpha, rate


def posterior_score(
    sde: SDE,
    score: Score,
    observation: Observation,
    method: str = "mmps",
    *,
    reach: float | None = None,
    **options: Any,
) -> PosteriorScore:
    """A score of p(x_t | y) for every sampler, adaptive method and the likelihood, from a score of p(x_t).

    ``method``: "mmps", exact where the data are Gaussian; "tmpd", "pigdm"; "dps", for an A that is not linear too,
    which needs as many steps as 1/std^2. ``options`` are those of the functions of these names in
    :mod:`sdekit.posterior.scores`. All are approximations where the data are not Gaussian: modes get weights that are
    off by .1 to .5, which no number of steps mends; :func:`posterior_sample` does.

    ``reach``: no entry of E[x_0|x_t, y] is further than this from E[x_0|x_t], and if one would be, all of the sample's
    come so much nearer. What a network says of V is wrong by (sigma/alpha)^2 times an error of eps, which at high noise
    is more than any data are wide; without a bound that throws samples out of what the network knows, for ever, and at
    low std makes "tmpd", "pigdm" and "dps" diverge. 5 (``sde.unit_level``) unless given, which binds no right model of
    data of about unit size, as they are to be; of wider data it makes the result wrong: give more, or math.inf for no
    bound, as DPS with a ``strength`` has.

    It says the kind of prediction that the score does, at as many network calls; vector-Jacobian products, one for
    each iteration of "mmps" and one or two of the others, are not counted. Each sample's y, step and iterations are its
    own. The score must be differentiable in x. Where alpha(T) = 0 an evaluation raises ValueError.
    """
    _checks.instance(sde)
    require_white(sde, "posterior_score")
    if not isinstance(observation, Observation):
        raise TypeError(f"observation must be an Observation(y, A, std), got {type(observation).__name__}")
    make = _checks.lookup(METHODS, method, "method")
    if reach is None:
        reach = 5.0 * sde.unit_level if options.get("strength") is None else math.inf
    reach = reach if reach == math.inf else _checks.positive(reach, "reach")
    try:
        made = make(**options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise TypeError(f"method {method!r}: {error}") from None
    return PosteriorScore(sde, score, observation, made, make is dps, reach)
