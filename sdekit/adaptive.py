"""The adaptive loop: error, acceptance, step size and finish are each sample's own."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdekit.solution import SUCCESS, Callback, Solution, Trajectory, bar, rms
from sdekit.system import expand

# y' = rhs(y, t, run) for the samples of the batch that are still running: y (b, *event), t (b,), their indices run (b,)
Rhs = Callable[[Tensor, Tensor, Tensor], Tensor]

MAX_NFE = 100_000  # where a solver that gets nowhere gives up


@dataclass(frozen=True)
class Tableau:
    """An embedded Runge-Kutta pair whose last stage is the next step's first; error = sum_i e_i k_i."""

    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    e: tuple[float, ...]
    order: int


# Dormand & Prince 1980; the pair of MATLAB's ode45 and SciPy's RK45. The last row of a is the order-5 step.
DORMAND_PRINCE = Tableau(
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    e=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    order=5,
)


def adaptive(
    rhs: Rhs,
    y: Tensor,
    times: Tensor,
    *,
    rtol: float,
    atol: float,
    norm: Callable[[Tensor], Tensor] = rms,
    max_nfe: int = MAX_NFE,
    keep: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
    pair: Tableau = DORMAND_PRINCE,
) -> Solution:
    """y at times[-1] from y at times[0], monotone ``times`` in either direction, each of which is hit exactly.

    A step of sample i is accepted where norm(error_i / (atol + rtol max(|y_i|, |y_i new|))) <= 1, and its next
    one follows from its own error (Hairer, Norsett & Wanner 1993, II.4). Samples that are done leave the
    batch that ``rhs`` sees; no evaluation lies outside the interval. ``keep`` makes the trajectory at ``times``.
    A sample that cannot go on keeps its last accepted state and says why in ``status``; from there on its trajectory
    is NaN.
    """
    batch, n = y.shape[0], len(times)
    clock = times.to(y.device) if y.device.type != "mps" else times.to(y.device, torch.float32)
    direction = 1.0 if times[-1] > times[0] else -1.0
    # Everything below with a `run` index set is for the samples still running.
    result, reached = y.clone(), clock[0].expand(batch).clone()
    counts = torch.zeros(3, batch, dtype=torch.int64)  # evaluations, accepted, rejected
    status = [SUCCESS] * batch
    path = y.new_full((n, *y.shape), math.nan) if keep else None
    if path is not None:
        path[0] = y
    run = torch.arange(batch, device=y.device)
    t, aim, nfe = reached.clone(), torch.ones(batch, dtype=torch.int64, device=y.device), 2
    k_first = rhs(y, t, run)
    h = _first_step(rhs, y, t, run, k_first, clock, direction, rtol, atol, norm, pair.order)
    counts[0] += 2
    for step in bar(itertools.count(1), progress):
        t_aim = clock[aim]
        left = (t_aim - t).abs()
        last = h >= left * (1 - 1e-10)  # no sliver is left over for another step
        used = torch.where(last, left, h)
        t_new = torch.where(last, t_aim, t + direction * used)
        stages = [k_first]
        signed = expand(direction * used, y)
        y_new = y
        for c, row in zip(pair.c[1:], pair.a[1:], strict=True):
            y_new = y + signed * sum(a * k for a, k in zip(row, stages, strict=True) if a)
            stages.append(rhs(y_new, t_new if c == 1.0 else t + direction * c * used, run))
        nfe += len(pair.c) - 1
        error = signed * sum(e * k for e, k in zip(pair.e, stages, strict=True) if e)
        size = norm(error / (atol + rtol * torch.maximum(y.abs(), y_new.abs())))
        size = torch.where(torch.isfinite(size), size, math.inf)
        accept = size <= 1
        factor = (0.9 * size.clamp_min(1e-10) ** (-1 / pair.order)).to(h).clamp(0.2, 10.0)
        h_new = torch.where(accept, used * factor, used * factor.clamp_max(1.0))
        h = torch.where(accept & last, torch.maximum(h_new, h), h_new)  # a step cut short says nothing against h
        t = torch.where(accept, t_new, t)
        pick = expand(accept.to(y.dtype), y) > 0
        y, k_first = torch.where(pick, y_new, y), torch.where(pick, stages[-1], k_first)
        ids = run.cpu()
        counts[0, ids] += len(pair.c) - 1
        counts[1, ids] += accept.cpu()
        counts[2, ids] += (~accept).cpu()
        landed = accept & last
        if path is not None:
            path[aim[landed], run[landed]] = y[landed]
        aim = aim + landed
        result[run], reached[run] = y, t
        done = aim == n
        stuck = ~done & (h <= 4 * torch.finfo(h.dtype).eps * t.abs().clamp_min(1e-30))
        for i in run[stuck].tolist():
            status[i] = "step_underflow"
        if callback is not None:
            callback(step, reached.clone(), result.clone())
        going = ~(done | stuck)
        if not going.all():
            run, t, h, aim = run[going], t[going], h[going], aim[going]
            y, k_first = y[going], k_first[going]
        if run.numel() == 0:
            break
        if nfe + len(pair.c) - 1 > max_nfe:
            for i in run.tolist():
                status[i] = "max_nfe"
            break
    return Solution(
        x=result,
        t=reached.cpu(),
        nfe=nfe,
        nfe_per_sample=counts[0],
        accepted=counts[1],
        rejected=counts[2],
        status=status,
        trajectory=None if path is None else Trajectory(times, path),
    )


def _first_step(
    rhs: Rhs,
    y: Tensor,
    t: Tensor,
    run: Tensor,
    k: Tensor,
    clock: Tensor,
    direction: float,
    rtol: float,
    atol: float,
    norm: Callable[[Tensor], Tensor],
    order: int,
) -> Tensor:
    """A first step size per sample from one more evaluation, kept inside the interval (Hairer et al., II.4)."""
    scale = atol + rtol * y.abs()
    d0, d1 = norm(y / scale), norm(k / scale)
    span = (clock[-1] - clock[0]).abs()
    small = (d0 < 1e-5) | (d1 < 1e-5)
    h0 = torch.where(small, 1e-6 * span, (0.01 * d0 / d1).to(t)).clamp_max(span)
    t_probe = (t + direction * h0).clamp(clock.min(), clock.max())  # t + span may lie a rounding beyond the end
    k_probe = rhs(y + expand(direction * h0, y) * k, t_probe, run)
    d2 = norm((k_probe - k) / scale).to(t) / h0
    steepest = torch.maximum(d1.to(t), d2)
    flat = torch.maximum(1e-6 * span, h0 * 1e-3)
    h1 = torch.where(steepest <= 1e-15, flat, (0.01 / steepest) ** (1 / order))
    h = torch.minimum(100 * h0, h1).clamp_max(span)
    return torch.where(torch.isfinite(h), h, 1e-6 * span)  # what is not finite is rejected until the step underflows
