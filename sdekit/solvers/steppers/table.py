"""A multistep method as a table, one row of numbers per evaluation, and the loop over its rows:

    x_s = linear x + sum of weights[j] p_j + std z,    p_j = scale_j output_j + mix_j x_j,  newest first.

The output is what the model says, whatever it predicts: scale and mix make of it what the rule interpolates.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdekit.solvers.steppers.exponential import Stored, add_weighted, scalars, stored


class Table(NamedTuple):
    """What the evaluations do, one entry or row each: to the next x, the last of them to x_0; float64."""

    time: Tensor  # (n,)
    scale: Tensor  # (n,)
    mix: Tensor  # (n,)
    linear: Tensor  # (n,)
    std: Tensor  # (n,)
    weights: Tensor  # (n, m), newest first
    correction: Tensor | None  # (n, m): of x where the evaluation was made; the weights have it already

    def rows(self, stored: Stored, dtype: torch.dtype) -> "Rows":
        """The rows as numbers, for states of that dtype and predictions stored without their unit."""
        n, m = self.weights.shape
        node = torch.arange(n)
        counts = _used(self.weights)
        corrected = torch.zeros_like(counts) if self.correction is None else _used(self.correction)
        needed = torch.maximum(counts, corrected).clamp_min(1)
        past = (needed - node).flip(0).cummax(0).values.flip(0) + node - 1  # by this row or a later one
        # The last in the history is used, by the next x alone. (A correction that reaches as far may, being asked for.)
        spent = counts > torch.maximum(corrected - 1, pad(past[1:], (0, 1)))
        last = (counts - 1).clamp_min(0)
        whole, ready = self._units(stored, spent, node, last)
        units = whole[(node[:, None] - torch.arange(m)).clamp_min(0)]
        weights = self.weights * units
        factor = scalars(torch.where(spent, weights[node, last], self.linear), dtype)
        numbers = zip(self.linear.tolist(), weights.tolist(), counts.tolist(), spent.tolist(), strict=True)
        columns = (
            stored.reach.tolist() if self._with_x() else scalars(self.scale / whole, dtype),
            stored.x_first.tolist(),
            spent.tolist(),
            [None if done else number for done, number in zip(ready.tolist(), factor, strict=True)],
            [[linear, *row[: used - 1]] if over else row[:used] for linear, row, used, over in numbers],
            self.std.tolist(),
            past.tolist(),
        )
        corrections = [] if self.correction is None else (self.correction * units).tolist()
        return Rows(
            [Row(*row) for row in zip(*columns, strict=True)],
            [row[:used] for row, used in zip(corrections, corrected.tolist(), strict=False)],
        )

    def _with_x(self) -> bool:
        return bool((self.mix != 0).any())

    def _units(self, stored: Stored, spent: Tensor, node: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """What is left out of each prediction where it is stored, and the rows that need no factor for it.

        One without x is stored as what it is added as when it is spent, which saves a pass over it; but not where that
        is so much less than what it is added as before that half precision would lose it.
        """
        if self._with_x():
            return stored.whole, torch.zeros_like(spent)
        weight, most = self.weights.abs(), torch.zeros(len(spent), dtype=torch.float64)
        of = (node[:, None] - torch.arange(weight.shape[1])).clamp_min(0)
        most = most.scatter_reduce(0, of.flatten(), weight.flatten(), "amax")
        ready = spent & (weight[node, last] > 1e-3 * most[node - last])
        whole = self.scale.clone()
        whole[(node - last)[ready]] = 1 / self.weights[node, last][ready]
        return whole, ready


class Row(NamedTuple):
    """One evaluation and the x that follows, as numbers."""

    reach: Any  # a float of ``stored``, or a 0-d tensor: then reach output is stored
    x_first: bool
    spent: bool  # whether x_s is made in the memory of the last prediction in the history, which has no further use
    factor: Any  # of that prediction, or of x: a 0-d tensor; None is 1
    added: list[float]  # the weights of x, where it is not first, and of the predictions, newest first
    std: float
    past: int  # how many predictions before its own this row or a later one needs


class Rows(NamedTuple):
    """All rows, and what each evaluation corrects x by where it was made. The same for every run on a grid."""

    rows: list[Row]
    corrections: list[list[float]]

    def start(self, moments: list[Any]) -> "State":
        """The state before the first step."""
        return State(list(zip(self.rows, moments, strict=True)), deque(), iter(self.corrections))


@dataclass
class State:
    """What is to come and what is past. It changes as the run goes on."""

    rows: Sequence[tuple[Row, Any]]  # and the moment of each
    history: deque[Tensor]  # predictions, newest first
    corrections: Iterator[list[float]]  # of x where each evaluation was made
    made: int = 0  # how many of the rows
    asked: bool = False  # for corrections: then a copy of the spent prediction is used up, for they need it too

    def __copy__(self) -> "State":
        """One that can go on by itself."""
        return replace(self, history=self.history.copy())


def _used(rows: Tensor) -> Tensor:
    """How many entries of each row there are up to the last that is not 0; each would cost a pass over the state."""
    return ((rows != 0) * torch.arange(1, rows.shape[1] + 1)).amax(1)


def step(system: Any, x: Tensor, t: float, s: float, noise: Any, state: State) -> tuple[Tensor, State]:
    """One row."""
    if state.made == len(state.rows):
        raise ValueError("a multistep rule takes each step of its grid once; it cannot be repeated on an interval")
    (reach, x_first, spent, factor, added, std, past), moment = state.rows[state.made]
    state.made += 1
    history = state.history
    while len(history) > past:
        history.pop()
    output = system.model(x, moment)
    # in memory of its own: a network may write its next result over this one
    history.appendleft(output * reach if isinstance(reach, Tensor) else stored(x, output, reach, x_first))
    if spent:
        x_s = history[-1].clone() if state.asked or system.replayed else history.pop()
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
