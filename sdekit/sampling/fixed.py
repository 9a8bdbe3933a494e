"""Sampling on a fixed grid: what the arguments mean, and the call that runs it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import Padding, padded
from sdekit.noise.keyed import Noise
from sdekit.processes.counted import MoreCallsError
from sdekit.processes.sde import SDE
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.grids import INNER, INNER_TO_END, Grid, before_zero, make_grid
from sdekit.sampling.samplers import Sampler, as_sampler, predictor_corrector
from sdekit.sampling.starts import bridge, first_time, state
from sdekit.solvers.solution import Callback
from sdekit.solvers.solve import graph, solve, without_graph
from sdekit.solvers.steppers import StepRule
from sdekit.system import Score


def sample(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    sampler: str | Sampler | StepRule | Calibration = "unipc_2",
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Grid | None = None,
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
    """Samples of shape (B, *event) by a fixed-grid sampler: a name in ``SAMPLERS``, a Sampler, a step rule, or what
    :func:`calibrate` made for this model (which has its own steps and grid).

    A bare step rule runs on the probability flow; ``Sampler(rule, churn=1.0)`` puts it on the reverse SDE.
    ``steps``: steps of the grid (default the sampler's, 1000 with noise and 50 without), or ``nfe``: a budget of
    network evaluations that is never exceeded (the final denoising counts; as many steps as fit are taken). A closure
    of two networks takes two a time, and is found out at a loss unless it says so (``closure.network_calls = 2``).
    ``grid``: None for what suits process and sampler, a name in ``GRIDS``, a callable (sde, steps) or a
    decreasing tensor of times in [t_min, T]; one that goes on to 0 ends with the denoising, which is that step. What
    suits few steps (:func:`sdekit.sampling.grids.inner`) begins below T, where an analytic first step leads
    (:func:`sdekit.sampling.starts.bridge`), and the denoising is from above t_min; it is for data of about unit size,
    a named grid such as "karras" is for any.
    ``denoise``: return E[x_0|x] at the last time instead of x.
    ``seed``: fixes everything; sample i is keyed by ids[i] (default i), whatever the batch.
    ``x_T``: start here instead of at a draw from the prior. It is at ``start``, a time of the process: T unless given,
    or the first time of a tensor or a callable's grid. With ``start`` a named grid, or a callable's, is that of the
    process on [t_min, start]; so an image is edited from half way (SDEdit, Meng et al. 2022):
    ``sample(sde, score, x.shape, x_T=sde.perturb(x, 0.5), start=0.5)``.
    ``device``, ``dtype``: of the state; x_T's, else the network's device and torch's default dtype.
    ``callback(step, t, x)``: after each step, with a copy of x.
    ``differentiable``: keep the graph, so that the samples have gradients to x_T and to the model's parameters; memory
    grows with the evaluations, unless it is "checkpoint": then each one's graph is made again when the gradient needs
    it, and what stays is a few states a step.
    ``mask``: of samples of different sizes, padded to one: a bool tensor of the first axes of ``shape``, (B, N) for
    sets of points (B, N, d), True where an entry is real. Each sample is then what it would be alone, without its
    padding, which is 0: noise is drawn and errors are measured over what is real. The network gets it as a condition of
    its own, ``score.given(mask)``, so that real points do not look at the others; what it says of these is not used.

    Raises ValueError or TypeError that names the argument, and FloatingPointError for a score that is not finite.
    """
    again = partial(
        sample, sde, shape=shape, sampler=sampler, grid=grid, denoise=denoise, seed=seed, x_T=x_T, device=device,
        dtype=dtype, progress=progress, callback=callback, ids=ids, differentiable=differentiable, start=start,
        mask=mask,
    )  # fmt: skip
    _checks.instance(sde)
    without_graph(x_T, "x_T", differentiable)
    each = getattr(score, "network_calls", 1)
    row, times, top, scale = plan(sde, sampler, steps, nfe, grid, denoise, start, x_T, each)
    system, padding = sde.reverse(score, row.churn), Padding.of(mask, shape, sde)
    system.model.budget = nfe
    first, drawn = float(times[0]), sde.T if isinstance(sampler, Calibration) else top
    try:
        with graph(differentiable), padded(padding):
            x = state(sde, score, shape, drawn, seed, x_T, device, dtype, ids, padding) * scale
            if first < top:
                system.model.remake = differentiable == "checkpoint"
                x = system.place(bridge(system, system.centre(x, top), top, first, row.stochastic), first)
        noise = Noise(x, seed, ids, root=sde.root, mask=padding)
        solution = solve(
            system, x, times, row.rule, noise=noise, denoise=denoise, progress=progress, callback=callback,
            differentiable=differentiable, mask=padding,
        )  # fmt: skip
    except MoreCallsError as more:
        return again(score=more.model, nfe=int(nfe or 0) - more.spent, device=device or getattr(score, "device", None))
    except ValueError:
        system.model.check()  # the state that is not finite is what an evaluation before the first step made of it
        raise
    return solution.x


class Plan(NamedTuple):
    """What :func:`sample` does with its arguments before it draws or evaluates anything."""

    row: Sampler
    times: Tensor  # of the steps
    top: float  # the time that x_T is at: the first of the times, or above them (then a bridge leads there)
    scale: float  # what a draw at T is multiplied by, where a calibration begins


def plan(
    sde: SDE,
    sampler: str | Sampler | StepRule | Calibration,
    steps: int | None,
    nfe: int | None,
    grid: Grid | None,
    denoise: bool,
    start: float | None,
    x_T: Tensor | None,
    calls: int = 1,
) -> Plan:
    """The sampler, the times and where x_T is, from the arguments of :func:`sample`, and ``calls`` an evaluation."""
    scale = 1.0
    if isinstance(sampler, Calibration):
        sampler.check(sde)
        if steps is not None or grid is not None:
            raise ValueError(f"a calibration has its own {sampler.nfe} evaluations and grid; leave steps and grid out")
        if start is not None:
            raise ValueError("a calibration is of the whole way from T: leave start out, or take a row of SAMPLERS")
        grid, scale = torch.tensor(sampler.times, dtype=torch.float64), sampler.start
    row = as_sampler(sampler)
    given = grid is not None and not isinstance(grid, str) and not callable(grid)
    if nfe is not None:
        if steps is not None:
            raise ValueError(f"give steps or nfe, not both; got steps={steps} and nfe={nfe}")
        most = _steps_within(nfe, row.rule, denoise, calls)
        steps = None if given else most
    elif steps is None and not given:
        steps = row.steps
    steps = None if steps is None else _checks.count(steps, "steps")
    top = first_time(sde, start, x_T)
    if grid is None:
        grid = sde.grid if sde.grid and row.grid == "uniform" else row.grid
    inner = isinstance(grid, str) and grid in INNER
    made = INNER_TO_END[str(grid)] if inner and not denoise else grid
    times = make_grid(sde, before_zero(sde, made) if given and denoise else made, steps, top)
    if nfe is not None and len(times) - 1 > most:
        raise ValueError(f"grid has {len(times) - 1} steps, but nfe = {nfe} allows {most} of this sampler's")
    first = float(times[0])
    if start is not None and not inner and top - first > 1e-6 * sde.T:
        raise ValueError(f"grid begins at {first:g}, and x_T is at start = {top:g}: they must be the same time")
    return Plan(row, times, top if inner else first, scale)


def pc_sample(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    steps: int | None = None,
    predictor: str | StepRule = "euler_maruyama",
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
    grid: Grid | None = None,
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
    """Predictor-corrector samples of the reverse SDE, shape (B, *event).

    Each step corrects at t, then predicts from t to s: Song et al. 2021, algorithm 1, in the order of their code.
    ``predictor``: a name in ``RULES`` or a step rule; "none" is annealed Langevin dynamics alone, which needs many
    steps. ``corrector``: "langevin", "hamiltonian" or "none"; ``corrector_steps`` of it per step, each of
    signal-to-noise ratio ``snr``. A step costs ``corrector_steps`` + the predictor's evaluations. ``steps``: 1000 where
    ``grid`` does not say it itself. Everything else as in :func:`sample`.
    """
    sampler = predictor_corrector(predictor, corrector, corrector_steps, snr)
    return sample(
        sde, score, shape, sampler, steps=steps, grid=grid, denoise=denoise, seed=seed, x_T=x_T, device=device,
        dtype=dtype, progress=progress, callback=callback, ids=ids, differentiable=differentiable, start=start,
        mask=mask,
    )  # fmt: skip


def _steps_within(nfe: Any, rule: StepRule, denoise: bool, calls: int) -> int:
    need = (rule.evaluations + rule.extra + int(denoise)) * calls
    if _checks.count(nfe, "nfe", minimum=-calls) < need:
        extra = " and the final denoising" if denoise else ""
        each = f", of a score that calls networks {calls} times" if calls > 1 else ""
        raise ValueError(f"nfe must be at least {need}, one step of this sampler{extra}{each}; got {nfe}")
    return (nfe // calls - int(denoise) - rule.extra) // max(1, rule.evaluations)
