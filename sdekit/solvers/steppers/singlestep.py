"""Exponential single-step methods: stages inside a step, exact but for the polynomial through earlier predictions."""

import math
from collections.abc import Sequence
from itertools import pairwise, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.solvers.steppers.base import StepRule, as_rule
from sdekit.solvers.steppers.exponential import (
    CLOCKS,
    PREDICTIONS,
    Stored,
    add_weighted,
    between,
    fitting,
    grid_levels,
    integrand,
    interpolate,
    scalars,
    stored,
)
from sdekit.system import Levels


class Stage(NamedTuple):
    """One evaluation, and the x that follows: linear times the step's first x, predictions, noise."""

    reach: float | None  # of ``stored``; None: the output itself is stored
    x_first: bool
    linear: Tensor
    weights: list[float]  # of the predictions that it uses
    carry: float  # of the noise in the x before, by the linear part from there
    std: float
    uses: Sequence[int]
    kept: bool  # whether a later stage uses its prediction too


# (c, uses): x at the fraction c of the step in half log-SNR, by the predictions of that number. Number 0 is made at the
# step's start, number j at stage j.
Stages = Sequence[tuple[float, Sequence[int]]]


def singlestep(stages: Stages, order: int, prediction: str = "eps", clock: str = "half_log_snr") -> StepRule:
    """An exponential Runge-Kutta method; one evaluation a stage, the last of which ends the step (c = 1).

    Each stage puts the polynomial through the predictions that it uses (in ``clock``) under the exact solution's
    integral; predictions and clocks are those of :func:`multistep`. The noise is that of the system's churn, drawn
    exactly, stage by stage. ``order`` is what the stages are known to have. Needs a reverse system.
    """
    _checks.lookup(PREDICTIONS, prediction, "prediction")
    _checks.lookup(CLOCKS, clock, "clock")
    sound = [0 < c <= 1 and len(uses) > 0 and all(0 <= u <= j for u in uses) for j, (c, uses) in enumerate(stages)]
    if not sound or not all(sound) or stages[-1][0] != 1:
        raise ValueError(
            f"stages must be pairs (c, uses) with 0 < c <= 1, the last c = 1, uses below j + 1; got {stages}"
        )

    token = object()

    def begin(system: Any, times: list[float], x: Tensor) -> Any:
        def make() -> Steps:
            lv = grid_levels(system, times)
            start, end = Levels(*(c[:-1] for c in lv)), Levels(*(c[1:] for c in lv))
            return tabulate(system, stages, prediction, clock, start, end, x.dtype)

        return system.keep((token, tuple(times), x.dtype), make).start(system, x), 0

    return StepRule(step, len(stages), order, begin=begin, weak_order=min(order, 2))


class Steps(NamedTuple):
    """The stages of all steps, and the times of their evaluations. The same for every run on a grid."""

    stages: list[Sequence[Stage]]
    times: list[float]

    def start(self, system: Any, x: Tensor) -> list[tuple[Sequence[Stage], Sequence[Any]]]:
        """Step by step, with the moments of the evaluations."""
        moments, each = system.moments(self.times, x), len(self.times) // len(self.stages)
        return list(zip(self.stages, [moments[i : i + each] for i in range(0, len(moments), each)], strict=True))


def tabulate(
    system: Any, stages: Stages, prediction: str, clock: str, start: Levels, end: Levels, dtype: torch.dtype
) -> Steps:
    """The stages of the steps from ``start`` (N,) to ``end`` (N,), for states of that dtype."""
    kind, to_clock = fitting(prediction, clock, Levels(*map(torch.cat, zip(start, end, strict=True))))
    at = [start]  # the levels at the step's start and at each stage
    for c, _ in stages:
        at.append(end if c == 1 else system.levels(system.sde.inverse_half_log_snr(between(start, end, c))))
    place = torch.stack([to_clock(system, lv.lam) for lv in at[:-1]], dim=1)
    pairs = [system.express(kind.kind(lv.alpha, lv.sigma), lv) for lv in at[:-1]]
    kept = [Stored.of(a, b, system.said(lv), lv) for (a, b), lv in zip(pairs, at, strict=False)]
    with_x = any(bool((b != 0).any()) for _, b in pairs)
    whole = torch.stack([s.whole if with_x else a for s, (a, _) in zip(kept, pairs, strict=True)], dim=1)
    columns = []
    for j, (_, uses) in enumerate(stages):
        used = list(uses)
        step = integrand(kind, system.churn, start, at[j + 1])
        last = integrand(kind, system.churn, at[j], at[j + 1]) if system.churn and j else step
        weights = interpolate(step.kernel, to_clock(system, step.at), place[:, used]) * whole[:, used]
        numbers = (y.tolist() for y in (weights, last.linear, last.std))
        linear, later_too = scalars(step.linear, dtype), any(j in later for _, later in stages[j + 1 :])
        reach = kept[j].reach.tolist() if with_x else repeat(None)
        columns.append(map(Stage, reach, kept[j].x_first.tolist(), linear, *numbers, repeat(used), repeat(later_too)))
    return Steps(list(zip(*columns, strict=True)), torch.stack([lv.time for lv in at[:-1]], dim=1).flatten().tolist())


