"""The one fixed-grid loop: every fixed-step sampler is a step rule under it."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdekit.solution import SUCCESS, Callback, Solution, Trajectory, bar, full, keep_indices
from sdekit.steppers import StepRule
from sdekit.system import System


def integrate(
    system: System,
    rule: StepRule,
    x: Tensor,
    grid: Tensor,
    noise: Any,
    *,
    keep: int = 0,
    progress: bool = False,
    callback: Callback | None = None,
) -> Solution:
    """x at grid[-1] from x at grid[0], by ``rule`` on every pair of neighbouring times, in either direction.

    ``keep`` states (evenly spaced steps, both ends) make the trajectory, whatever the number of steps.
    """
    times: list[float] = grid.tolist()
    nfe, steps = system.nfe, len(times) - 1
    between = [t + c * (s - t) for t, s in pairwise(times) for c in rule.nodes]
    system.prepare(times + between, x)
    state = rule.begin(system, times)
    if keep > steps + 1:
        raise ValueError(f"keep must be at most {steps + 1}, the times of the grid, got {keep}")
    kept = keep_indices(steps, keep)
    path = [(times[0], x)] if kept else []
    for k, (t, s) in enumerate(bar(pairwise(times), progress, steps), start=1):
        x, state = rule(system, x, t, s, noise, state)
        if k in kept:
            path.append((s, x))
        if callback is not None:
            callback(k, s, x)
    system.settle()
    if not torch.isfinite(x).all():
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
    )
