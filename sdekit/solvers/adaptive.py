"""The adaptive loop: error, acceptance, step size and finish are each sample's own. It knows no method."""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from sdekit.batch import samples
from sdekit.solvers.solution import SUCCESS, Callback, Solution, Trajectory, bar

MAX_NFE = 100_000  # where a solver that gets nowhere gives up

State = Sequence[Tensor]  # what a method remembers, every tensor with an axis of samples in front


class Method(Protocol):
    """An adaptive method, in a variable u of its own: t, or anything monotone in t.

    ``safety`` and ``limits``: of the factor from one step to the next.
    """

    safety: float
    limits: tuple[float, float]

    @property
    def evaluations(self) -> int:
        """Of the network, of one attempt."""

    def clock(self, t: Tensor) -> Tensor:
        """u at the times t, float64."""

    def time(self, u: Tensor) -> Tensor:
        """t at u."""

    def step(self, u: Tensor, h: Tensor, direction: float) -> Tensor:
        """The step to take from u where one of h is wanted: at most h, and 0 where there is none."""

    def start(self, y: Tensor, u: Tensor, ends: Tensor, run: Tensor) -> tuple[State, Tensor, int]:
        """The first state, a first step size for each sample, and the evaluations that they took."""

    def attempt(
        self, y: Tensor, u: Tensor, u_new: Tensor, state: State, run: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float, State]:
        """y at u_new, its error in units of the tolerance (b,), the power of the step that it goes with, the state."""


def adaptive(
    method: Method,
    y: Tensor,
    times: Tensor,
    *,
    max_nfe: int = MAX_NFE,
    keep: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
    calls: Callable[[], int] = int,
    network_calls: int = 1,
) -> Solution:
    """y at times[-1] from y at times[0], monotone ``times`` in either direction, each of which is hit exactly.

    A step of sample i is accepted where its error is at most 1; its next one follows from this error and the one
    before (the PI control of Hairer & Wanner 1996, IV.2, beta a fifth of the power). Samples that are done leave the
    batch that the network sees; no evaluation lies outside the interval. ``keep`` makes the trajectory at ``times``.
    A sample that cannot go on keeps its last accepted state and says why in ``status``; from there on its trajectory
    is NaN. (A score that is not finite raises, as everywhere: that is no matter of steps.)
    ``calls``: the network calls so far, of a model; where it stays at 0, evaluations are what the method says they are.
    ``network_calls``: of one evaluation, at most.
    """
    batch, n = y.shape[0], len(times)
    clock = method.clock(times).to(y.device, torch.float32 if y.device.type == "mps" else torch.float64)
    direction = 1.0 if clock[-1] > clock[0] else -1.0
    # Everything below with a `run` index set is for the samples still running.
    result, reached = y.clone(), clock[0].expand(batch).clone()
    counts = torch.zeros(3, batch, dtype=torch.int64)  # evaluations, accepted, rejected
    status = [SUCCESS] * batch
    path = y.new_full((n, *y.shape), math.nan) if keep else None
    if path is not None:
        path[0] = y
    run = torch.arange(batch, device=y.device)
    u, aim = reached.clone(), torch.ones(batch, dtype=torch.int64, device=y.device)
    seen = calls()
    state, h, nfe = method.start(y, u, clock[[0, -1]], run)
    nfe = calls() - seen or nfe
    h = h.detach()
    before = torch.ones_like(h)  # the error of the last accepted step
    counts[0] += nfe
    for step in bar(itertools.count(1), progress):
        u_aim = clock[aim]
        left = (u_aim - u).abs()
        last = h >= left * (1 - 1e-10)  # no sliver is left over for another step
        used = torch.where(last, left, method.step(u, h, direction))
        u_new = torch.where(last, u_aim, u + direction * used)
        # What belongs to a sample, such as its label, goes where it goes.
        with samples(run, batch) if len(run) < batch else nullcontext():
            seen = calls()
            y_new, size, power, state_new = method.attempt(y, u, u_new, state, run)
        made = calls() - seen or method.evaluations
        nfe += made
        size = torch.where(torch.isfinite(size), size, math.inf).to(h).detach()  # steps are not differentiated
        accept = size <= 1
        bounded = size.clamp_min(1e-10)
        # By exp and log, which torch computes alike at every place of a batch; powers it does not.
        factor = method.safety * torch.exp((0.2 * before.log() - 0.85 * bounded.log()) / power)
        factor = factor.clamp(*method.limits)
        h_new = torch.where(accept, used * factor, used * factor.clamp_max(1.0))
        h = torch.where(accept & last, torch.maximum(h_new, h), h_new)  # a step cut short says nothing against h
        before = torch.where(accept, bounded, before)
        u = torch.where(accept, u_new, u)
        y, *state = (_pick(accept, a, b) for a, b in zip((y_new, *state_new), (y, *state), strict=True))
        ids = run.cpu()
        counts[0, ids] += made
        counts[1, ids] += accept.cpu()
        counts[2, ids] += (~accept).cpu()
        landed = accept & last
        if path is not None:
            path[aim[landed], run[landed]] = y[landed]
        aim = aim + landed
        result[run], reached[run] = y, u
        done = aim == n
        stuck = ~done & (method.step(u, h, direction) <= 4 * torch.finfo(h.dtype).eps * u.abs().clamp_min(1e-30))
        for i in run[stuck].tolist():
            status[i] = "step_underflow"
        if callback is not None:
            callback(step, method.time(reached), result.clone())
        going = ~(done | stuck)
        if not going.all():
            run, u, h, aim, before, y, *state = (a[going] for a in (run, u, h, aim, before, y, *state))
        if run.numel() == 0:
            break
        if nfe + max(made, method.evaluations * network_calls) > max_nfe:
            for i in run.tolist():
                status[i] = "max_nfe"
            break
    return Solution(
        x=result,
        # the end itself for those that are there: t as a function of the clock is exact but for rounding
        t=torch.where((reached == clock[-1]).cpu(), times[-1].cpu(), method.time(reached).cpu()),
        nfe=nfe,
        nfe_per_sample=counts[0],
        accepted=counts[1],
        rejected=counts[2],
        status=status,
        trajectory=None if path is None else Trajectory(times, path),
    )


def _pick(accept: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(accept.reshape(-1, *(1,) * (new.ndim - 1)), new, old)
