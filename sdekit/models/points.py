"""PointSet: data that are a finite set, with the exact model under any process. The oracle of what a network learns."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.models.derived import Under
from sdekit.processes.sde import SDE
from sdekit.system import Time, as_time, expand, shown

_NUMBERS = 2**24  # differences that are held at a time


class PointSet:
    """The law that draws each of the points (n, *event) equally often.

    E[x_0|x_t] is their mean, weighted by the process's kernel p(x_t|x_0): Gaussian (Karras et al. 2022, appendix B.3),
    or that of a Poisson flow (Xu et al. 2023, eq. 7). Computation is in float64. Raises ValueError or TypeError for
    points that are none.
    """

    def __init__(self, points: Tensor) -> None:
        self.points = _checks.state(points, "points").detach().double()

    def __repr__(self) -> str:
        return f"PointSet({shown(self.points)})"

    def score(self, sde: SDE) -> "PointScore":
        """The exact model: as one it predicts x_0, called as (x, t) it is -E[eps|x_t]/sigma."""
        return PointScore(self, sde)


class PointScore:
    """The exact model of a :class:`PointSet` under a process; made by its ``score``."""

    predicts = "x0"

    def __init__(self, points: PointSet, sde: SDE) -> None:
        _checks.instance(sde)
        self.points, self.sde = points.points, sde

    def __repr__(self) -> str:
        return f"PointSet({shown(self.points)}).score({self.sde!r})"

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """(alpha E[x_0|x] - x)/sigma^2, like x."""
        time = as_time(t, self.sde.T)
        a, s = (expand(y, x.double()) for y in (self.sde.alpha(time), self.sde.sigma(time)))
        return ((a * self._x_0(x, time) - self.sde.centre(x.double(), time)) / s**2).to(x)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """E[x_0|x], like x."""
        return self._x_0(x, time).to(x)

    def prepare(self, times: Sequence[float], x: Tensor) -> list[None]:
        """Nothing."""
        return [None] * len(times)

    def under(self, sde: SDE) -> Under:
        """The same model under another process, by the map of noise levels (:class:`Under`)."""
        return Under(self, sde)

    def _x_0(self, x: Tensor, time: Tensor) -> Tensor:
        _checks.floating(x.dtype, "x")
        points = self.points.to(x.device)
        if x.shape[1:] != points.shape[1:]:
            raise ValueError(f"x must be (B, *{tuple(points.shape[1:])}), as the points are, got {tuple(x.shape)}")
        x, n = self.sde.centre(x.double(), time), len(points)
        time = time.expand(len(x))
        parts = []
        for rows in torch.arange(len(x)).split(max(1, _NUMBERS // points.numel())):
            some, t = x[rows.to(x.device)], time[rows.to(time.device)]
            off = some[:, None] - expand(self.sde.alpha(t), some)[:, None] * points
            log_w = self.sde.log_kernel(off.flatten(0, 1), t.repeat_interleave(n)).reshape(-1, n)
            parts.append((log_w.softmax(1) @ points.reshape(n, -1)).reshape(some.shape))
        return torch.cat(parts)
