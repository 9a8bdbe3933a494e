"""Exponential multistep methods: one generator, prediction x clock x order x corrector, at every noise level.

Every method is a table, one row of numbers per evaluation, computed from the whole grid before the loop:
    x_s = linear x + sum of weights[j] p_j + std z,    p_j = score_j + mix_j x_j,  newest first.
A corrector is in it too: the prediction at t, which the step needs anyway, improves the x_t that it was made at
(Zhao et al. 2023, UniC), and the improvement is another sum over the same predictions. So is the start.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.reverse import combine
from sdekit.steppers.base import StepRule
from sdekit.steppers.exponential import (
    CLOCKS,
    PREDICTIONS,
    Integrand,
    Prediction,
    frozen,
    integrand,
    interpolate,
    weighted,
)
from sdekit.system import Levels

_MOST = 4  # the start of a higher order would cost evaluations; also the predictions behind the newest that a row uses


class Row(NamedTuple):
    """What one evaluation, at ``time``, does: to the next x, and (``correction``) to the x that it was made at."""

    time: Tensor
    mix: float
    linear: float
    std: float
    weights: list[float]
    correction: list[float]


class State(NamedTuple):
    """The table, the row to come, and the predictions so far, newest first."""

    rows: list[Row]
    i: int
    history: tuple[Tensor, ...]


def multistep(
    order: int, prediction: str = "x0", clock: str = "half_log_snr", *, corrector: bool = False, freeze: bool = False
) -> StepRule:
    """The exponential Adams-Bashforth method through the last ``order`` predictions; one evaluation a step.

    ``prediction``: "x0" (DPM-Solver++'s), "eps" (DPM-Solver's, DEIS's), "v" or "flow". ``clock``: what they are a
    polynomial of: "half_log_snr", "karras" (sigma/alpha, DEIS's rho) or "t". ``corrector``: the next prediction
    improves the x that it was made at by the Adams-Moulton method of one order more, at no evaluation.
    ``freeze``: instead of the integral of kernel times polynomial, the kernel's integral times the polynomial's mean
    over the step in its clock, which has order 2 at most: the published DPM-Solver++(2M) and, with the clock "step"
    (the grid's index), iPNDM. The noise is that of the system's churn, drawn exactly (SA-Solver's form).

    The first steps keep the order, at no evaluation: as predictions come, the x that they were made at is made again
    from x_T by collocation.
    Needs a reverse system. Raises ValueError or TypeError for an order that is no whole number in 1 ... 4 (3 with
    corrector), an unknown prediction or clock, and what ``freeze`` excludes.
    """
    order = _checks.count(order, "order")
    if order + corrector > _MOST:
        raise ValueError(f"order must be at most {_MOST - corrector}{' with a corrector' * corrector}, got {order}")
    kind = _checks.lookup(PREDICTIONS, prediction, "prediction")
    to_clock = _checks.lookup({**CLOCKS, "step": None}, clock, "clock")
    if corrector and freeze:
        raise ValueError("freeze=True has order 2 at most, which a corrector does not raise; leave one of them out")
    if to_clock is None and not freeze:
        raise ValueError("clock 'step' takes all steps for equal, which has order 2 at most; it needs freeze=True")
    reached = min(order, 2) if freeze else order + corrector

    def begin(system: Any, times: list[float]) -> State:
        lv = system.levels(torch.tensor(times, dtype=torch.float64))
        g = integrand(kind, system.churn, Levels(*(c[:-1] for c in lv)), Levels(*(c[1:] for c in lv)))
        place = to_clock(system, lv.lam) if to_clock else torch.arange(len(times), dtype=torch.float64)
        if freeze:
            g = frozen(g, place)
        elif to_clock:
            g = g._replace(at=to_clock(system, g.at))
        return State(tabulate(lv, kind, g, place, order, corrector, reached > 2), 0, ())

    return StepRule(
        step,
        order=reached,
        begin=begin,
        weak_order=min(order, 2),
        finish=finish,
        correction=correction if corrector else None,
    )


def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: State) -> tuple[Tensor, State]:
    """One row."""
    rows, i, history = state
    row = rows[i]
    score = system.score(x, row.time)
    history = (torch.add(score, x, alpha=row.mix) if row.mix else score, *history[:_MOST])
    x_s = weighted(x, row.linear, history, row.weights)
    if row.std:
        x_s.add_(noise.normal(), alpha=row.std)
    return x_s, State(rows, i + 1, history)


def finish(system: Any, x: Tensor, t: float, state: State) -> Tensor:
    """E[x_0|x] = (x + sigma^2 score)/alpha with the corrected x, which the same evaluation gives."""
    rows, i, history = state
    n, score = system.at(t, x), system.score(x, rows[i].time)
    if rows[i].correction:
        x = weighted(x, 1.0, (torch.add(score, x, alpha=rows[i].mix), *history), rows[i].correction)
    return combine(1 / n.alpha, x, n.sigma**2 / n.alpha, score)


def correction(state: State) -> Tensor | None:
    """Corrected minus predicted x where the last evaluation was made."""
    rows, i, history = state
    weights = rows[i - 1].correction
    return weighted(history[0], weights[0], history[1:], weights[1:]) if weights else None


def tabulate(
    lv: Levels, kind: Prediction, g: Integrand, place: Tensor, order: int, corrector: bool, collocate: bool
) -> list[Row]:
    """A row per node: the first by :func:`_start`, then all alike. The last only corrects."""
    n, width = len(g.linear), order + corrector
    first = width + int(collocate and width == _MOST)
    scale, time = kind.scale(lv.alpha, lv.sigma), lv.time.unbind()
    mix, linear, std = kind.mix(lv.alpha, lv.sigma).tolist(), [*g.linear.tolist(), 1.0], [*g.std.tolist(), 0.0]
    ahead, changes = [], []
    for i, (weights, change) in enumerate(_start(g, place, order, min(first, n + 1), collocate)):
        back = scale[: i + 1].flip(0)
        ahead.append((weights * back[: len(weights)]).tolist())
        changes.append((change * back[: len(change)]).tolist())
    if n >= first:
        node = torch.arange(first, n + 1)
        seen = node[:, None] - torch.arange(width)
        kernel, at = g.kernel[node - 1], g.at[node - 1]
        predictor = interpolate(kernel, at, place[seen[:, :order] - 1])  # of the step that leads to the node
        weights = torch.zeros(len(node), width, dtype=torch.float64)
        weights[:-1, :order] = predictor[1:]
        if corrector:
            change = interpolate(kernel, at, place[seen])
            change[:, 1:] -= predictor
            weights[:-1] += g.linear[node[:-1], None] * change[:-1]
        ahead += [*(weights[:-1] * scale[seen[:-1]]).tolist(), []]
        changes += (change * scale[seen]).tolist() if corrector else [[]] * len(node)
    return list(map(Row, time, mix, linear, std, ahead, changes))


def _start(g: Integrand, place: Tensor, order: int, nodes: int, collocate: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """For nodes 0, 1, ...: the weights of the next step and of the correction, of predictions at i, i - 1, ..., 0.

    The first steps have too few predictions behind them for their order. But when there are enough, x_i can be made
    again from x_T, through the polynomial of all predictions at nodes 0 ... i, whose own errors come in times a
    step. The one at node 1 was made after a step of order one: too large an error for order 4, which leaves it out.
    """
    n = len(g.linear)
    made = torch.zeros(0, dtype=torch.float64)  # what x_i is made of, besides x_T
    for i in range(nodes):
        made, change, weights = torch.cat([torch.zeros(1, dtype=torch.float64), made]), made[:0], made[:0]
        if collocate and i:
            use = [j for j in range(i, -1, -1) if not (i > 2 and j == 1)]
            parts = interpolate(g.kernel[:i], g.at[:i], place[use].expand(i, -1))
            wanted = torch.zeros_like(made)
            wanted[[i - j for j in use]] = torch.stack([g.linear[m + 1 : i].prod() for m in range(i)]) @ parts
            change, made = wanted - made, wanted
        if i < n:
            use = [0 if i > 3 and j == 1 else j for j in range(i, max(-1, i - order), -1)]
            weights = torch.zeros_like(made)
            weights[[i - j for j in use]] = interpolate(g.kernel[i : i + 1], g.at[i : i + 1], place[use][None])[0]
            made = g.linear[i] * made + weights
            if len(change):
                weights = weights + g.linear[i] * change
        yield weights, change
