"""Grids and weights fitted to one model: a few noises, their exact flow, and gradient descent through the sampler."""

import math
import statistics
import warnings
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from tqdm import tqdm

from sdekit import _checks
from sdekit.batch import samples
from sdekit.processes.counted import Model, as_model
from sdekit.processes.law import require_centred
from sdekit.processes.sde import SDE
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.fitting import FittedTable, Noises
from sdekit.sampling.fixed import sample
from sdekit.sampling.grids import INNER, make_grid
from sdekit.sampling.samplers import SAMPLERS
from sdekit.solvers.solution import rms
from sdekit.system import Score

_STARTS = ("ipndm", "flow_3m", "v_3m", "flow_unipc_3")
_START_GRIDS = ("vp_quadratic", "vp_cubic", "karras", "log_snr", "inner_quadratic", "inner_cubic")
_TEACHER = "unipc_3"
_SLACK = 0.02  # the share of all levels that the first and the last gap start with: their ends may move then
_JUDGES = 128  # noises that choose the start, and as many others that judge the fit, at most
_MEMORY = 2**30  # bytes that the graphs of a descent's step may take before they are made again piece by piece instead
_RATES = (0.05, 0.01, 0.03)  # of Adam: for the logarithms of gaps, linear parts, weights
_STEEP = 2.0  # times the median of the last gradients: longer ones are shortened to it


