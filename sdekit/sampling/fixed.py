"""Fixed-grid samplers: named compositions of a step rule, a noise level and a grid. No numerics here."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.noise.keyed import Noise
from sdekit.processes.counted import MoreCallsError
from sdekit.processes.sde import SDE
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.grids import INNER, INNER_TO_END, Grid, before_zero, make_grid
from sdekit.sampling.starts import bridge, first_time, state
from sdekit.solvers.solution import Callback
from sdekit.solvers.solve import ADAPTIVE, ADAPTIVE_SDE, graph, solve, without_graph
from sdekit.solvers.steppers import (
    RULES,
    StepRule,
    as_rule,
    at_end,
    chain,
    euler_maruyama,
    hamiltonian,
    langevin,
    repeat,
    stay,
)
from sdekit.system import Score


@dataclass(frozen=True)
class Sampler:
    """A step rule under ``sde.reverse(score, churn)``.

    ``grid`` and ``steps`` are the defaults, where neither user nor process says otherwise.
    """

    rule: StepRule
    churn: float = 0.0
    grid: str = "uniform"
    steps: int = 50

    def __post_init__(self) -> None:
        if not isinstance(self.rule, StepRule):
            raise TypeError(f"rule must be a step rule, such as RULES['heun'] or one by step_rule, got {self.rule!r}")

    @property
    def stochastic(self) -> bool:
        """True where noise is drawn after the start."""
        return self.churn > 0 or self.rule.noisy


def predictor_corrector(
    predictor: str | StepRule = "euler_maruyama",
    corrector: str = "langevin",
    corrector_steps: int = 1,
    snr: float = 0.16,
) -> Sampler:
    """Predictor-corrector sampling: corrector steps at t, then one predictor step of the reverse SDE to s.

    Without a predictor the corrector's steps are those of s, the level that x is to be at next.
    """
    rule = _checks.lookup(RULES, predictor, "predictor") if isinstance(predictor, str) else as_rule(predictor)
    churn = 1.0 if rule.churn is None else 0.0  # a predictor with noise of its own takes none from the system
    made = {"langevin": langevin(snr), "hamiltonian": hamiltonian(snr), "none": stay}
    correct = repeat(_checks.lookup(made, corrector, "corrector"), _checks.count(corrector_steps, "corrector_steps"))
    if corrector != "none":
        rule = at_end(correct) if rule is stay else chain(correct, rule)
    elif rule is stay:
        raise ValueError("predictor and corrector are both 'none': nothing would move x; name one of them")
    return Sampler(rule, churn=churn, steps=1000)


# name -> what makes it. A new sampler is a new row; tests and benchmarks loop over these.
SAMPLERS: dict[str, Sampler] = {
    "euler_maruyama": Sampler(euler_maruyama, churn=1.0, steps=1000),
    "reverse_diffusion": Sampler(RULES["reverse_diffusion"], churn=1.0, steps=1000),
    "ancestral": Sampler(RULES["ancestral"], steps=1000),
    "heun_sde": Sampler(RULES["heun"], churn=1.0, steps=1000),
    "pc": predictor_corrector(),
    "annealed_langevin": predictor_corrector("none", corrector_steps=2),
    "dpmpp_2m_sde": Sampler(RULES["dpmpp_2m"], churn=1.0, grid="karras"),
    "dpmpp_3m_sde": Sampler(RULES["dpmpp_3m"], churn=1.0, grid="karras"),
    "sa_solver": Sampler(RULES["unipc_3"], churn=1.0, grid="karras"),
    "edm": Sampler(RULES["edm"], grid="karras"),
    "restart": Sampler(RULES["restart"], grid="karras"),
    "euler": Sampler(euler_maruyama, grid="inner_vp_1.5"),
    "heun": Sampler(RULES["heun"], grid="inner_log_snr"),
    "rk4": Sampler(RULES["rk4"], grid="inner_log_snr"),
    "ddim": Sampler(RULES["ddim"], grid="inner_quadratic"),
    "ipndm": Sampler(RULES["ipndm"], grid="inner_quadratic"),
    "deis": Sampler(RULES["deis"], grid="inner_karras"),
    "dpm_solver_2": Sampler(RULES["dpm_solver_2"], grid="inner_log_snr"),
    "dpm_solver_3": Sampler(RULES["dpm_solver_3"], grid="inner_log_snr"),
    "dpmpp_2s": Sampler(RULES["dpmpp_2s"], grid="inner_quadratic"),
    "dpmpp_2m": Sampler(RULES["dpmpp_2m"], grid="inner_cubic"),
    "dpmpp_3m": Sampler(RULES["dpmpp_3m"], grid="inner_cubic"),
    "unipc_2": Sampler(RULES["unipc_2"], grid="inner_cubic"),
    "unipc_3": Sampler(RULES["unipc_3"], grid="inner_cubic"),
    "v_3m": Sampler(RULES["v_3m"], grid="inner_quadratic"),
    "flow_3m": Sampler(RULES["flow_3m"], grid="inner_quadratic"),
    "flow_unipc_3": Sampler(RULES["flow_unipc_3"], grid="inner_quadratic"),
}


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

    Raises ValueError or TypeError that names the argument, and FloatingPointError for a score that is not finite.
    """
    again = partial(
        sample, sde, shape=shape, sampler=sampler, grid=grid, denoise=denoise, seed=seed, x_T=x_T, device=device,
        dtype=dtype, progress=progress, callback=callback, ids=ids, differentiable=differentiable, start=start,
    )  # fmt: skip
    _checks.instance(sde)
    without_graph(x_T, "x_T", differentiable)
    each = getattr(score, "network_calls", 1)
    row, times, top, scale = plan(sde, sampler, steps, nfe, grid, denoise, start, x_T, each)
    system = sde.reverse(score, row.churn)
    system.model.budget = nfe
    first, drawn = float(times[0]), sde.T if isinstance(sampler, Calibration) else top
    try:
        with graph(differentiable):
            x = state(sde, score, shape, drawn, seed, x_T, device, dtype, ids) * scale
            if first < top:
                system.model.remake = differentiable == "checkpoint"
                x = system.place(bridge(system, system.centre(x, top), top, first, row.stochastic), first)
        noise = Noise(x, seed, ids, root=sde.root)
        solution = solve(
            system, x, times, row.rule, noise=noise, denoise=denoise, progress=progress, callback=callback,
            differentiable=differentiable,
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
    )  # fmt: skip


