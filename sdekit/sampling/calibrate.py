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
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from sdekit import _checks
from sdekit.processes.reverse import Reverse
from sdekit.processes.sde import SDE
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.fixed import SAMPLERS, sample
from sdekit.sampling.grids import GRIDS
from sdekit.solvers.solution import rms
from sdekit.solvers.steppers.multistep import Table
from sdekit.system import Levels, Score

_STARTS = ("ipndm", "flow_3m", "v_3m", "flow_unipc_3")
_START_GRIDS = ("vp_quadratic", "vp_cubic", "karras", "log_snr")
# Fitted are multiples of the newest prediction and of its first and second differences: predictions that follow one
# another are much the same, so that their own weights would all but cancel.
_DIFFERENCES = torch.tensor([[1.0, 0.0, 0.0], [1.0, -1.0, 0.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
_BACK = len(_DIFFERENCES)
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
    """A sampler of ``nfe`` evaluations fitted to this process and score.

    Times (the first and last one too) and weights of a multistep rule are moved by gradient descent through the
    sampler, so that x_0 comes near to where the exact flow takes the same noise; the flow of ``noises`` draws is
    computed once, in many steps. The score must be differentiable in x and t; one that is not (its result carries no
    gradient) gets its times, not its weights, by Powell's COBYLA. Memory, besides the states, is that of all graphs of
    ``batch`` samples where these take less than 1 GiB (or the score is made by torch.func), else of one of them: each
    is made again when the gradient needs it. Without gradient the network is called on 4 ``batch`` samples at once.

    ``shape``: (B, *event) as for :func:`sample`; only the event matters. ``sampler``: a multistep row of ``SAMPLERS``
    to start from; None for the best of several. The start is the best of several grids, on at most 128 of the noises.
    ``iterations`` of Adam on ``batch`` of the noises each, and as many again at a slower pace where the first come to
    nothing. ``coefficients=False`` fits the times alone. ``seed``: of the noises.
    Up to 128 more noises are held out to judge: where they do not find the fit better than its start, the start is
    returned. ``error`` and ``start_error`` are theirs.

    The grid of Watson et al. 2021 and Tong et al. 2024 and the weights of Shaul et al. 2024 (BNS), in one.
    Raises ValueError or TypeError that names the argument, FloatingPointError for a score that is not finite.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # gradients are needed
            return calibrate(
                sde, score, shape, nfe=nfe, sampler=sampler, noises=noises, iterations=iterations, batch=batch,
                coefficients=coefficients, seed=seed, device=device, dtype=dtype, progress=progress,
            )  # fmt: skip
    _checks.instance(sde)
    nfe = _checks.count(nfe, "nfe", minimum=2)
    noises, batch = _checks.count(noises, "noises", minimum=2), _checks.count(batch, "batch")
    iterations = _checks.count(iterations, "iterations")
    judges = min(noises, _JUDGES)
    size = (noises + judges, *_checks.event_shape(shape)[1:])
    device = device or getattr(score, "device", None)
    x_T = sde.prior_sample(size, seed=seed, device=device, dtype=dtype)
    steps = max(50, 4 * nfe)
    teach = partial(sample, sde, score, sampler=_TEACHER, grid="vp_cubic", steps=steps)
    x_0 = torch.cat([teach(part.shape, x_T=part) for part in x_T.split(4 * batch)])
    fitted, held = (x_T[:noises], x_0[:noises]), (x_T[noises:], x_0[noises:])

    start = _best_start(sde, score, nfe, sampler, (x_T[:judges], x_0[:judges]), batch)
    fixed = _Table(sde, score, *start, slack=0.0)
    start_error = fixed.error(*held, batch)
    graph = _graph_bytes(score, fitted[0][:batch], float(start[2][0]))
    if graph is not None:
        through = score if nfe * graph <= _MEMORY else partial(checkpoint, score, use_reentrant=False)
        for pace in (1.0, 0.2):  # some need smaller steps, which others only find slow
            model = _Table(sde, through, *start, slack=_SLACK)
            bar = tqdm(range(iterations), f"calibrating {model.sampler} for {nfe}", disable=not progress, leave=False)
            _descend(model, fitted, min(batch, noises), coefficients, pace, seed or 0, bar)
            if model.error(*fitted, batch) < fixed.error(*fitted, batch):
                break
    else:
        warnings.warn("score carries no gradient to x and t: only the times are fitted, not the weights", stacklevel=2)
        model = _Table(sde, score, *start, slack=_SLACK)
        _search(model, (fitted[0][:batch], fitted[1][:batch]), iterations)
    error = model.error(*held, batch)
    return model.calibration(error, start_error) if error < start_error else fixed.calibration(start_error, start_error)


class _Table:
    """A multistep rule's table as a differentiable function: gaps between the levels, and additions to the weights.

    The additions are in units of the step, the sum of its weights (what corrects an earlier step adds up to about 0):
    so one rate serves all steps, many or few.
    """

    def __init__(self, sde: SDE, score: Score, sampler: str, grid: str, times: Tensor, slack: float) -> None:
        self.sde, self.score, self.sampler, self.grid = sde, score, sampler, grid
        self.base, self.system = SAMPLERS[sampler].rule.table, Reverse(sde, score, 0.0)
        first, last = float(sde.half_log_snr(sde.T)), float(sde.half_log_snr(sde.t_min))
        self.first, self.range, n = first, last - first, len(times)
        gaps = torch.cat([torch.zeros(1), sde.half_log_snr(times).diff() / self.range, torch.zeros(1)])
        self.gaps = (gaps + slack).log().requires_grad_()  # in a softmax: a gap of 0 is -inf, and stays
        self.linear = torch.zeros(n, dtype=torch.float64, requires_grad=True)
        self.weights = torch.zeros(n, _BACK, dtype=torch.float64, requires_grad=True)
        self.parameters = [self.gaps, self.linear, self.weights]

    def levels(self) -> Levels:
        """The levels of the evaluations; t(lambda) by bisection, with the derivative of the inverse function."""
        lam = self.first + self.range * torch.softmax(self.gaps, 0).cumsum(0)[:-1]
        with torch.no_grad():
            t = self.sde.inverse_half_log_snr(lam)
            c = self.sde.coefficients(t)
        t = t + (lam - lam.detach()) * (-2 * c.sigma**2 / c.g2)  # dlambda/dt = -g^2/(2 sigma^2)
        return Levels(t, self.sde.alpha(t), self.sde.sigma(t), lam)

    def table(self) -> tuple[Levels, Table]:
        """Levels, and the rule's table with the additions."""
        lv = self.levels()
        table = self.base(self.system, lv)
        size = torch.hypot(lv.alpha, lv.sigma)  # of x at each level
        step = table.weights.sum(1).abs()
        width = max(_BACK, table.weights.shape[1])
        weights = pad(table.weights, (0, width - table.weights.shape[1]))
        more = self.weights.tril() @ _DIFFERENCES
        weights = weights + pad(step[:, None] * more, (0, width - _BACK))
        return lv, table._replace(linear=table.linear + step / size * self.linear, weights=weights)

    def __call__(self, x_T: Tensor) -> Tensor:
        lv, table = self.table()
        x = x_T * (lv.sigma[0] / float(self.sde.sigma(self.sde.T)))
        history: list[Tensor] = []
        columns = (table.time, table.scale, table.mix, table.linear, table.weights)
        for time, scale, mix, linear, weights in zip(*columns, strict=True):
            history.insert(0, scale * self.score(x, time).to(x.dtype) + mix * x)
            x = linear * x
            for w, p in zip(weights, history, strict=False):
                x = x + w * p
        return x

    def loss(self, x_T: Tensor, x_0: Tensor) -> Tensor:
        """Mean over samples of the RMS over the event."""
        return rms(self(x_T) - x_0).mean()

    @torch.no_grad()
    def error(self, x_T: Tensor, x_0: Tensor, batch: int) -> float:
        """The loss as a number."""
        x = torch.cat([self(part) for part in x_T.split(4 * batch)])
        return float(rms(x - x_0).mean())

    @torch.no_grad()
    def calibration(self, error: float, start_error: float) -> Calibration:
        """The table as it stands."""
        lv, table = self.table()
        return Calibration(
            sampler=self.sampler,
            grid=self.grid,
            times=lv.time.tolist(),
            scale=table.scale.tolist(),
            mix=table.mix.tolist(),
            linear=table.linear.tolist(),
            weights=[row[: i + 1] for i, row in enumerate(table.weights.tolist())],
            error=error,
            start_error=start_error,
            T=self.sde.T,
            prior_std=float(self.sde.sigma(self.sde.T)),
            alpha=lv.alpha.tolist(),
            sigma=lv.sigma.tolist(),
        )


def _best_start(
    sde: SDE, score: Score, nfe: int, sampler: str | None, noises: tuple[Tensor, Tensor], batch: int
) -> tuple[str, str, Tensor]:
    names = _STARTS if sampler is None else (sampler,)
    for name in names:
        row = _checks.lookup(SAMPLERS, name, "sampler")
        if row.rule.table is None or row.stochastic:
            fit = ", ".join(n for n, r in SAMPLERS.items() if r.rule.table is not None and not r.stochastic)
            raise ValueError(f"sampler {name!r} cannot be calibrated: it is no multistep rule of the flow; take {fit}")
    x_T, x_0 = noises
    best = (math.inf, "", "")
    for name in names:
        for grid in _START_GRIDS:
            draw = partial(sample, sde, score, sampler=name, nfe=nfe, grid=grid)
            x = torch.cat([draw(part.shape, x_T=part) for part in x_T.split(4 * batch)])
            best = min(best, (float(rms(x - x_0).mean()), name, grid))
    _, name, grid = best
    return name, grid, GRIDS[grid](sde, nfe - 1)


def _graph_bytes(score: Score, x: Tensor, t: float) -> int | None:
    """The memory that the graph of one more evaluation takes; None for a score that carries no gradient to x and t."""
    kept: dict[int, int] = {}

    def keep(y: Tensor) -> Tensor:
        kept[y.untyped_storage().data_ptr()] = y.untyped_storage().nbytes()
        return y.detach()  # y itself might save its own graph, and never go

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a black box that takes float(t) need not hear of gradients
        x, time = x.detach().requires_grad_(), torch.tensor(t, dtype=torch.float64, requires_grad=True)
        try:
            out = score(x[:2], time)
        except RuntimeError:  # such as x.numpy() of a tensor with gradient
            return None
        if not out.requires_grad or None in torch.autograd.grad(out.sum(), (x, time), allow_unused=True):
            return None
        try:
            with saved_tensors_hooks(keep, lambda y: y):
                graphs, first = [score(x, time)], sum(kept.values())
                graphs.append(score(x, time))  # both alive; what all share, such as weights, is not saved anew
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            return 0  # torch.func refuses hooks, and with them to make a graph again
    return sum(kept.values()) - first


def _descend(
    model: _Table, fitted: tuple[Tensor, Tensor], batch: int, coefficients: bool, pace: float, seed: int, bar: Any
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
    generator, n = torch.Generator().manual_seed(seed), len(fitted[0])
    with torch.enable_grad():
        for _ in bar:
            pick = torch.randperm(n, generator=generator)[:batch].to(fitted[0].device)
            loss = model.loss(fitted[0][pick], fitted[1][pick])
            gradients = torch.autograd.grad(loss, chosen)
            length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
            if math.isfinite(length):
                lengths.append(length)
                share = min(1.0, _STEEP * statistics.median(lengths) / length) if length else 1.0
                for parameter, gradient in zip(chosen, gradients, strict=True):
                    parameter.grad = share * gradient
                optimiser.step()
            schedule.step()


def _search(model: _Table, fitted: tuple[Tensor, Tensor], iterations: int) -> None:
    """Powell's COBYLA on the gaps, without gradients."""

    def objective(gaps: np.ndarray) -> float:
        model.gaps.data.copy_(torch.from_numpy(gaps))
        error = model.error(*fitted, len(fitted[0]))
        return error if math.isfinite(error) else 1e30

    start = model.gaps.detach().numpy().copy()
    found = minimize(objective, start, method="COBYLA", options={"maxiter": iterations, "rhobeg": 0.5})
    model.gaps.data.copy_(torch.from_numpy(found.x))
