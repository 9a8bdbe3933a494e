"""Model -> model: guidance by a classifier, by conditions, by a weaker model. For every solver and the likelihood.

With c and u what two models say, all here is  u + scale (c - u) = c + (scale - 1)(c - u): scale 1 is c alone, to the
bit and at no other call. That is the same in every kind of prediction, and is done in the network's own, so that
nothing is divided by alpha. What is not linear (rescaling, :func:`apg`, :func:`cfg_zero_star`) acts in the kind that it
says.
Nothing here has a memory from one evaluation to the next (APG's momentum has): adaptive methods, rules of several
stages and the likelihood call a model in another order than that of a run.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import event_mean
from sdekit.models.conditions import ApartError, joined
from sdekit.models.derived import finished, inside
from sdekit.models.guided import Apart, Classified, Guided, Mix, Together, band, each
from sdekit.models.network import NetworkScore
from sdekit.processes.kinds import KINDS
from sdekit.system import Score


def classifier_guidance(
    score: Score, log_prob: Callable[..., Tensor], scale: float = 1.0, *, given: Sequence[Any] = ()
) -> Any:
    """score(x, t) + scale grad_x log p_t(y|x)  (Song et al. 2021, eq. 14; Dhariwal & Nichol 2021, algorithm 1).

    ``log_prob(x, t, *given)`` -> (B,): log p_t(y|x) up to a constant, differentiable in x, of any classifier of noisy
    x; t is 0-d or (B,). ``given``: what it needs of y, such as labels (B,), which follow their samples as those of
    ``score.given`` do; what a closure holds does not. Linear in the score, so the same in every kind of prediction. A
    classifier costs no evaluation. Where alpha(T) = 0 it says nothing of x_0, and an evaluation there raises
    ValueError. Raises ValueError or TypeError for a scale that is not finite, and a log_prob that is none.
    """
    if not callable(log_prob):
        raise TypeError(f"log_prob must be a callable (x, t) -> (B,), got {type(log_prob).__name__}")
    return finished(Classified(score, log_prob, _scale(scale), given))


def classifier_free(
    score: NetworkScore,
    conditional: Any,
    unconditional: Any = None,
    scale: float = 1.0,
    *,
    interval: Sequence[float] | None = None,
    rescale: float = 0.0,
    kind: str | None = None,
    together: bool | None = None,
) -> Any:
    """u + scale (c - u), c and u the network's predictions under two conditions  (Ho & Salimans 2022, eq. 6, with
    scale = 1 + w).

    ``conditional``, ``unconditional``: what :meth:`NetworkScore.given` is to get: one argument, a tuple of arguments, a
    dict of arguments by name, None for no condition, or a score that has been given its own. A condition to keep away
    from (a negative prompt) is an ``unconditional``.
    ``interval``: (low, high), the levels sigma/alpha, low < level <= high, that are guided; at others it is c alone
    (Kynkäänniemi et al. 2024). ``rescale``: the share, 0 ... 1, in which each sample's result is brought to the
    standard deviation of its c (Lin et al. 2024, eq. 15-16); it acts in the ``kind`` of prediction, the network's own
    unless given.
    ``together``: True for one network call of 2 B samples, False for two of B; None for one where the conditions are of
    the same shapes, as a network without its labels and one with them are not. At scale 1 (0) it is c (u) to the bit.

    Raises ValueError or TypeError that names the argument.
    """
    mix = partial(_line, scale=_scale(scale))
    share = _checks.positive(rescale, "rescale", zero=True)
    if share > 1:
        raise ValueError(f"rescale must lie in [0, 1], got {share:g}")
    if kind is not None and not share:
        raise ValueError(f"kind = {kind!r} is of rescale, which is 0; without it guidance is the same in every kind")
    if share:
        mix = partial(_rescaled, scale=mix.keywords["scale"], share=share)
    return _by_conditions(score, conditional, unconditional, scale, together, mix, interval=interval, kind=kind)


def apg(
    score: NetworkScore,
    conditional: Any,
    unconditional: Any = None,
    scale: float = 1.0,
    *,
    parallel: float = 0.0,
    norm: float | None = None,
    kind: str = "x0",
    interval: Sequence[float] | None = None,
    together: bool | None = None,
) -> Any:
    """c + (scale - 1)(d_orthogonal + parallel d_parallel)  (Sadat et al. 2024, algorithm 1, without its momentum).

    d = c - u, shortened for each sample to the length ``norm`` where that is given, and split along c and across it.
    Acts in ``kind``, x_0 unless given. Everything else as in :func:`classifier_free`.
    """
    parallel = _checks.positive(parallel, "parallel", zero=True)
    bound = math.inf if norm is None else _checks.positive(norm, "norm")
    mix = partial(_projected, scale=_scale(scale), parallel=parallel, bound=bound)
    return _by_conditions(score, conditional, unconditional, scale, together, mix, interval=interval, kind=kind)


def cfg_zero_star(
    score: NetworkScore,
    conditional: Any,
    unconditional: Any = None,
    scale: float = 1.0,
    *,
    zero_above: float = math.inf,
    kind: str = "flow",
    interval: Sequence[float] | None = None,
    together: bool | None = None,
) -> Any:
    """s u + scale (c - s u),  s = <c, u>/|u|^2 for each sample  (Fan et al. 2025, CFG-Zero*, eq. 9 and algorithm 1).

    ``zero_above``: the level sigma/alpha above which the prediction is 0 (theirs: in the first steps), at no call. Acts
    in ``kind``, the process's velocity unless given. Everything else as in :func:`classifier_free`.
    """
    quiet = zero_above if zero_above == math.inf else _checks.positive(zero_above, "zero_above")
    mix = partial(_zero_star, scale=_scale(scale))
    scale = scale if math.isinf(quiet) else math.nan  # then scale 1 is not c alone
    return _by_conditions(score, conditional, unconditional, scale, together, mix, interval, kind, quiet)


def autoguidance(score: Score, weaker: Score, scale: float, *, interval: Sequence[float] | None = None) -> Any:
    """w + scale (c - w), c and w what a model and a weaker one of the same say  (Karras et al. 2024a, eq. 3).

    ``weaker``: a model of the same process (a smaller network, a shorter training); it may predict another kind.
    ``interval``: as in :func:`classifier_free`. Raises ValueError for a scale that is not finite.
    """
    if _scale(scale) == 1:
        return score
    strong, weak = inside(score, weaker)
    return finished(Guided(Apart(strong, weak), partial(_line, scale=float(scale)), interval))


def _by_conditions(
    score: NetworkScore,
    conditional: Any,
    unconditional: Any,
    scale: float,
    together: bool | None,
    mix: Mix,
    interval: Any = None,
    kind: str | None = None,
    quiet: float = math.inf,
) -> Any:
    if not hasattr(score, "given"):
        raise TypeError(
            f"score must be a network's, made by as_score, which can be given conditions; got {type(score).__name__}. "
            "For two scores of your own use autoguidance(conditional, unconditional, scale)"
        )
    if together not in (None, True, False):
        raise TypeError(f"together must be True, False or None, got {together!r}")
    if kind is not None:
        _checks.lookup(KINDS, kind, "kind")
    band(interval)
    c, u = (_given(score, condition) for condition in (conditional, unconditional))
    if scale == 1:
        return c
    if scale == 0 and interval is None and kind is None and mix.func is _line:  # type: ignore[attr-defined]
        return u
    try:
        first, second = (m.conditions.all if m.conditions is not None else ((), {}) for m in (c, u))
        joined(first, second)
        one = together is not False and c.speaks_like(u)
        if together and not one:
            raise ValueError("together=True needs two conditions of one network, wrapped alike: leave together out")
    except ApartError:
        if together:
            raise
        one = False
    return Guided(Together(c, u) if one else Apart(c, u), mix, interval, kind, quiet)


def _given(score: NetworkScore, condition: Any) -> NetworkScore:
    if isinstance(condition, NetworkScore):
        return condition
    if isinstance(condition, dict):
        return score.given(**condition)
    return score.given(*condition) if type(condition) is tuple else score.given(condition)


def _line(c: Tensor, u: Tensor, scale: float) -> Tensor:
    return torch.add(u, c - u, alpha=scale)


def _rescaled(c: Tensor, u: Tensor, scale: float, share: float) -> Tensor:
    out = _line(c, u, scale)
    wanted, got = (_std(_wide(y)) for y in (c, out))
    factor = torch.where(got > 0, wanted / got, 1.0)
    return out * each(share * factor + (1 - share), out)


def _projected(c: Tensor, u: Tensor, scale: float, parallel: float, bound: float) -> Tensor:
    d = c - u
    if math.isfinite(bound):
        d = d * each((bound / _dot(d, d).sqrt()).clamp_max(1.0), d)
    along = each(_dot(d, c) / _dot(c, c).clamp_min(torch.finfo(c.dtype).tiny), c) * c
    return c + (scale - 1) * (d - (1 - parallel) * along)


def _zero_star(c: Tensor, u: Tensor, scale: float) -> Tensor:
    s = _dot(c, u) / _dot(u, u).clamp_min(torch.finfo(u.dtype).tiny)
    return _line(c, each(s, u) * u, scale)


def _std(y: Tensor) -> Tensor:
    return event_mean((y - each(event_mean(y), y)).square()).sqrt()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (_wide(a) * _wide(b)).reshape(len(a), -1).sum(1)


def _wide(x: Tensor) -> Tensor:
    """At least float32, in which a sum over an image neither overflows nor loses its digits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scale(scale: Any) -> float:
    try:
        if math.isfinite(scale):
            return float(scale)
    except (TypeError, ValueError):
        pass
    raise ValueError(f"scale must be a finite number, got {scale!r}")
