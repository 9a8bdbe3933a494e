"""Score -> score: the prediction of x_0 kept inside the data's range."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.processes.sde import SDE
from sdekit.system import Score, as_time, expand


class Thresholded:
    """A score whose x_0 has been moved: score + alpha (f(x_0) - x_0)/sigma^2, with x_0 = (x + sigma^2 score)/alpha.

    Where f leaves x_0 as it is, the score is bit for bit what it was. ``event`` and ``device`` are those of the score
    inside.
    """

    def __init__(
        self, sde: SDE, score: Score, move: Callable[[Tensor], Tensor], data_range: tuple[float, float]
    ) -> None:
        self.sde, self.score, self._move, self.data_range = sde, score, move, data_range
        self.event = getattr(score, "event", None)

    @property
    def device(self) -> torch.device | None:
        """Where the network's weights are, if the score inside tells."""
        return getattr(self.score, "device", None)

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        """Score at x (B, *event) and t (0-d or (B,)), like x."""
        time = as_time(t, self.sde.T)
        alpha, sigma = expand(self.sde.alpha(time), x), expand(self.sde.sigma(time), x)
        score = self.score(x, t)
        if score.shape != x.shape:
            raise ValueError(f"score must return x's shape {tuple(x.shape)}, got {tuple(score.shape)}")
        score = score.to(x.dtype)
        x_0 = (x + sigma**2 * score) / alpha
        return score + (alpha / sigma**2) * (self._move(x_0) - x_0)


def static_threshold(sde: SDE, score: Score, data_range: Sequence[float] | None = None) -> Thresholded:
    """The score with x_0 clipped to the data's range  (Ho et al. 2020's clipping; Saharia et al. 2022, section 2.3).

    ``data_range``: (low, high), the score's own (``score.data_range``, as pretrained models have) unless given.
    A score for every sampler and for the likelihood; where it clips it is the gradient of no density any more.
    Raises ValueError for a range that is missing or empty.
    """
    low, high = _range(score, data_range)
    return Thresholded(sde, score, lambda x_0: x_0.clamp(low, high), (low, high))


def dynamic_threshold(
    sde: SDE, score: Score, data_range: Sequence[float] | None = None, *, percentile: float = 0.995
) -> Thresholded:
    """The score with x_0 pressed into the data's range  (Saharia et al. 2022, section 2.3, dynamic thresholding).

    With c the middle of the range, r its half width and s the ``percentile`` of |x_0 - c| over a sample's event, at
    least r:  x_0 is clipped to c +- s and then scaled about c by r/s. Each sample has its own s.
    ``data_range``: as in :func:`static_threshold`. Raises ValueError for it and unless 0 < percentile <= 1.
    """
    low, high = _range(score, data_range)
    percentile = _checks.positive(percentile, "percentile")
    if percentile > 1:
        raise ValueError(f"percentile must lie in (0, 1], got {percentile:g}")
    middle, half = (low + high) / 2, (high - low) / 2

    def press(x_0: Tensor) -> Tensor:
        off = x_0 - middle
        flat = off.reshape(len(off), -1).abs()
        k = min(flat.shape[1], int(percentile * (flat.shape[1] - 1)) + 1)  # kthvalue: quantile has a limit of size
        s = flat.kthvalue(k, dim=1).values.clamp_min(half).reshape(-1, *(1,) * (off.ndim - 1))
        inside = s <= half  # nothing to do for that sample, to the bit
        return torch.where(inside & (off.abs() <= half), x_0, middle + off.clamp(-s, s) * (half / s))

    return Thresholded(sde, score, press, (low, high))


def _range(score: Score, data_range: Sequence[float] | None) -> tuple[float, float]:
    given = getattr(score, "data_range", None) if data_range is None else data_range
    if given is None:
        raise ValueError("data_range must be given: this score does not tell the bounds of its data")
    try:
        low, high = (float(bound) for bound in given)
    except (TypeError, ValueError):
        raise ValueError(f"data_range must be a pair (low, high), got {given!r}") from None
    if not low < high:
        raise ValueError(f"data_range must be (low, high) with low < high, got ({low:g}, {high:g})")
    return low, high