def as_sampler(sampler: Any) -> Sampler:
    """What a user may call a sampler, as one. Raises ValueError or TypeError for what is none."""
    if isinstance(sampler, Sampler):
        return sampler
    if isinstance(sampler, Calibration):
        return Sampler(sampler.rule)
    if not isinstance(sampler, str):
        return Sampler(as_rule(sampler))
    if sampler in (*ADAPTIVE, ADAPTIVE_SDE):
        use = "sde_sample" if sampler == ADAPTIVE_SDE else f"ode_sample(..., method={sampler!r})"
        raise ValueError(f"unknown sampler {sampler!r}: it has no fixed steps; use {use}")
    return _checks.lookup(SAMPLERS, sampler, "sampler")


def _steps_within(nfe: Any, rule: StepRule, denoise: bool, calls: int) -> int:
    need = (rule.evaluations + rule.extra + int(denoise)) * calls
    if _checks.count(nfe, "nfe", minimum=-calls) < need:
        extra = " and the final denoising" if denoise else ""
        each = f", of a score that calls networks {calls} times" if calls > 1 else ""
        raise ValueError(f"nfe must be at least {need}, one step of this sampler{extra}{each}; got {nfe}")
    return (nfe // calls - int(denoise) - rule.extra) // max(1, rule.evaluations)
