"""Exponential multistep methods: one generator, prediction x clock x order x corrector, at every noise level.

Every method is a table, one row of numbers per evaluation, computed from the whole grid before the loop:
    x_s = linear x + sum of weights[j] p_j + std z,    p_j = scale_j score_j + mix_j x_j,  newest first.
A corrector is in it too: the prediction at t, which the step needs anyway, improves the x_t that it was made at
(Zhao et al. 2023, UniC), and the improvement is another sum over the same predictions. So is the start.
"""

from collections.abc import Callable, Iterator, Sequence
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
    predict,
    weighted,
)
from sdekit.system import Levels

# Over more of half log-SNR the polynomial of collocation errs by more than it mends; no limit to the order.
_SPAN = 3.0
_MOST = 4  # the start of a higher order would cost evaluations; also the predictions behind the newest that a row uses


class Row(NamedTuple):
    """What one evaluation, at ``time``, does: to the next x, and (``correction``) to the x that it was made at."""

    time: Tensor
    scale: float
    mix: float
    linear: float
    std: float
    weights: list[float]
    correction: list[float]


# How a tensor becomes the numbers of rows: floats, or (for calibration) tensors that carry gradients.
Numbers = Callable[[Tensor], Sequence[Any]]


class Table(NamedTuple):
    """A rule as a function of its levels: what it predicts, and its rows from (system, levels, numbers)."""

    prediction: Prediction
    rows: Callable[..., list[Row]]


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
    polynomial of: "half_log_snr", "karras" (sigma/alpha, DEIS's rho), "flow" (sigma/(alpha + sigma)) or "t".
    ``corrector``: the next prediction improves the x that it was made at by the Adams-Moulton method of one order more,
    at no evaluation.
    ``freeze``: the predictor takes, instead of the integral of kernel times polynomial, the kernel's integral times
    the polynomial's mean over the step in its clock, which has order 2 at most: the published DPM-Solver++(2M), UniPC's
    predictor of order 2 and, with the clock "step" (the grid's index), iPNDM. The noise is that of the system's churn,
    drawn exactly (SA-Solver's form).

    The first steps keep the order, at no evaluation: as predictions come, the x that they were made at is made again
    from x_T by collocation (where the steps are not so large that this does harm).
    Needs a reverse system. Raises ValueError or TypeError for an order that is no whole number in 1 ... 4 (3 with
    corrector), an unknown prediction or clock, and what ``freeze`` excludes.
    """
    order = _checks.count(order, "order")
    if order + corrector > _MOST:
        raise ValueError(f"order must be at most {_MOST - corrector}{' with a corrector' * corrector}, got {order}")
    kind = _checks.lookup(PREDICTIONS, prediction, "prediction")
    to_clock = _checks.lookup({**CLOCKS, "step": None}, clock, "clock")
    if corrector and freeze and (order > 2 or to_clock is None):
        raise ValueError(
            "freeze=True has order 2 at most; a corrector needs order <= 2 then, and a clock of the process"
        )
    if to_clock is None and not freeze:
        raise ValueError("clock 'step' takes all steps for equal, which has order 2 at most; it needs freeze=True")
    reached = (min(order, 2) if freeze else order) + corrector

    def rows(system: Any, lv: Levels, numbers: Numbers = Tensor.tolist) -> list[Row]:
        g = integrand(kind, system.churn, Levels(*(c[:-1] for c in lv)), Levels(*(c[1:] for c in lv)))
        place = to_clock(system, lv.lam) if to_clock else torch.arange(len(lv.lam), dtype=torch.float64)
        exact = g._replace(at=to_clock(system, g.at)) if to_clock else g
        ahead = frozen(g, place) if freeze else exact
        return tabulate(lv, kind, exact, ahead, place, order, corrector, reached > 2, numbers)

    def begin(system: Any, times: list[float]) -> State:
        return State(rows(system, system.levels(torch.tensor(times, dtype=torch.float64))), 0, ())

    return StepRule(
        step,
        order=reached,
        begin=begin,
        weak_order=min(order, 2),
        finish=finish,
        correction=correction if corrector else None,
        table=None if clock == "t" else Table(kind, rows),  # the inverse of t's clock carries no gradient
    )


def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: State) -> tuple[Tensor, State]:
    """One row."""
    rows, i, history = state
    time, scale, mix, linear, std, weights, _ = rows[i]
    history = (predict(x, system.score(x, time), scale, mix), *history)[: len(weights)]
    x_s = x * linear
    for p, weight in zip(history, weights, strict=True):
        x_s.add_(p, alpha=weight)
    if std:
        x_s.add_(noise.normal(), alpha=std)
    return x_s, State(rows, i + 1, history)


def finish(system: Any, x: Tensor, t: float, state: State) -> Tensor:
    """E[x_0|x] = (x + sigma^2 score)/alpha with the corrected x, which the same evaluation gives."""
    rows, i, history = state
    n, row = system.at(t, x), rows[i]
    score = system.score(x, row.time)
    if row.correction:
        x = weighted(x, 1.0, (predict(x, score, row.scale, row.mix), *history), row.correction)
    return combine(1 / n.alpha, x, n.sigma**2 / n.alpha, score)


def correction(state: State) -> Tensor | None:
    """Corrected minus predicted x where the last evaluation was made."""
    rows, i, history = state
    weights = rows[i - 1].correction
    return weighted(history[0], weights[0], history[1:], weights[1:]) if weights else None


def tabulate(
    lv: Levels, kind: Prediction, g: Integrand, p: Integrand, place: Tensor, order: int, corrector: bool,
    collocate: bool, numbers: Numbers,
) -> list[Row]:  # fmt: skip
    """A row per node: the first by :func:`_start`, then all alike. The last only corrects. ``p``: the predictor's."""
    n, width = len(g.linear), order + corrector
    first = width + int(collocate and width == _MOST)
    one = torch.ones(1, dtype=torch.float64)
    columns = (kind.scale(lv.alpha, lv.sigma), kind.mix(lv.alpha, lv.sigma), torch.cat([g.linear, one]))
    scale, mix, linear, std = map(numbers, (*columns, torch.cat([g.std, 0 * one])))
    far = (lv.lam - lv.lam[0]).abs().tolist()
    short = [collocate and 0 < span <= _SPAN for span in far[: min(first, n + 1)]]
    ahead, changes = [], []
    for weights, change in _start(g, p, place, order, corrector, short):
        ahead.append(numbers(weights))
        changes.append(numbers(change))
    if n >= first:
        node = torch.arange(first, n + 1)
        seen = node[:, None] - torch.arange(width)
        predictor = _weights(p, node - 1, place[seen[:, :order] - 1])  # of the step that leads to the node
        weights = torch.zeros(len(node), width, dtype=torch.float64)
        weights[:-1, :order] = predictor[1:]
        if corrector:
            change = _weights(g, node - 1, place[seen])
            change[:, 1:] -= predictor
            weights[:-1] += g.linear[node[:-1], None] * change[:-1]
        ahead += [*numbers(weights[:-1]), []]
        changes += numbers(change) if corrector else [[]] * len(node)
    return list(map(Row, lv.time.unbind(), scale, mix, linear, std, ahead, changes))


def _weights(g: Integrand, steps: Any, nodes: Tensor) -> Tensor:
    return interpolate(g.kernel[steps], g.at[steps], nodes)


def _start(
    g: Integrand, p: Integrand, place: Tensor, order: int, corrector: bool, collocate: list[bool]
) -> Iterator[tuple[Tensor, Tensor]]:
    """For nodes 0, 1, ...: the weights of the next step and of the correction, of predictions at i, i - 1, ..., 0.

    The first steps have too few predictions behind them for their order. But when there are enough, x_i can be made
    again from x_T, through the polynomial of all predictions at nodes 0 ... i, whose own errors come in times a
    step. The one at node 1 was made after a step of order one: too large an error for order 4, which leaves it out.
    """
    none = torch.zeros(0, dtype=torch.float64)
    made, step = none, none  # what x_i, and the step that led to it, are made of, besides x_T
    for i, again in enumerate(collocate):
        made, step = (torch.cat([torch.zeros(1, dtype=torch.float64), w]) for w in (made, step))
        change = weights = none
        if again:
            use = [j for j in range(i, -1, -1) if not (i > 2 and j == 1)]
            parts = _weights(g, slice(0, i), place[use].expand(i, -1))
            carried = torch.stack([g.linear[m + 1 : i].prod() for m in range(i)]) @ parts
            change = torch.zeros_like(made).index_add(0, torch.tensor([i - j for j in use]), carried) - made
        elif corrector and i:
            back = place[max(0, i - order) : i + 1].flip(0)
            change = torch.cat([_weights(g, slice(i - 1, i), back[None])[0], torch.zeros(i + 1 - len(back))]) - step
        if len(change):
            made = made + change
        if i < len(g.linear):
            use = [0 if i > 3 and j == 1 else j for j in range(i, max(-1, i - order), -1)]
            step = torch.zeros_like(made).index_add(
                0, torch.tensor([i - j for j in use]), _weights(p, slice(i, i + 1), place[use][None])[0]
            )
            made = g.linear[i] * made + step
            weights = step + g.linear[i] * change if len(change) else step
        yield weights, change
