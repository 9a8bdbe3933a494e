"""Exponential multistep methods: one generator, prediction x clock x order x corrector, at every noise level.

Every method is a table, one row of numbers per evaluation, computed from the whole grid before the loop:
    x_s = linear x + sum of weights[j] p_j + std z,    p_j = scale_j score_j + mix_j x_j,  newest first.
A corrector is in it too: the prediction at t, which the step needs anyway, improves the x_t that it was made at
(Zhao et al. 2023, UniC), and the improvement is another sum over the same predictions. So is the start.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdekit import _checks
from sdekit.solvers.steppers.base import StepRule
from sdekit.solvers.steppers.exponential import (
    CLOCKS,
    FAR,
    PREDICTIONS,
    Integrand,
    Prediction,
    add_weighted,
    frozen,
    grid_levels,
    integrand,
    interpolate,
    scalars,
    unit,
)
from sdekit.system import Levels

# Over more of half log-SNR the polynomial of collocation errs by more than it mends; no limit to the order.
_SPAN = 3.0
_MOST = 4  # the start of a higher order would cost evaluations


class Table(NamedTuple):
    """What the evaluations do, one entry or row each: to the next x, the last of them to x_0; float64."""

    time: Tensor  # (n,)
    scale: Tensor  # (n,)
    mix: Tensor  # (n,)
    linear: Tensor  # (n,)
    std: Tensor  # (n,)
    weights: Tensor  # (n, m), newest first
    correction: Tensor | None  # (n, m): of x where the evaluation was made; the weights have it already

    def start(self, x: Tensor) -> "State":
        """The state before the first step from x: the rows as numbers, for predictions stored without their unit."""
        n, m = self.weights.shape
        node = torch.arange(n)
        counts = _used(self.weights)
        corrected = torch.zeros_like(counts) if self.correction is None else _used(self.correction)
        needed = torch.maximum(counts, corrected).clamp_min(1)
        past = (needed - node).flip(0).cummax(0).values.flip(0) + node - 1  # by this row or a later one
        # The last in the history is used, by the next x alone. (A correction that reaches as far may, being asked for.)
        spent = counts > torch.maximum(corrected - 1, pad(past[1:], (0, 1)))
        last = (counts - 1).clamp_min(0)
        whole, ready = self._units(spent, node, last)
        units = whole[(node[:, None] - torch.arange(m)).clamp_min(0)]
        weights, reach = self.weights * units, self.scale / whole
        factor = scalars(torch.where(spent, weights[node, last], self.linear), x)
        numbers = zip(self.linear.tolist(), weights.tolist(), counts.tolist(), spent.tolist(), strict=True)
        columns = (
            self.time.unbind(),
            reach.tolist() if self._with_x() else scalars(reach, x),
            spent.tolist(),
            [None if done else number for done, number in zip(ready.tolist(), factor, strict=True)],
            [[linear, *row[: used - 1]] if over else row[:used] for linear, row, used, over in numbers],
            self.std.tolist(),
            past.tolist(),
        )

        def corrections() -> Iterator[list[float]]:  # only where somebody asks
            if self.correction is not None:
                rows = (self.correction * units).tolist()
                yield from (row[:used] for row, used in zip(rows, corrected.tolist(), strict=True))

        return State(map(Row._make, zip(*columns, strict=True)), deque(), corrections())

    def _with_x(self) -> bool:
        return bool(self.mix[0] != 0)

    def _units(self, spent: Tensor, node: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """What is left out of each prediction where it is stored, and the rows that need no factor for it.

        One without x is stored as what it is added as when it is spent, which saves a pass over it; but not where that
        is so much less than what it is added as before that half precision would lose it.
        """
        if self._with_x():
            return unit(self.scale, self.mix), torch.zeros_like(spent)
        weight, most = self.weights.abs(), torch.zeros(len(spent), dtype=torch.float64)
        of = (node[:, None] - torch.arange(weight.shape[1])).clamp_min(0)
        most = most.scatter_reduce(0, of.flatten(), weight.flatten(), "amax")
        ready = spent & (weight[node, last] > 1e-3 * most[node - last])
        whole = self.scale.clone()
        whole[(node - last)[ready]] = 1 / self.weights[node, last][ready]
        return whole, ready


class Row(NamedTuple):
    """One evaluation and the x that follows, as numbers."""

    time: Tensor
    reach: Any  # the prediction is x + reach score for a float, reach score for a 0-d tensor
    spent: bool  # whether x_s is made in the memory of the last prediction in the history, which has no further use
    factor: Any  # of that prediction, or of x: a 0-d tensor; None is 1
    added: list[float]  # the weights of x, where it is not first, and of the predictions, newest first
    std: float
    past: int  # how many predictions before its own this row or a later one needs


@dataclass
class State:
    """What is to come and what is past. It changes as the run goes on."""

    rows: Iterator[Row]
    history: deque[Tensor]  # predictions, newest first
    corrections: Iterator[list[float]]  # of x where each evaluation was made
    asked: bool = False  # for corrections: then a copy of the spent prediction is used up, for they need it too


def _used(rows: Tensor) -> Tensor:
    """How many entries of each row there are up to the last that is not 0; each would cost a pass over the state."""
    return ((rows != 0) * torch.arange(1, rows.shape[1] + 1)).amax(1)


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

    def table(system: Any, lv: Levels) -> Table:
        g = integrand(kind, system.churn, Levels(*(c[:-1] for c in lv)), Levels(*(c[1:] for c in lv)))
        place = to_clock(system, lv.lam) if to_clock else torch.arange(len(lv.lam), dtype=torch.float64)
        exact = g._replace(at=to_clock(system, g.at)) if to_clock else g
        ahead = frozen(g, place) if freeze else exact
        return tabulate(lv, kind, exact, ahead, place, order, corrector, reached > 2)

    def begin(system: Any, times: list[float], x: Tensor) -> State:
        return table(system, grid_levels(system, times)).start(x)

    return StepRule(
        step,
        order=reached,
        begin=begin,
        weak_order=min(order, 2),
        finish=finish,
        correction=correction if corrector else None,
        table=None if clock == "t" else table,  # the inverse of t's clock carries no gradient
    )


def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: State) -> tuple[Tensor, State]:
    """One row."""
    row = next(state.rows, None)
    if row is None:
        raise ValueError("a multistep rule takes each step of its grid once; it cannot be repeated on an interval")
    time, reach, spent, factor, added, std, past = row
    history = state.history
    while len(history) > past:
        history.pop()
    score = system.score(x, time)
    # in memory of its own: a network may write its next result over this one
    history.appendleft(score * reach if isinstance(reach, Tensor) else torch.add(x, score, alpha=reach))
    if spent:
        x_s = history[-1].clone() if state.asked else history.pop()
        x_s = add_weighted(x_s if factor is None else x_s.mul_(factor), (x, *history), added)
    else:
        x_s = add_weighted(x * factor, history, added)
    if std:
        x_s.add_(noise.normal(), alpha=std)
    return x_s, state


def finish(system: Any, x: Tensor, t: float, state: State) -> Tensor:
    """E[x_0|x] of the corrected x, which the same evaluation gives: the last row."""
    return step(system, x, t, 0.0, None, state)[0]


def correction(state: State) -> Tensor | None:
    """Corrected minus predicted x where the last evaluation was made; to be asked before the first step, when it is
    None, and after every one.
    """
    if not state.history:
        state.asked = True
        return None
    if not state.asked:
        raise ValueError("a multistep rule must be asked for its correction before the first step too")
    weights = next(state.corrections)
    if not weights:
        return None
    newest, *older = state.history
    return add_weighted(newest * weights[0], older, weights[1:])


def tabulate(
    lv: Levels, kind: Prediction, g: Integrand, p: Integrand, place: Tensor, order: int, corrector: bool,
    collocate: bool,
) -> Table:  # fmt: skip
    """A row per node. ``g``, ``p``: the corrector's and the predictor's integrand.

    The last leads to x_0 = x/alpha + end (p - mix x), Tweedie's formula for the corrected x.
    """
    n, width = len(g.linear), order + corrector
    m = min(width + int(collocate and width == _MOST), n + 1)  # predictions that a row may use; also nodes of the start
    again = int(((lv.lam[1:m] - lv.lam[0]).abs() <= _SPAN).sum()) if collocate else 0
    node, lag = torch.arange(n + 1)[:, None], torch.arange(m)
    # Wanted are integrals over a step, of polynomials through the predictions at a node and before it, where ``use``.
    use = (lag < order) & (lag <= node[:-1])
    if collocate and order == _MOST:
        use[_MOST : _MOST + 1, -2:] = torch.tensor([False, True])  # node 0 for node 1, as in the start
    wanted = [(node[:-1], node[:-1], use)]
    if corrector:
        wanted.append((n + node[:-1], node[1:], (lag < width) & (lag <= node[1:])))
    if again:
        wanted.append(_start(n, again, lag))
    step, newest, use = map(torch.cat, zip(*wanted, strict=True))
    kernel, at = (torch.cat(both).index_select(0, step[:, 0]) for both in ((p.kernel, g.kernel), (p.at, g.at)))
    # A node that is not used is put at infinity, where it leaves the polynomial alone.
    nodes = torch.where(use, place[(newest - lag).clamp_min(0)], FAR * (1 + lag))
    ahead, *more = (use * interpolate(kernel, at, nodes)).split([len(rows) for rows, _, _ in wanted])

    change = torch.zeros(n + 1, m, dtype=torch.float64)
    if corrector:
        change = torch.cat([change[:1], more[0] - _later(ahead)])
    if again:
        since, past = newest[-len(more[-1]) :], step[-len(more[-1]) :] - n
        carry = g.linear[:again].cumprod(0)
        carried = carry[since - 1] / carry[past] * more[-1]  # by the linear parts of the steps between
        made = torch.zeros(again + 1, m, dtype=torch.float64).index_add(0, since[:, 0], carried)
        replaced = _later(g.linear[:again, None] * made[:-1] + ahead[:again])
        change = torch.cat([change[:1], made[1:] - replaced, change[again + 1 :]])

    scale, mix = kind.scale(lv.alpha, lv.sigma), kind.mix(lv.alpha, lv.sigma)
    end = lv.sigma[-1:] ** 2 / scale[-1:] / lv.alpha[-1:]
    linear = torch.cat([g.linear, 1 / lv.alpha[-1:]])
    weights = torch.cat([ahead, pad(end[None], (0, m - 1))]) + linear[:, None] * change
    linear = torch.cat([g.linear, 1 / lv.alpha[-1:] - end * mix[-1:]])
    return Table(lv.time, scale, mix, linear, pad(g.std, (0, 1)), weights, change if corrector else None)


def _later(weights: Tensor) -> Tensor:
    """The same weights as the next node counts them, from its own prediction on."""
    return pad(weights, (1, -1))


def _start(n: int, nodes: int, lag: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What makes x at node 1, ..., ``nodes`` again from x_T: each of the (corrector's) steps before, the node, its use.

    The first steps have too few predictions behind them for their order. But when there are enough, x_i can be made
    again from x_T, through the polynomial of all predictions at nodes 0 ... i, whose own errors come in times a
    step. The one at node 1 was made after a step of order one: too large an error for order 4, which leaves it out.
    """
    step, node = torch.tensor([(n + step, i) for i in range(1, nodes + 1) for step in range(i)]).T[..., None]
    return step, node, (lag <= node) & ~((node > 2) & (node - lag == 1))
