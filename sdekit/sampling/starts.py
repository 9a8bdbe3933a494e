"""Where samples begin: at a draw from the prior or at what the user has, and the way from there to a grid."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import Padding, real_state
from sdekit.processes.kinds import Kind, express
from sdekit.processes.reverse import Reverse, combine
from sdekit.processes.sde import SDE
from sdekit.system import Score


def first_time(sde: SDE, start: Any, x_T: Tensor | None) -> float:
    """T, or the ``start`` that a user gave for x_T. Raises TypeError or ValueError for one that the process has not."""
    if start is None:
        return float(sde.T)
    if isinstance(start, Tensor):
        if start.ndim:
            raise ValueError(f"start must be one time for the whole batch, got a tensor of shape {tuple(start.shape)}")
        start = float(start)
    if not isinstance(start, int | float):
        raise TypeError(f"start must be a number, the time that x_T is at, got {start!r}")
    if sde.T < start <= sde.T * (1 + 1e-6):  # T, as float32 has it
        start = sde.T
    if not sde.t_min < start <= sde.T:
        raise ValueError(
            f"start is the time that x_T is at, and must lie in (t_min, T] = ({sde.t_min:g}, {sde.T:g}], got {start:g}"
        )
    if x_T is None and start < sde.T:
        raise ValueError(f"start = {start:g} needs x_T, what is at that time: for example sde.perturb(x, {start:g})")
    return float(start)


def state(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    t: float,
    seed: int | None,
    x_T: Tensor | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    ids: Sequence[int] | None,
    padding: Padding | None = None,
) -> Tensor:
    """x_T, as it is to be, or a draw from the prior at t."""
    size = _checks.event_shape(shape)
    _checks.floating(dtype)
    if x_T is None:
        device = device or getattr(score, "device", None)
        if padding is None:
            return sde.prior_sample(size, seed=seed, device=device, dtype=dtype, t=t, ids=ids)
        who = _checks.ids(ids, size[0])

        def draw(rows: list[int], shape: torch.Size) -> Tensor:
            some = [who[i] for i in rows]
            return sde.prior_sample(shape, seed=seed, device=device, dtype=dtype, t=t, ids=some)

        return padding.spread(draw, torch.empty(size, device=device, dtype=dtype))
    if isinstance(x_T, Tensor) and x_T.shape != size:
        raise ValueError(f"x_T must have the shape asked for, {tuple(size)}, got {tuple(x_T.shape)}")
    return real_state(x_T, padding, sde, "x_T")[0].to(device=device, dtype=dtype)


# A flow's state shrinks by a few per cent above the data. Programs that hand their noise to the network as it is (the
# pipelines of flow models) then begin as we do; it changes E[x_0|x] by that share of 1/r, r the level.
_NEAR = 0.8


def bridge(system: Reverse, x: Tensor, t: float, s: float, noisy: bool = False) -> Tensor:
    """x at the time s, where a grid begins, from x at t, far above: an analytic first step of the probability flow.

    So high above the data E[x_0|x] hardly depends on x, nor on t. It is evaluated once, at s and there at x, with the
    prior's change of size for data of unit variance where that is much, and the flow is exact for what was said:

        x_s = sigma_s/sigma_t x_t + (alpha_s - alpha_t sigma_s/sigma_t) E[x_0|x].

    Derived here; off by the order of 1/r^2 at the level r = sigma_s/alpha_s, which must be far above the data. The same
    evaluation then serves the first step of the rule. (One at t says the same of x_0, with an error of eps
    that counts sigma_t/alpha_t times in it.) Before a ``noisy`` sampler, whose x_t is noise like what it draws itself,
    the change of size is all. Raises ValueError for a model that says nothing where alpha = 0, if that is so at t.
    """
    system.prepare([t, s], x)
    above, below = (system.at(time, x) for time in (t, s))
    size = math.hypot(below.alpha, below.sigma) / math.hypot(above.alpha, above.sigma)
    if noisy:
        return x * size
    guess = x if size > _NEAR else x * size
    output = system.model(guess, below.time)
    a, b = express(Kind(1.0, 0.0), below.said, below.alpha, below.sigma)
    shrunk = below.sigma / above.sigma
    x_s = combine(shrunk, x, below.alpha - above.alpha * shrunk, combine(b, guess, a, output))
    system.model.tell(x_s, s, output.add(guess - x_s, alpha=b / a))
    return x_s
