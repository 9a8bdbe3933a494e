"""Model -> model: the prediction of x_0 kept inside the data's range."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import entries, only_real
from sdekit.models.derived import Derived
from sdekit.processes.counted import as_model, ask
from sdekit.processes.kinds import Kind, express, kind_of
from sdekit.processes.law import require_centred
from sdekit.processes.sde import SDE
from sdekit.system import Score, expand


class Thresholded(Derived):
    """A model whose x_0 has been moved: with f the move and o what the model inside says, o + c (f(x_0) - x_0), where
    x_0 = a o + b x and c is what x_0 adds to an o of its kind at given x (alpha/sigma^2 to a score).

    Where f leaves x_0 as it is, the model says bit for bit what it said. ``event`` and ``device`` are those of the
    score inside.
    """

    def __init__(
        self, sde: SDE, score: Score, move: Callable[[Tensor], Tensor], data_range: tuple[float, float]
    ) -> None:
        super().__init__(score, as_model(score, sde))
        require_centred(sde, "a threshold")
        self._move, self.data_range = move, data_range

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What the model inside says, of a moved x_0."""
        inside, numbers = (
            (None, [expand(y, x.to(self._wide(x))) for y in self._numbers(time)]) if ready is None else ready
        )
        a, b, c = numbers
        out = ask(self.inside, x, time, inside)
        if out.shape != x.shape:
            raise ValueError(f"score must return x's shape {tuple(x.shape)}, got {tuple(out.shape)}")
        # In float16 c, alpha/sigma^2 to a score, is infinite near the data, and a is next to nothing.
        out, y = (z.to(self._wide(x)) for z in (out.to(x.dtype), x))
        x_0 = a * out + b * y
        return (out + c * (self._move(x_0) - x_0)).to(x.dtype)

    @staticmethod
    def _wide(x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, torch.float32)

    def prepare(self, times: Sequence[float], x: Tensor) -> list[Any]:
        """The numbers at these times, and what the model inside makes of them."""
        columns = [y.tolist() for y in self._numbers(torch.tensor(times, dtype=torch.float64))]
        return list(zip(self.inside.prepare(times, x), zip(*columns, strict=True), strict=True))

    def _numbers(self, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha, sigma = self.sde.alpha(time), self.sde.sigma(time)
        said, x_0 = kind_of(self.predicts, self.sde, time), Kind(torch.ones_like(alpha), torch.zeros_like(alpha))
        return *express(x_0, said, alpha, sigma), express(said, x_0, alpha, sigma)[0]


def static_threshold(sde: SDE, score: Score, data_range: Sequence[float] | None = None) -> Thresholded:
    """The score with x_0 clipped to the data's range  (Ho et al. 2020's clipping; Saharia et al. 2022, section 2.3).

    ``data_range``: (low, high), the score's own (``score.data_range``, as pretrained models have) unless given.
    A score for every sampler and for the likelihood; where it clips it is the gradient of no density any more.
    Raises ValueError for a range that is missing or empty.
    """
    low, high = _range(score, data_range)
    return Thresholded(sde, score, partial(torch.clamp, min=low, max=high), (low, high))


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
    press = partial(_press, middle=(low + high) / 2, half=(high - low) / 2, percentile=percentile)
    return Thresholded(sde, score, press, (low, high))


def _press(x_0: Tensor, middle: float, half: float, percentile: float) -> Tensor:
    off = x_0 - middle
    flat, n = only_real(off).reshape(len(off), -1).abs(), entries(off)
    if isinstance(n, int):
        k = min(n, int(percentile * (n - 1)) + 1)  # kthvalue: quantile has a limit of size
        s = flat.kthvalue(k, dim=1).values
    else:  # what is not real is 0, and comes first
        place = flat.shape[1] - n + (percentile * (n.double() - 1)).floor()
        s = flat.sort(1).values.gather(1, place.long()[:, None])[:, 0]
    s = s.clamp_min(half).reshape(-1, *(1,) * (off.ndim - 1))
    inside = s <= half  # nothing to do for that sample, to the bit
    return torch.where(inside & (off.abs() <= half), x_0, middle + off.clamp(-s, s) * (half / s))


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
