"""The one fixed-grid loop: every fixed-step sampler is a step rule under it."""

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import padding_now
from sdekit.solvers.solution import SUCCESS, Callback, Solution, Trajectory, bar, full, keep_indices, rms
from sdekit.solvers.steppers import StepRule
from sdekit.system import System


def integrate(
    system: System,
    rule: StepRule,
    x: Tensor,
    grid: Tensor,
    noise: Any,
    *,
    keep: int = 0,
    denoise: bool = False,
    estimate: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
) -> Solution:
    """x at grid[-1] from x at grid[0], by ``rule`` on every pair of neighbouring times, in either direction.

    ``keep`` states (evenly spaced steps, both ends) make the trajectory, whatever the number of steps. ``denoise``:
    then the rule's own step to t = 0. ``estimate``: sum what the rule's corrections say of its error (Solution.error).
    """
    correction = rule.correction if estimate else None
    if estimate and correction is None:
        raise ValueError("estimate needs a rule that corrects itself, such as unipc_2; this one has no free estimate")
    rule.check(system)
    times: list[float] = grid.tolist()
    nfe, steps, dtype = system.nfe, len(times) - 1, x.dtype
    between = [t + c * (s - t) for t, s in pairwise(times) for c in rule.nodes]
    system.prepare(times + between, x)
    state = rule.begin(system, times, x)
    kept = keep_indices(steps, keep)
    path = [(times[0], x)] if kept else []
    error: Tensor | float | None = math.nan if correction else None  # until a step has been corrected
    if correction and state is not None:
        correction(state)
    step, pairs, padding = rule.step, pairwise(times), padding_now()
    for k, (t, s) in enumerate(bar(pairs, progress, steps) if progress else pairs, start=1):
        noise.enter(t, s)
        x, state = step(system, x, t, s, noise, state)
        if padding is not None:  # of which a drift of the user's own may know nothing
            x = padding.only(x)
        if correction and (change := correction(state)) is not None:
            n = system.at(t, x)
            more = rms(change) / math.hypot(n.alpha, n.sigma)
            error = error + more if isinstance(error, Tensor) else more
        if k in kept:
            path.append((s, x))
        if callback is not None:
            callback(k, s, x.clone())  # x itself is the solver's memory
    if denoise:
        x = rule.finish(system, x, times[-1], state)
    system.settle()
    if x.dtype is not dtype:
        raise TypeError(f"x went from {dtype} to {x.dtype}: drift, diffusion and noise must be of x's own dtype")
    if not _checks.finite(x):
        raise FloatingPointError(f"the state overflowed between t = {times[0]:g} and {times[-1]:g}; take more steps")
    evaluations = system.nfe - nfe
    return Solution(
        x=x,
        t=full(x, times[-1], torch.float64),
        nfe=evaluations,
        nfe_per_sample=full(x, evaluations, torch.int64),
        accepted=full(x, steps, torch.int64),
        rejected=full(x, 0, torch.int64),
        status=[SUCCESS] * x.shape[0],
        trajectory=Trajectory(
            torch.tensor([t for t, _ in path], dtype=torch.float64), torch.stack([y for _, y in path])
        )
        if path
        else None,
        error=None if error is None else torch.as_tensor(error).expand(x.shape[0]).cpu().double(),
    )
