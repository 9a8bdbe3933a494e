"""Adaptive samplers: the probability flow and the reverse SDE, with error and step size per sample."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import Padding
from sdekit.noise.brownian import BrownianPath
from sdekit.processes.sde import SDE
from sdekit.sampling.starts import first_time, state
from sdekit.solvers import backends
from sdekit.solvers.solution import Callback, SolverError
from sdekit.solvers.solve import ADAPTIVE, ADAPTIVE_SDE, graph, solve, without_graph
from sdekit.system import Score


def ode_sample(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    method: str = "adams",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    denoise: bool = True,
    seed: int | None = None,
    x_T: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    ids: Sequence[int] | None = None,
    differentiable: bool | str = False,
    start: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Samples of shape (B, *event) by the probability flow from T, or ``start``, to t_min, solved adaptively.

    ``method``: "adams" (:class:`sdekit.solvers.adams.Adams`, a multistep method in a frame where the flow's linear
    part is exact, with by far the fewest evaluations: on the digits mixture of benchmarks/adaptive.py an error of 1e-2
    in 14, 1e-4 in 36), "flow_rk45" or "flow_rk23" (embedded Runge-Kutta pairs in that frame), "rk45" or "rk23" (the
    same in t), with tolerances ``rtol`` and ``atol`` and step sizes per sample; or a back-end's adaptive one
    (``backends.ADAPTIVE``: "torchdiffeq:dopri5", "scipy:DOP853", ...), whose error and steps are those of the batch as
    a whole, so that a sample depends on its batch. Everything else as in :func:`sample`.
    Raises SolverError, which carries the partial solution, where a sample cannot reach t_min.
    """
    _checks.instance(sde)
    without_graph(x_T, "x_T", differentiable)
    first = first_time(sde, start, x_T)
    times = torch.tensor([first, sde.t_min], dtype=torch.float64)
    padding = Padding.of(mask, shape, sde)
    with graph(differentiable):
        x = state(sde, score, shape, first, seed, x_T, device, dtype, ids, padding)
    return flow(
        sde, score, x, times, method, rtol=rtol, atol=atol, denoise=denoise, progress=progress, callback=callback,
        differentiable=differentiable, mask=padding,
    )  # fmt: skip


def flow(sde: SDE, score: Score, x: Tensor, times: Tensor, method: str, **options: Any) -> Tensor:
    """x at times[-1] from x at times[0], by an adaptive method; SolverError where a sample does not come there."""
    _checks.lookup({**dict.fromkeys(ADAPTIVE), **backends.ADAPTIVE}, method, "adaptive method")
    solution = solve(sde.probability_flow(score), x, times, method, **options)
    if not solution.success:
        raise SolverError(solution)
    return solution.x


def sde_sample(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    churn: float = 1.0,
    rtol: float = 0.05,
    atol: float = 0.05,
    denoise: bool = True,
    seed: int | None = None,
    x_T: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    ids: Sequence[int] | None = None,
    differentiable: bool | str = False,
    start: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Samples of shape (B, *event) by the reverse SDE from T, or ``start``, to t_min, solved adaptively
    (:class:`sdekit.solvers.sra.SRA1`).

    Error and step size are each sample's own; steps are taken on a Brownian path that is kept, so that rejecting one
    does not change the law. ``churn``: the amount of noise, 1 is the reverse SDE's. ``rtol``, ``atol``: of one step,
    in units of x. Everything else as in :func:`sample`.
    Raises SolverError, which carries the partial solution, where a sample cannot reach t_min.
    """
    _checks.instance(sde)
    without_graph(x_T, "x_T", differentiable)
    system = sde.reverse(score, churn)
    first = first_time(sde, start, x_T)
    times = torch.tensor([first, sde.t_min], dtype=torch.float64)
    padding = Padding.of(mask, shape, sde)
    with graph(differentiable):
        x = state(sde, score, shape, first, seed, x_T, device, dtype, ids, padding)
    path = BrownianPath(x, seed, ids, start=first, end=sde.t_min, root=sde.root, mask=padding)
    solution = solve(
        system, x, times, ADAPTIVE_SDE, rtol=rtol, atol=atol, noise=path, denoise=denoise, progress=progress,
        callback=callback, differentiable=differentiable, mask=padding,
    )  # fmt: skip
    if not solution.success:
        raise SolverError(solution)
    return solution.x