def calibrate(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    nfe: int,
    sampler: str | None = None,
    noises: int = 512,
    iterations: int = 150,
    batch: int = 32,
    coefficients: bool = True,
    seed: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Calibration:
    """A sampler of ``nfe`` evaluations fitted to this process and score (guidance that says it makes two: of half).

    Times (the first and last one too) and weights of a multistep rule are moved by gradient descent through the
    sampler, so that x_0 comes near to where the exact flow takes the same noise; the flow of ``noises`` draws is
    computed once, in many steps. The score must be differentiable in x and t; one that is not (its result carries no
    gradient) gets its times, not its weights, by Powell's COBYLA. Memory, besides the states, is that of all graphs of
    ``batch`` samples where these take less than 1 GiB (or the score is made by torch.func), else of one of them: each
    is made again when the gradient needs it. Without gradient the network is called on 4 ``batch`` samples at once.

    ``shape``: (B, *event) as for :func:`sample`; of B only what conditions of the model are for: draw i of the noises
    has those of sample i modulo B. ``sampler``: a multistep row of ``SAMPLERS`` to start from; None for the best of
    several. The start is the best of several grids, from T and from below (as ``inner`` has them), on at most 128 of
    the noises. ``iterations`` of Adam on ``batch`` of the noises each, and as many again at a slower pace where the
    first come to nothing. ``coefficients=False`` fits the times alone. ``seed``: of the noises. Up to 128 more noises
    are held out to judge: where they do not find the fit better than its start, the start is returned. ``error`` and
    ``start_error`` are theirs.

    The grid of Watson et al. 2021 and Tong et al. 2024 and the weights of Shaul et al. 2024 (BNS), in one.
    Every entry counts, those of padded samples too: fit on samples of one size, and use it for all.
    Raises ValueError or TypeError that names the argument, FloatingPointError for a score that is not finite.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # gradients are needed
            return calibrate(
                sde, score, shape, nfe=nfe, sampler=sampler, noises=noises, iterations=iterations, batch=batch,
                coefficients=coefficients, seed=seed, device=device, dtype=dtype, progress=progress,
            )  # fmt: skip
    _checks.instance(sde)
    calls: int = getattr(as_model(score, sde), "network_calls", 1)
    nfe = _checks.count(nfe, "nfe", minimum=2 * calls) // calls
    noises, batch = _checks.count(noises, "noises", minimum=2), _checks.count(batch, "batch")
    iterations = _checks.count(iterations, "iterations")
    judges = min(noises, _JUDGES)
    size = (noises + judges, *_checks.event_shape(shape)[1:])
    device = device or getattr(score, "device", None)
    require_centred(sde, "calibrate")
    x_T = sde.prior_sample(size, seed=seed, device=device, dtype=dtype)
    steps = max(50, 4 * nfe)
    # Draw i has the conditions of sample i of ``shape``, and then from the first on again.
    noise = Noises(x_T, torch.arange(len(x_T), device=x_T.device) % shape[0], shape[0])
    teach = partial(sample, sde, score, sampler=_TEACHER, grid="vp_cubic", steps=steps)
    noise.flow = noise.map(lambda part: teach(part.shape, x_T=part), 4 * batch)
    fitted, held, judging = noise[:noises], noise[noises:], noise[:judges]

    start = _best_start(sde, score, nfe, sampler, judging, batch)
    fixed = FittedTable(sde, score, *start, slack=0.0)
    start_error = fixed.error(held, batch)
    graph = _graph_bytes(as_model(score, sde), fitted[:batch], start[2][0])
    if graph is not None:
        remake = nfe * graph > _MEMORY
        for pace in (1.0, 0.2):  # some need smaller steps, which others only find slow
            model = FittedTable(sde, score, *start, slack=_SLACK, remake=remake)
            bar = tqdm(range(iterations), f"calibrating {model.sampler} for {nfe}", disable=not progress, leave=False)
            _descend(model, fitted, min(batch, noises), coefficients, pace, seed or 0, bar)
            if model.error(fitted, batch) < fixed.error(fitted, batch):
                break
    else:
        warnings.warn("score carries no gradient to x and t: only the times are fitted, not the weights", stacklevel=2)
        model = FittedTable(sde, score, *start, slack=_SLACK)
        _search(model, fitted[:batch], iterations)
    error = model.error(held, batch)
    return model.calibration(error, start_error) if error < start_error else fixed.calibration(start_error, start_error)


def price(nfe: int, noises: int = 512, iterations: int = 150, batch: int = 32) -> int:
    """About how many evaluations of one sample :func:`calibrate` makes, a gradient counted as two."""
    judges = min(noises, _JUDGES)
    teacher = (noises + judges) * (max(50, 4 * nfe) + 1)
    starts = judges * nfe * len(_STARTS) * len(_START_GRIDS)
    return teacher + starts + 3 * iterations * min(batch, noises) * nfe + 2 * (noises + judges) * nfe


def _best_start(
    sde: SDE, score: Score, nfe: int, sampler: str | None, noises: Noises, batch: int
) -> tuple[str, str, Tensor]:
    names = _STARTS if sampler is None else (sampler,)
    for name in names:
        row = _checks.lookup(SAMPLERS, name, "sampler")
        if row.rule.table is None or row.stochastic:
            fit = ", ".join(n for n, r in SAMPLERS.items() if r.rule.table is not None and not r.stochastic)
            raise ValueError(f"sampler {name!r} cannot be calibrated: it is no multistep rule of the flow; take {fit}")
    best = (math.inf, "", "")
    for name in names:
        for grid in _START_GRIDS:
            if grid in INNER and not _sound(sde, score, name, grid, nfe):
                continue
            draw = partial(sample, sde, score, sampler=name, steps=nfe - 1, grid=grid)
            x = noises.map(lambda part: draw(part.shape, x_T=part), 4 * batch)  # noqa: B023
            best = min(best, (float(rms(x - noises.flow).mean()), name, grid))
    _, name, grid = best
    return name, grid, make_grid(sde, grid, nfe - 1)


def _sound(sde: SDE, score: Score, name: str, grid: str, nfe: int) -> bool:
    """Whether the prediction after an analytic first step says x_0: eps all but does not, being that of x_T itself."""
    fixed = FittedTable(sde, score, name, grid, make_grid(sde, grid, nfe - 1), slack=0.0)
    lv = fixed.levels()
    plain = fixed.base(fixed.system, lv)
    return bool((fixed.from_T(fixed.system, lv, plain).scale[0] / plain.scale[0]).abs() > 0.5)


def _graph_bytes(model: Model, noise: Noises, t: Tensor) -> int | None:
    """The memory that the graph of one more evaluation takes; None for a score that carries no gradient to x and t."""
    kept: dict[int, int] = {}

    def keep(y: Tensor) -> Tensor:
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y.detach()  # y itself might save its own graph, and never go

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a black box that takes float(t) need not hear of gradients
        x, time = noise.x_T.detach().requires_grad_(), t.clone().requires_grad_()

        def output(y: Tensor) -> Tensor:
            with samples(noise.rows[: len(y)], noise.total):
                return model.output(y, time)

        try:
            out = output(x[:2])
        except RuntimeError:  # such as x.numpy() of a tensor with gradient
            return None
        if not out.requires_grad or None in torch.autograd.grad(out.sum(), (x, time), allow_unused=True):
            return None
        try:
            with saved_tensors_hooks(keep, lambda y: y):
                graphs, first = [output(x)], sum(kept.values())
                graphs.append(output(x))  # both alive; what all share, such as weights, is not saved anew
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            return 0  # torch.func refuses hooks, and with them to make a graph again
    return sum(kept.values()) - first


def _descend(
    model: FittedTable, fitted: Noises, batch: int, coefficients: bool, pace: float, seed: int, bar: Any
) -> None:
    """Adam with a cosine schedule. Where a few samples at the border of two modes make a gradient long it is shortened,
    since they would turn the next steps too; a step whose gradient is not finite is left out.
    """
    chosen = model.parameters if coefficients else model.parameters[:1]
    groups = [{"params": [p], "lr": pace * rate} for p, rate in zip(chosen, _RATES, strict=False)]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1.0, (k + 1) / 10) * (1 + math.cos(math.pi * k / bar.total)) / 2
    )
    lengths: deque[float] = deque(maxlen=20)
    generator, n = torch.Generator().manual_seed(seed), len(fitted.x_T)
    with torch.enable_grad():
        for _ in bar:
            loss = model.loss(fitted[torch.randperm(n, generator=generator)[:batch].to(fitted.x_T.device)])
            gradients = torch.autograd.grad(loss, chosen)
            length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            if math.isfinite(length):
                lengths.append(length)
                share = min(1.0, _STEEP * statistics.median(lengths) / length) if length else 1.0
                for parameter, gradient in zip(chosen, gradients, strict=True):
                    parameter.grad = share * gradient
                optimiser.step()
            schedule.step()


def _search(model: FittedTable, fitted: Noises, iterations: int) -> None:
    """Powell's COBYLA on the gaps, without gradients."""

    def objective(gaps: np.ndarray) -> float:
        model.gaps.data.copy_(torch.from_numpy(gaps))
        error = model.error(fitted, len(fitted.x_T))
        return error if math.isfinite(error) else 1e30

    start = model.gaps.detach().numpy().copy()
    found = minimize(objective, start, method="COBYLA", options={"maxiter": iterations, "rhobeg": 0.5})
    model.gaps.data.copy_(torch.from_numpy(found.x))