def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
    """All stages of one step."""
    steps, k = state
    return _stages(system, x, noise, *steps[k]), (steps, k + 1)


def _stages(system: Any, x: Tensor, noise: Any, stages: Sequence[Stage], moments: Sequence[Any]) -> Tensor:
    predictions: list[Tensor] = []
    y, drawn = x, None
    for (reach, x_first, linear, weights, carry, std, uses, kept), moment in zip(stages, moments, strict=True):
        output = system.model(y, moment)
        if reach is not None:
            output = stored(y, output, reach, x_first)
        elif kept:
            output = output.clone()  # the network may write its next result over this one
        predictions.append(output)
        del y, output  # so that their memory serves for the next y
        y = add_weighted(x * linear, [predictions[i] for i in uses], weights)
        if std:
            fresh = std * noise.normal()
            drawn = fresh if drawn is None else fresh.add_(drawn, alpha=carry)
        if drawn is not None:
            y.add_(drawn)
    return y


_SLACK = 1 + 1e-9  # a level that is given may be the grid's own, but for rounding

# Euler in d(x/alpha)/d(sigma/alpha) = eps, and the trapezium: Heun's method in the frame of Karras et al. 2022.
_HEUN = ((1.0, (0,)), (1.0, (0, 1)))


def edm(churn: float = 40.0, low: float = 0.05, high: float = 50.0, inflate: float = 1.0) -> StepRule:
    """Heun's method with churn: each step first adds noise, up to a higher level, then solves the flow from there.

    In the frame x/alpha with levels r = sigma/alpha:  r' = (1 + g) r  with  g = min(churn/N, sqrt(2) - 1) where
    low <= r <= high, else 0;  x' = x + inflate sqrt(r'^2 - r^2) z;  Heun from r' to the next level. Karras et al. 2022,
    algorithm 2, with S_churn, S_tmin, S_tmax, S_noise in this order; the defaults are theirs for ImageNet-64 but for
    inflate, where their 1.003 makes up for a network that removes too much noise, and is wrong for an exact score.
    Where r' would lie above the process's highest level (in the first step) it is that level. churn = 0 is algorithm 1.
    Raises ValueError for a negative churn, inflate <= 0 and unless 0 <= low < high.
    """
    churn, low = _checks.positive(churn, "churn", zero=True), _checks.positive(low, "low", zero=True)
    high, inflate = _checks.positive(high, "high"), _checks.positive(inflate, "inflate")
    if low >= high:
        raise ValueError(f"low must be below high, got {low:g} and {high:g}")
    token = object()

    def begin(system: Any, times: list[float], x: Tensor) -> Any:
        if churn and times[-1] > times[0]:
            raise ValueError(
                f"edm with churn = {churn:g} adds noise, which holds backwards in time only; use churn = 0"
            )

        def make() -> tuple[list[float], list[float], Steps]:
            lv = grid_levels(system, times)
            start, end = Levels(*(c[:-1] for c in lv)), Levels(*(c[1:] for c in lv))
            r = torch.exp(-start.lam)
            more = torch.where((low <= r) & (r <= high), min(churn / len(r), math.sqrt(2) - 1), 0.0)
            top = system.levels(torch.tensor([system.sde.T], dtype=torch.float64))
            lam = torch.maximum(start.lam - more.log1p(), top.lam)
            up = lam < start.lam
            raised = system.levels(torch.where(up, system.sde.inverse_half_log_snr(lam), start.time))
            scale = torch.where(up, raised.alpha / start.alpha, 1.0)
            r_up = torch.exp(-raised.lam)
            std = torch.where(up, inflate * raised.alpha * ((r_up - r) * (r_up + r)).clamp_min(0).sqrt(), 0.0)
            return scale.tolist(), std.tolist(), tabulate(system, _HEUN, "eps", "karras", raised, end, x.dtype)

        scale, std, steps = system.keep((token, tuple(times), x.dtype), make)
        return list(zip(scale, std, steps.start(system, x), strict=True)), 0

    def take(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
        steps, k = state
        scale, std, stages = steps[k]
        if std:
            x = torch.add(scale * x, noise.normal(), alpha=std)
        return _stages(system, x, noise, *stages), (steps, k + 1)

    return StepRule(take, 2, 2, begin=begin, weak_order=2, noisy=churn > 0, churn=0.0 if churn else None)


def restart(
    rule: StepRule | None = None, low: float = 0.06, high: float = 0.3, repeats: int = 2, steps: int = 3
) -> StepRule:
    """A rule that, once it has passed the level ``low`` of sigma/alpha, goes back ``repeats`` times: exact noise up
    to the level ``high``, then ``rule`` down again in ``steps`` steps (Karras grid). Xu et al. 2023, algorithm 1.

    ``rule`` solves the flow; ``edm(churn=0)`` unless given. Its history, if any, starts afresh after each return.
    Costs repeats * steps more of its steps, once in a run. Raises ValueError where the grid does not pass ``low``,
    unless 0 < low < high, and for high above the process's highest level.
    """
    rule = edm(churn=0.0) if rule is None else as_rule(rule)
    step = rule.step
    low, high = _checks.positive(low, "low"), _checks.positive(high, "high")
    repeats, steps = _checks.count(repeats, "repeats"), _checks.count(steps, "steps")
    if low >= high:
        raise ValueError(f"low must be below high, got {low:g} and {high:g}")

    def begin(system: Any, times: list[float], x: Tensor) -> Any:
        lv = grid_levels(system, times)
        r = torch.exp(-lv.lam)
        if not r[-1] <= low * _SLACK < r[0]:
            ends = f"{float(r[0]):g} to {float(r[-1]):g}"
            raise ValueError(f"low must be a level that the grid passes, from sigma/alpha = {ends}, got {low:g}")
        i = int((r <= low * _SLACK).nonzero()[0])
        last = system.levels(torch.tensor([system.sde.T], dtype=torch.float64))
        top = math.exp(-float(last.lam))
        if high > top * _SLACK:
            raise ValueError(f"high must be at most {top:g}, the process's highest sigma/alpha, got {high:g}")
        levels = torch.linspace(min(high, top) ** (1 / 7), float(r[i]) ** (1 / 7), steps + 1, dtype=torch.float64) ** 7
        inner = system.levels(system.sde.inverse_half_log_snr(-levels.log()))
        down = [*inner.time.tolist()[:-1], times[i]]
        scale = float(inner.alpha[0] / lv.alpha[i])
        std = float(inner.alpha[0]) * math.sqrt(float(levels[0] ** 2 - r[i] ** 2))
        main = rule.begin(system, times[: i + 1], x)
        rest = rule.begin(system, times[i:], x) if i + 1 < len(times) else None
        return main, (times[i], scale, std, down, [rule.begin(system, down, x) for _ in range(repeats)], rest)

    def take(system: Any, x: Tensor, t: float, s: float, noise: Any, state: Any) -> tuple[Tensor, Any]:
        main, turning = state
        x, main = step(system, x, t, s, noise, main)
        if s == turning[0]:
            _, scale, std, down, again, main = turning
            for inner in again:
                x = torch.add(scale * x, noise.normal(), alpha=std)
                for u, v in pairwise(down):
                    x, inner = step(system, x, u, v, noise, inner)
        return x, (main, turning)

    return StepRule(
        take, rule.evaluations, rule.order, begin=begin, extra=rule.extra + repeats * steps * rule.evaluations,
        weak_order=rule.weak_order, noisy=True, churn=rule.churn,
    )  # fmt: skip
