"""What a solver hands back, and how it tells where it is."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdekit.batch import event_mean

SUCCESS = "success"
HINTS = {
    "max_nfe": "the evaluation limit was reached before the end; raise rtol and atol",
    "step_underflow": "the step fell below what time can resolve; raise atol, or t_min, or use float64",
    "failed": "the back-end gave up",
}

# callback(step, t, x): t is a float on a fixed grid, a (B,) tensor where every sample has its own time.
Callback = Callable[[int, Any, Tensor], None]


@dataclass
class Trajectory:
    """States kept along the way: ``x`` (K, B, *event) at the times ``t`` (K,), float64, first and last included.

    Samples that stopped early are NaN at the times they did not reach.
    """

    t: Tensor
    x: Tensor


@dataclass(repr=False)
class Solution:
    """The result of :func:`sdekit.solvers.solve`.

    ``x`` (B, *event): the last state. ``t`` (B,): the time each sample reached. ``nfe``: network
    evaluations, counted as calls. ``nfe_per_sample`` (B,): evaluations that each sample took part in.
    ``accepted``, ``rejected`` (B,): steps; None from a back-end that does not tell.
    ``status``: per sample "success", "max_nfe", "step_underflow" or "failed". ``trajectory``: kept states, or None.
    ``error`` (B,), float64, on request (``estimate``): the sum over the steps of corrected minus predicted x, each as
    RMS over the event in units of sqrt(alpha_t^2 + sigma_t^2): an estimate of the predictor's error in x_0, which for
    data of unit variance the flow carries over as it stands (the corrected result is better than that). The last step,
    after which nothing is evaluated, is not in it; NaN of a single step.
    """

    x: Tensor
    t: Tensor
    nfe: int
    nfe_per_sample: Tensor
    accepted: Tensor | None
    rejected: Tensor | None
    status: list[str]
    trajectory: Trajectory | None = field(default=None, repr=False)
    error: Tensor | None = None
    reason: str = ""  # a back-end's own words, where it gave up; the limit that was given

    def __repr__(self) -> str:
        there = self.status.count(SUCCESS)
        return f"Solution({there} of {len(self.status)} samples {tuple(self.x.shape[1:])} at the end, nfe={self.nfe})"

    @property
    def success(self) -> bool:
        """True if every sample reached the end."""
        return all(status == SUCCESS for status in self.status)

    @property
    def hint(self) -> str:
        """What to do about the samples that did not reach the end; empty if all did."""
        return "; ".join(
            f"{self.status.count(name)} of {len(self.status)} samples stopped: {HINTS[name]}"
            for name in HINTS
            if name in self.status
        ) + (f" ({self.reason})" if self.reason else "")


class SolverError(RuntimeError):
    """A sampler could not finish; ``solution`` is the partial result with a status per sample."""

    def __init__(self, solution: Solution) -> None:
        t = solution.t
        super().__init__(f"{solution.hint} (times reached: {float(t.min()):g} ... {float(t.max()):g})")
        self.solution = solution


def bar(steps: Iterable[Any], progress: bool, total: int | None = None) -> Iterator[Any]:
    """``steps``, with a progress bar on request."""
    return iter(tqdm(steps, total=total, disable=not progress, leave=False))


def keep_indices(n: int, keep: int) -> set[int]:
    """``keep`` of the numbers 0 ... n of a grid's times, evenly spaced, both ends included."""
    if keep > n + 1:
        raise ValueError(f"keep must be at most {n + 1}, the times of the grid, got {keep}")
    return {round(i * n / (keep - 1)) for i in range(keep)} if keep else set()


def keep_times(grid: Tensor, keep: int) -> Tensor:
    """``keep`` times, evenly spaced, from the grid's first to its last."""
    return torch.stack([torch.lerp(grid[0], grid[-1], i / (keep - 1)) for i in range(keep)])


def rms(y: Tensor) -> Tensor:
    """Root mean square over the event, of what is real of it, per sample: (b, *event) -> (b,)."""
    return event_mean(y.square()).sqrt()


def full(x: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """A CPU vector with one entry per sample."""
    return torch.full((x.shape[0],), value, dtype=dtype)
