"""Exponential multistep methods: one generator, prediction x clock x order x corrector, at every noise level.

Every method is a table (:mod:`sdekit.solvers.steppers.table`), computed from the whole grid before the loop. A
corrector is in it too: the prediction at t, which the step needs anyway, improves the x_t that it was made at
(Zhao et al. 2023, UniC), and the improvement is another sum over the same predictions. So is the start.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdekit import _checks
from sdekit.processes.kinds import Kind, express
from sdekit.solvers.steppers.base import StepRule
from sdekit.solvers.steppers.exponential import (
    CLOCKS,
    FAR,
    PREDICTIONS,
    Integrand,
    Prediction,
    Stored,
    bounded,
    fitting,
    frozen,
    grid_levels,
    integrand,
    interpolate,
)
from sdekit.solvers.steppers.table import Rows, State, Table, correction, finish, step
from sdekit.system import Levels

# Over more of half log-SNR the polynomial of collocation errs by more than it mends; no limit to the order.
_SPAN = 3.0
_MOST = 4  # the start of a higher order would cost evaluations


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
    from x_T by collocation (where the steps are not so large that this does harm). Where alpha(T) = 0 the bounded
    forms of prediction and clock stand for those that are not (``exponential``), and the order is kept from T on.
    Needs a reverse system. Raises ValueError or TypeError for an order that is no whole number in 1 ... 4 (3 with
    corrector), an unknown prediction or clock, and what ``freeze`` excludes.
    """
    order = _checks.count(order, "order")
    if order + corrector > _MOST:
        raise ValueError(f"order must be at most {_MOST - corrector}{' with a corrector' * corrector}, got {order}")
    _checks.lookup(PREDICTIONS, prediction, "prediction")
    _checks.lookup({**CLOCKS, "step": None}, clock, "clock")
    if corrector and freeze and (order > 2 or clock == "step"):
        raise ValueError(
            "freeze=True has order 2 at most; a corrector needs order <= 2 then, and a clock of the process"
        )
    if clock == "step" and not freeze:
        raise ValueError("clock 'step' takes all steps for equal, which has order 2 at most; it needs freeze=True")
    reached = (min(order, 2) if freeze else order) + corrector

    def table(system: Any, lv: Levels) -> Table:
        kind, to_clock = fitting(prediction, "half_log_snr" if clock == "step" else clock, lv)
        g = integrand(kind, system.churn, Levels(*(c[:-1] for c in lv)), Levels(*(c[1:] for c in lv)))
        steps = torch.arange(len(lv.lam), dtype=torch.float64)
        place = steps if clock == "step" else to_clock(system, lv.lam)
        exact = g if clock == "step" else g._replace(at=to_clock(system, g.at))
        ahead = frozen(g, place) if freeze else exact
        return tabulate(system, lv, kind, exact, ahead, place, order, corrector, reached > 2)

    token = object()

    def begin(system: Any, times: list[float], x: Tensor) -> State:
        def make() -> Rows:
            lv = grid_levels(system, times)
            made = table(system, lv)
            return made.rows(Stored.of(made.scale, made.mix, system.said(lv), lv), x.dtype)

        return system.keep((token, tuple(times), x.dtype), make).start(system.moments(times, x))

    return StepRule(
        step,
        order=reached,
        begin=begin,
        weak_order=min(order, 2),
        finish=finish,
        correction=correction if corrector else None,
        table=None if clock == "t" else table,  # the inverse of t's clock carries no gradient
    )


def tabulate(
    system: Any, lv: Levels, kind: Prediction, g: Integrand, p: Integrand, place: Tensor, order: int, corrector: bool,
    collocate: bool,
) -> Table:  # fmt: skip
    """A row per node. ``g``, ``p``: the corrector's and the predictor's integrand.

    The last leads to x_0 = (x - sigma eps)/alpha, with the corrected x and the eps that was predicted.
    """
    n, width = len(g.linear), order + corrector
    m = min(width + int(collocate and width == _MOST), n + 1)  # predictions that a row may use; also nodes of the start
    span = bounded(lv.lam[:m]) if bool(torch.isinf(lv.lam[0])) else lv.lam[:m]
    again = int(((span[1:] - span[0]).abs() <= _SPAN).sum()) if collocate else 0
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
        carry = torch.where(g.linear[:again] == 0, 1.0, g.linear[:again]).cumprod(0)  # 0 from alpha = 0 on, and no more
        carried = carry[since - 1] / carry[past] * more[-1]  # by the linear parts of the steps between
        made = torch.zeros(again + 1, m, dtype=torch.float64).index_add(0, since[:, 0], carried)
        replaced = _later(g.linear[:again, None] * made[:-1] + ahead[:again])
        change = torch.cat([change[:1], made[1:] - replaced, change[again + 1 :]])

    own = kind.kind(lv.alpha, lv.sigma)
    scale, mix = system.express(own, lv)
    said = [y[-1:] for y in own]
    alpha, sigma = lv.alpha[-1:], lv.sigma[-1:]
    x_0 = express(Kind(torch.ones_like(alpha), torch.zeros_like(alpha)), Kind(*said), alpha, sigma)
    of_change = torch.where(alpha > 0, 1 / alpha, 0.0)  # where alpha = 0 nobody ends with a step to x_0
    linear = torch.cat([g.linear, of_change])
    weights = torch.cat([ahead, pad(x_0[0][None], (0, m - 1))]) + linear[:, None] * change
    linear = torch.cat([g.linear, x_0[1]])
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
