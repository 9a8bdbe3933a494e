"""What a process is beside its alpha and sigma, and what is not made for it."""

import hashlib
from typing import Any

import torch
from torch import Tensor


def digest(*tensors: Tensor) -> str:
    """A short name of numbers, for :meth:`sdekit.SDE.law`."""
    content = b"".join(y.detach().cpu().double().numpy().tobytes() for y in tensors)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def law_of(sde: Any) -> tuple[Any, ...]:
    """Its law; () of what has none to tell."""
    tell = getattr(sde, "law", None)
    return () if tell is None else tell()


def require_white(sde: Any, what: str) -> None:
    """Raise ValueError for a process that is not x_t ~ N(alpha x_0, sigma^2), for ``what`` is made of that."""
    require_centred(sde, what)
    require_gradient(sde, what)


def require_gradient(sde: Any, what: str) -> None:
    """Raise ValueError where a model's "score" is not grad log p_t: the noise is correlated, or not Gaussian."""
    if getattr(sde, "root", None) is not None or not getattr(sde, "diffuses", True):
        raise ValueError(f"{what} is for processes of white Gaussian noise, which {type(sde).__name__} has not")


def require_centred(sde: Any, what: str) -> None:
    """Raise ValueError for a process with a mean of its own, for ``what`` is made of x = alpha x_0 + sigma eps."""
    if not getattr(sde, "centred", True):
        raise ValueError(f"{what} is for processes of mean alpha x_0; {type(sde).__name__} adds one of its own to it")


def require_same(theirs: Any, ours: Any, times: Tensor) -> None:
    """Raise ValueError for a score's process that is not the one it is used under, at these times."""
    if theirs is ours:
        return
    why = ""
    if law_of(theirs) != law_of(ours):
        why = "it has another noise, or another mean"
    elif bool((times > theirs.T).any()):
        why = f"it ends at T = {theirs.T:g}"
    else:
        both = [torch.stack([p.alpha(times), p.sigma(times)]).reshape(2, -1) for p in (theirs, ours)]
        off = (both[0] != both[1]).any(0)
        if bool(off.any()):
            k = int(off.int().argmax())
            (a, s), (b, r) = (y[:, k].tolist() for y in both)
            why = f"at t = {float(times.reshape(-1)[k]):g} its alpha, sigma are {a:g}, {s:g}, not {b:g}, {r:g}"
    if why:
        raise ValueError(
            f"the score was wrapped for another process, {type(theirs).__name__}, than this {type(ours).__name__}: "
            f"{why}. score.under(sde) carries it over to other levels; for another noise wrap it anew (as_score)"
        )
