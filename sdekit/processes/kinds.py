"""What a model may say, and every kind of prediction as a sum of any other and x.

A kind is two numbers (m, n) at each time: its prediction is  m x_0 + n eps  of  x = alpha x_0 + sigma eps. From what
a model of the kind (m', n') says, o, every prediction p follows in one pass,

    p = a o + b x,    a = (alpha n - sigma m)/D,    b = (m n' - n m')/D,    D = alpha n' - sigma m'.

D is -alpha/sigma for a score, alpha for eps, -sigma for x_0, alpha^2 + sigma^2 for v, and for the velocity eps - x_0
alpha + sigma: where alpha = 0 a score and eps say nothing of x_0, and the others everything.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit import _checks


class Kind(NamedTuple):
    """m x_0 + n eps; numbers, or tensors of the time's shape."""

    m: Any
    n: Any


def _pair(m: Tensor | float, n: Tensor | float, like: Tensor) -> Kind:
    return Kind(*(torch.as_tensor(y, dtype=like.dtype, device=like.device).expand(like.shape) for y in (m, n)))


def _flow(sde: Any, t: Tensor, like: Tensor) -> Kind:
    m, n = sde.velocity(t)
    return _pair(m, n, like)


# (process, t, alpha, sigma) -> Kind, of t's shape. v: Salimans & Ho 2022. flow: the velocity that the process defines.
KINDS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Kind]] = {
    "score": lambda sde, t, alpha, sigma: _pair(0.0, -1 / sigma, alpha),
    "eps": lambda sde, t, alpha, sigma: _pair(0.0, 1.0, alpha),
    "x0": lambda sde, t, alpha, sigma: _pair(1.0, 0.0, alpha),
    "v": lambda sde, t, alpha, sigma: Kind(-sigma, alpha),
    "flow": lambda sde, t, alpha, sigma: _flow(sde, t, alpha),
}

# Where these are the only words, nothing is known of x_0 at alpha = 0.
BLIND = ("score", "eps")


def kind_of(name: str, sde: Any, t: Tensor) -> Kind:
    """The kind of that name at t, float64. Raises ValueError for an unknown name."""
    return _checks.lookup(KINDS, name, "prediction")(sde, t, sde.alpha(t), sde.sigma(t))


def to_score(name: str, sde: Any, t: Tensor) -> tuple[Any, Any]:
    """(a, b) of  score = a o + b x,  o of that kind, at t, float64."""
    sigma = sde.sigma(t)
    return express(Kind(torch.zeros_like(sigma), -1 / sigma), kind_of(name, sde, t), sde.alpha(t), sigma)


def express(wanted: Kind, said: Kind, alpha: Any, sigma: Any) -> tuple[Any, Any]:
    """(a, b) of  p = a o + b x,  p of the wanted kind and o of the one that is said."""
    d = alpha * said.n - sigma * said.m
    if not isinstance(d, Tensor):
        if wanted.m == 0 == said.m:  # a score and eps know each other at alpha = 0, too
            return wanted.n / said.n, 0.0
        return (alpha * wanted.n - sigma * wanted.m) / d, (wanted.m * said.n - wanted.n * said.m) / d
    alone = (torch.as_tensor(wanted.m) == 0) & (torch.as_tensor(said.m) == 0)
    a = torch.where(alone, wanted.n / said.n, (alpha * wanted.n - sigma * wanted.m) / d)
    return a, torch.where(alone, 0.0, (wanted.m * said.n - wanted.n * said.m) / d)


def zero_signal(sde: Any, said: str) -> str:
    """The message where a model of a blind kind is asked at alpha = 0."""
    return (
        f"{type(sde).__name__} has zero terminal SNR, alpha(T) = 0 at T = {sde.T:g}, and a model that predicts {said} "
        f"says nothing of x_0 there: set T a little lower (for example T = {0.999 * sde.T:g}, by sde.T = ...), or use "
        "a model that predicts v, x0 or flow (as_score(..., predicts=...)). A function of scores is a score: guidance "
        "of such a model goes into the network that as_score is given"
    )
