"""Samplers: named compositions of a step rule, a noise level and a grid. No numerics here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.grids import Grid, make_grid
from sdekit.noise import Noise
from sdekit.reverse import Reverse
from sdekit.score import Score
from sdekit.sde import SDE
from sdekit.solution import Callback, SolverError
from sdekit.solve import ADAPTIVE, solve
from sdekit.steppers import RULES, StepRule, as_rule, chain, dpmpp_2m, euler_maruyama, heun, langevin, repeat, rk4

DEFAULT_STEPS = 1000


@dataclass(frozen=True)
class Sampler:
    """A step rule under ``sde.reverse(score, churn)`` on a grid (used where neither user nor process names one)."""

    rule: StepRule
    churn: float = 0.0
    grid: str = "uniform"


def predictor_corrector(predictor: str = "euler_maruyama", corrector: str = "langevin", corrector_steps: int = 1,
                        snr: float = 0.16) -> Sampler:  # fmt: skip
    """Predictor-corrector sampling: Langevin steps at t, then one predictor step of the reverse SDE to s."""
    rule = _checks.lookup(RULES, predictor, "predictor")
    correctors = {"langevin": langevin, "none": None}
    make = _checks.lookup(correctors, corrector, "corrector")
    if make is not None:
        rule = chain(repeat(make(snr), _checks.count(corrector_steps, "corrector_steps")), rule)
    return Sampler(rule, churn=1.0)


# name -> what makes it. A new sampler is a new row; tests and benchmarks loop over these.
SAMPLERS: dict[str, Sampler] = {
    "euler_maruyama": Sampler(euler_maruyama, churn=1.0),
    "reverse_diffusion": Sampler(RULES["reverse_diffusion"], churn=1.0),
    "ancestral": Sampler(RULES["ancestral"]),
    "heun_sde": Sampler(heun, churn=1.0),
    "pc": predictor_corrector(),
    "annealed_langevin": predictor_corrector("none", corrector_steps=2),
    "euler": Sampler(euler_maruyama, grid="quadratic"),
    "heun": Sampler(heun, grid="karras"),
    "rk4": Sampler(rk4, grid="karras"),
    "ddim": Sampler(RULES["ddim"], grid="quadratic"),
    "dpmpp_2m": Sampler(dpmpp_2m, grid="log_snr"),
}


@torch.no_grad()
def sample(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    sampler: str | Sampler | StepRule = "dpmpp_2m",
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
) -> Tensor:
    """Samples of shape (B, *event) by a fixed-grid sampler: a name in ``SAMPLERS``, a Sampler or a step rule.

    ``steps``: steps of the grid (default 1000 with noise, 50 without), or ``nfe``: a budget of network
    evaluations that is never exceeded (the final denoising counts; as many steps as fit are taken).
    ``grid``: None for what suits process and sampler, a name in ``GRIDS``, a callable (sde, steps) or a
    decreasing tensor of times in [t_min, T]. ``denoise``: return E[x_0|x] at the last time instead of x.
    ``seed``: fixes everything; sample i is keyed by ids[i] (default i), whatever the batch.
    ``x_T``: start here instead of at a draw from the prior at the grid's first time.
    ``device``, ``dtype``: of the state; x_T's, else the network's device and torch's default dtype.
    ``callback(step, t, x)``: after each step.

    Raises ValueError or TypeError that names the argument, and FloatingPointError for a score that is not finite.
    """
    row = _sampler(sampler)
    system = sde.reverse(score, row.churn)
    given = grid is not None and not isinstance(grid, str) and not callable(grid)
    if steps is not None and nfe is not None:
        raise ValueError(f"give steps or nfe, not both; got steps={steps} and nfe={nfe}")
    if nfe is not None:
        steps = _steps_within(nfe, row.rule, denoise)
        system.score.budget = nfe
    elif steps is None and not given:
        steps = DEFAULT_STEPS if row.churn else 50
    times = make_grid(sde, sde.grid or row.grid if grid is None else grid, None if steps is None else _steps(steps))
    x = _start(sde, score, shape, times, seed, x_T, device, dtype, ids)
    noise = Noise(x, seed, ids)
    out = solve(system, x, times, row.rule, noise=noise, progress=progress, callback=callback).x
    return _finish(system, out, float(times[-1]), denoise)


def pc_sample(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    steps: int | None = 1000,
    predictor: str = "euler_maruyama",
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
) -> Tensor:
    """Predictor-corrector samples of the reverse SDE (Song et al. 2021, algorithm 1), shape (B, *event).

    ``predictor``: a name in ``RULES``, or "none" for annealed Langevin dynamics alone. ``corrector``: "langevin"
    or "none"; ``corrector_steps`` of it per step, each of signal-to-noise ratio ``snr``. A step costs
    ``corrector_steps`` + the predictor's evaluations. Everything else as in :func:`sample`.
    """
    if grid is not None and not isinstance(grid, str) and not callable(grid) and steps == DEFAULT_STEPS:
        steps = None  # the given times say how many
    sampler = predictor_corrector(predictor, corrector, corrector_steps, snr)
    return sample(
        sde, score, shape, sampler, steps=steps, grid=grid, denoise=denoise, seed=seed, x_T=x_T, device=device,
        dtype=dtype, progress=progress, callback=callback, ids=ids,
    )  # fmt: skip


@torch.no_grad()
def ode_sample(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    method: str = "rk45",
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
) -> Tensor:
    """Samples of shape (B, *event) by the probability flow from T to t_min, solved adaptively.

    ``method``: "rk45" (error and step size per sample), or a back-end's, such as "torchdiffeq:dopri5" or
    "scipy:DOP853". ``rtol``, ``atol``: tolerances per sample. Everything else as in :func:`sample`.
    Raises SolverError, which carries the partial solution, where a sample cannot reach t_min.
    """
    if method not in ADAPTIVE and ":" not in str(method):
        _checks.lookup(dict.fromkeys((*ADAPTIVE, "torchdiffeq:dopri5", "scipy:RK45", "scipy:DOP853")), method, "method")
    system = sde.probability_flow(score)
    times = torch.tensor([sde.T, sde.t_min], dtype=torch.float64)
    x = _start(sde, score, shape, times, seed, x_T, device, dtype, ids)
    solution = solve(system, x, times, method, rtol=rtol, atol=atol, progress=progress, callback=callback)
    if not solution.success:
        raise SolverError(solution)
    return _finish(system, solution.x, sde.t_min, denoise)


def _sampler(sampler: Any) -> Sampler:
    if isinstance(sampler, Sampler):
        return sampler
    if not isinstance(sampler, str):
        return Sampler(as_rule(sampler))
    if sampler in ADAPTIVE:
        raise ValueError(f"unknown sampler {sampler!r}: it has no fixed steps; use ode_sample(..., method={sampler!r})")
    return _checks.lookup(SAMPLERS, sampler, "sampler")


def _steps(steps: Any) -> int:
    return _checks.count(steps, "steps")


def _steps_within(nfe: Any, rule: StepRule, denoise: bool) -> int:
    need = rule.evaluations + int(denoise)
    if _checks.count(nfe, "nfe") < need:
        extra = " and the final denoising" if denoise else ""
        raise ValueError(f"nfe must be at least {need}, one step of this sampler{extra}; got {nfe}")
    return (nfe - int(denoise)) // max(1, rule.evaluations)


def _start(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    times: Tensor,
    seed: int | None,
    x_T: Tensor | None,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    ids: Sequence[int] | None,
) -> Tensor:
    size = _checks.event_shape(shape)
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating dtype, got {dtype}; use torch.float32 or torch.float64")
    if x_T is None:
        device = device or getattr(score, "device", None)
        return sde.prior_sample(size, seed=seed, device=device, dtype=dtype, t=float(times[0]), ids=ids)
    if _checks.state(x_T, "x_T").shape != size:
        raise ValueError(f"x_T must have the shape asked for, {tuple(size)}, got {tuple(x_T.shape)}")
    return x_T.to(device=device, dtype=dtype)


def _finish(system: Reverse, x: Tensor, t: float, denoise: bool) -> Tensor:
    if not denoise:
        return x
    out = system.denoise(x, t)
    system.settle()
    return out
