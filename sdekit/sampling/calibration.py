"""What :func:`sdekit.sampling.calibrate` returns: a sampler fitted to one model, as a table of times and weights."""

import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sdekit.processes.sde import SDE
from sdekit.solvers.steppers import StepRule
from sdekit.solvers.steppers.exponential import Stored
from sdekit.solvers.steppers.table import Rows, Table, finish, step

_FORMATS = (1, 2)  # the first had no start: draws were scaled to the first time


@dataclass(frozen=True)
class Calibration:
    """A fitted sampler: goes wherever a sampler's name goes, for the process and model that it was fitted to.

    Evaluation i is made at ``times[i]``, of  p_i = scale[i] score + mix[i] x_i,  and leads to
    x_(i+1) = linear[i] x_i + sum of weights[i][j] p_(i-j);  the last one to x_0. The first x is a draw of the prior at
    T, times ``start``; times[0] may be far below T, and the first row leads there too.

    ``nfe``: its evaluations. ``sampler``, ``grid``: the names that it was fitted from. ``error``, ``start_error``:
    of the fit and of what it was fitted from, the mean over held-out noises of the RMS distance to the exact flow.
    ``alpha``, ``sigma`` at those times, ``T`` and ``prior_std`` = sigma(T): the process, which :meth:`check` compares.
    """

    sampler: str
    grid: str
    times: list[float]
    scale: list[float]
    mix: list[float]
    linear: list[float]
    weights: list[list[float]]
    error: float
    start_error: float
    T: float
    prior_std: float
    alpha: list[float]
    sigma: list[float]
    start: float

    @property
    def nfe(self) -> int:
        """Network evaluations, the last one included that gives x_0."""
        return len(self.times)

    @cached_property
    def rule(self) -> StepRule:
        """The step rule, on the grid ``times``."""
        columns = (self.times, self.scale, self.mix, self.linear, [0.0] * self.nfe)
        time, scale, mix, linear, std = torch.tensor(columns, dtype=torch.float64)
        weights = pad_sequence([torch.tensor(row, dtype=torch.float64) for row in self.weights], batch_first=True)
        token = object()

        def begin(system: Any, times: list[float], x: Tensor) -> Any:
            def make() -> Rows:
                lv = system.levels(time)
                a, b = system.score_of(lv)  # the file's scale and mix are of a score, whatever the model predicts
                table = Table(time, scale * a, scale * b + mix, linear, std, weights, None)
                return table.rows(Stored.of(table.scale, table.mix, system.said(lv), lv), x.dtype)

            return system.keep((token, x.dtype), make).start(system.moments(self.times, x))

        return StepRule(step, begin=begin, finish=finish)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: without the rule, which is made of the rest."""
        return {name: value for name, value in self.__dict__.items() if name != "rule"}

    def check(self, sde: SDE) -> None:
        """Raise ValueError unless ``sde`` is the process that this was fitted to."""
        times = torch.tensor(self.times, dtype=torch.float64)
        same = abs(sde.T - self.T) <= 1e-6 * self.T
        if same:
            end = torch.tensor([float(sde.sigma(sde.T))], dtype=torch.float64)
            now = torch.cat([sde.alpha(times), sde.sigma(times), end])
            then = torch.tensor([*self.alpha, *self.sigma, self.prior_std], dtype=torch.float64)
            same = torch.allclose(now, then, rtol=1e-5, atol=1e-9)
            if same and sde.t_min > self.times[-1] * (1 + 1e-6):
                raise ValueError(f"this calibration ends at t = {self.times[-1]:g}, below t_min = {sde.t_min:g}")
        if not same:
            raise ValueError(
                f"this calibration was made for another process (T = {self.T:g}, sigma = {self.sigma[0]:.4g} at "
                f"t = {self.times[0]:.4g}) than {type(sde).__name__}; calibrate anew for this one"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a small JSON file."""
        Path(path).write_text(
            json.dumps({"sdekit_calibration": _FORMATS[-1], **asdict(self)}, indent=1), encoding="utf-8"
        )


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """The calibration that :meth:`Calibration.save` wrote. Raises ValueError for a file that is none."""
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        version = content.pop("sdekit_calibration")
        if version not in _FORMATS:
            raise ValueError("of another format")
        if version == 1:
            content["start"] = content["sigma"][0] / content["prior_std"]
        calibration = Calibration(**content)
        c, n = calibration, len(calibration.times)
        columns = (c.scale, c.mix, c.linear, c.weights, c.alpha, c.sigma)
        numbers = [
            c.T,
            c.prior_std,
            c.start,
            *c.times,
            *c.scale,
            *c.mix,
            *c.linear,
            *c.alpha,
            *c.sigma,
            *chain(*c.weights),
        ]
        wrong = {len(column) for column in columns} != {n} or any(len(w) > i + 1 for i, w in enumerate(c.weights))
        if wrong or n == 0 or not torch.isfinite(torch.tensor(numbers, dtype=torch.float64)).all():
            raise ValueError("incomplete")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not a calibration of sdekit: {error}") from None
    return calibration
