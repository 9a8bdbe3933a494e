"""Scores: any callable (x, t) -> like x. The only place that knows a network's time and output convention."""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sdekit import _checks
from sdekit.processes.sde import SDE
from sdekit.system import as_time, expand


class _Schedule:
    """alpha, sigma and, where somebody asks, their derivatives at t, in the form that multiplies x."""

    def __init__(self, sde: SDE, t: Tensor, x: Tensor) -> None:
        self._sde, self._t, self._x = sde, t, x
        self.a, self.s = expand(sde.alpha(t), x), expand(sde.sigma(t), x)

    @cached_property
    def slopes(self) -> tuple[Tensor, Tensor]:
        """(alpha', sigma'), from f = alpha'/alpha and g^2 = 2 sigma sigma' - 2 f sigma^2."""
        c = self._sde.coefficients(self._t)
        return expand(c.f * c.alpha, self._x), expand(c.g2 / (2 * c.sigma) + c.f * c.sigma, self._x)


def _eps_from_flow(x: Tensor, out: Tensor, k: _Schedule) -> Tensor:
    da, ds = k.slopes
    return (k.a * out - da * x) / (k.a * ds - k.s * da)


# What a network may predict, each turned into eps with x = a x_0 + s eps.
PREDICTIONS: dict[str, Callable[[Tensor, Tensor, _Schedule], Tensor]] = {
    "score": lambda x, out, k: -k.s * out,
    "eps": lambda x, out, k: out,
    "x0": lambda x, out, k: (x - k.a * out) / k.s,
    "v": lambda x, out, k: (k.a * out + k.s * x) / (k.a**2 + k.s**2),
    "flow": _eps_from_flow,
}

# The other way: what a perfect network predicts for the pair (x_0, eps).
_TARGETS: dict[str, Callable[[Tensor, Tensor, _Schedule], Tensor]] = {
    "score": lambda x0, eps, k: -eps / k.s,
    "eps": lambda x0, eps, k: eps,
    "x0": lambda x0, eps, k: x0,
    "v": lambda x0, eps, k: k.a * eps - k.s * x0,
    "flow": lambda x0, eps, k: k.slopes[0] * x0 + k.slopes[1] * eps,
}


def prediction_target(predicts: str, sde: SDE, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What a perfect network predicts for the pair (x_0, eps) at t: the regression target of training.

    score -eps/s;  eps;  x_0;  v = a eps - s x_0 (Salimans & Ho 2022);  flow = a' x_0 + s' eps.
    """
    return _checks.lookup(_TARGETS, predicts, "prediction")(x0, eps, _Schedule(sde, t, x0))


def eps_slope(predicts: str, sde: SDE, t: Tensor) -> Tensor:
    """d eps/d output, of t's shape: eps is linear in what a network predicts, plus a term in x and t alone."""
    zero = torch.zeros_like(t)
    return _checks.lookup(PREDICTIONS, predicts, "prediction")(zero, torch.ones_like(t), _Schedule(sde, t, zero))


class NetworkScore:
    """The score of a trained network; made by :func:`as_score`, called as ``score(x, t)``.

    ``event``, ``data_range`` and ``levels``: the data's shape without the batch, their bounds, and of how many equal
    steps between these they were (None: continuous), where a checkpoint tells them.
    """

    event: tuple[int, ...] | None = None
    data_range: tuple[float, float] | None = None
    levels: int | None = None
    _labels: Tensor | None = None

    def __init__(self, network: Callable[..., Tensor], sde: SDE, predicts: str, time: Callable[[Tensor], Tensor]):
        self.network, self.sde, self.predicts, self._time = network, sde, predicts, time
        self._eps = _checks.lookup(PREDICTIONS, predicts, "prediction")
        weights = network.parameters() if isinstance(network, nn.Module) else iter(())
        self._weight = next((w for w in weights if w.is_floating_point()), None)

    @property
    def device(self) -> torch.device | None:
        """Where the network's weights are; None for a plain callable. Samplers draw there by default."""
        return None if self._weight is None else self._weight.device

    def given(self, labels: Tensor | int | None) -> "NetworkScore":
        """The score of p(x | label): the network is called as network(x, t, labels).

        ``labels``: one for all samples, or (B,), int64, one for each (with solvers that keep the batch together).
        With None, as without, the network decides; those of :mod:`sdekit.training` then take no condition.
        """
        other = copy.copy(self)
        other._labels = None if labels is None else torch.as_tensor(labels)
        return other

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """Score at x (B, *event) and t (0-d or (B,)), like x."""
        time = as_time(t, self.sde.T)
        out, k = self.output(x, time), _Schedule(self.sde, time, x)
        return -self._eps(x, out, k) / k.s

    def output(self, x: Tensor, time: Tensor) -> Tensor:
        """What the network itself says, a ``predicts`` like x, at x (B, *event) and time (0-d or (B,)), float64."""
        dtype = x.dtype if self._weight is None else self._weight.dtype
        # A time keeps at least float32: in bf16 it would have three digits.
        wide = torch.promote_types(dtype, torch.float32)
        clock = self._time(time.expand(x.shape[0] if time.ndim or time.device == x.device else 1))
        if clock.shape == (1,):  # to another device as a number for its kernel: the host would wait for a copy
            network_time = x.new_zeros(x.shape[0], dtype=wide) + clock.reshape(()).to(wide)
        else:
            network_time = clock.expand(x.shape[0], *clock.shape[1:]).to(x.device, wide)
        condition: tuple[Tensor, ...] = ()
        if self._labels is not None:
            if self._labels.ndim and len(self._labels) != x.shape[0]:
                raise ValueError(f"labels were given for {len(self._labels)} samples, and x has {x.shape[0]}")
            self._labels = self._labels.to(x.device)  # once
            condition = (self._labels.expand(x.shape[0]),)
        out = self.network(x.to(dtype), network_time, *condition).to(x.dtype)
        if out.shape != x.shape:
            raise ValueError(f"the network must return x's shape {tuple(x.shape)}, got {tuple(out.shape)}")
        return out


def as_score(
    network: Callable[..., Tensor],
    sde: SDE,
    predicts: str = "score",
    *,
    time: Callable[[Tensor], Tensor] | None = None,
) -> NetworkScore:
    """The score of any trained network ``network(x, t)``.

    ``predicts``: what it returns, with x = alpha x_0 + sigma eps: "score", "eps" (score = -eps/sigma),
    "x0", "v" (alpha eps - sigma x_0) or "flow" (alpha' x_0 + sigma' eps).
    ``time``: the network's own clock, from sde's t (float64, (B,); (1,) on a GPU where all samples share it) to what
    the network takes; for example ``lambda t: 999 * t`` for a 1000-step DDPM, ``lambda t: t.log() / 4`` for EDM's
    c_noise.
    The network gets x in the dtype of its weights (x's own for a plain callable) and t as (B,), in float32
    or wider, on x's device; the score comes back like x, so a float32 state runs with a bf16 network.

    Raises ValueError for an unknown ``predicts``, and for zero terminal SNR, alpha(T) = 0, where
    the score says nothing of x_0 and x_0 = (x - sigma eps)/alpha is infinite (Lin et al. 2024).
    """
    if not callable(network):
        raise TypeError(f"network must be a callable (x, t) -> tensor, got {type(network).__name__}")
    sde.require_signal_at_T()
    return NetworkScore(network, sde, predicts, time or (lambda t: t))
