"""What calibration fits: a multistep rule's table as a differentiable function, and the noises that it is judged on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sdekit.batch import samples
from sdekit.processes.counted import remade
from sdekit.processes.kinds import Kind
from sdekit.processes.reverse import Reverse
from sdekit.processes.sde import SDE
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.grids import INNER, first_level
from sdekit.sampling.samplers import SAMPLERS
from sdekit.solvers.solution import rms
from sdekit.solvers.steppers.table import Table
from sdekit.system import Levels, Score

# Fitted are multiples of the newest prediction and of its first and second differences: predictions that follow one
# another are much the same, so that their own weights would all but cancel.
_DIFFERENCES = torch.tensor([[1.0, 0.0, 0.0], [1.0, -1.0, 0.0], [1.0, -2.0, 1.0]], dtype=torch.float64)
_BACK = len(_DIFFERENCES)


class Noises:
    """Draws of the prior, where the flow takes them, and which sample's conditions each of them has."""

    def __init__(self, x_T: Tensor, rows: Tensor, total: int) -> None:
        self.x_T, self.rows, self.total = x_T, rows, total
        self.flow = x_T  # until it is known

    def __getitem__(self, which: Any) -> "Noises":
        part = Noises(self.x_T[which], self.rows[which], self.total)
        part.flow = self.flow[which]
        return part

    def map(self, f: Callable[[Tensor], Tensor], batch: int) -> Tensor:
        """f of all, so many at a time."""
        done = []
        for x, rows in zip(self.x_T.split(batch), self.rows.split(batch), strict=True):
            with samples(rows, self.total):
                done.append(f(x))
        return torch.cat(done)


class FittedTable:
    """A multistep rule's table as a differentiable function: gaps between the levels, and additions to the weights.

    The additions are in units of the step, the sum of its weights (what corrects an earlier step adds up to about 0):
    so one rate serves all steps, many or few.
    """

    def __init__(
        self, sde: SDE, score: Score, sampler: str, grid: str, times: Tensor, slack: float, remake: bool = False
    ) -> None:
        self.sde, self.sampler, self.grid, self.remake = sde, sampler, grid, remake
        self.base, self.system = SAMPLERS[sampler].rule.table, Reverse(sde, score, 0.0)
        first, last = float(first_level(sde)), float(sde.half_log_snr(sde.t_min))
        self.first, self.range, n = first, last - first, len(times)
        lam = sde.half_log_snr(times).clamp_min(first)
        gaps = (torch.cat([lam.new_tensor([first]), lam, lam.new_tensor([last])]).diff() / self.range).clamp_min(0)
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

    def table(self, system: Reverse) -> tuple[Levels, Table]:
        """Levels, and the rule's table with the additions, for what the system's model says."""
        lv = self.levels()
        table = self.base(system, lv)
        table = self.from_T(system, lv, table)
        size = torch.hypot(lv.alpha, lv.sigma)  # of x at each level
        step = table.weights.sum(1).abs()
        width = max(_BACK, table.weights.shape[1])
        weights = pad(table.weights, (0, width - table.weights.shape[1]))
        more = self.weights.tril() @ _DIFFERENCES
        weights = weights + pad(step[:, None] * more, (0, width - _BACK))
        return lv, table._replace(linear=table.linear + step / size * self.linear, weights=weights)

    def from_T(self, system: Reverse, lv: Levels, table: Table) -> Table:
        """The table of a grid that begins below T, with the way from there in its first row.

        For the grids that begin far below it is the analytic first step (``bridge``): with g = start x_T, where
        E[x_0|g] = a o + b g is evaluated, it makes x = A g + B o, and says x_0 again of that: o' = o + b/a (g - x). So
        p = scale o' + mix x is a sum of o and g; and what follows, linear x + w p, one of g and p. For others, k = 0,
        it is the change of the noise alone.
        """
        a, b = (y[0] for y in system.express(Kind(torch.ones_like(lv.alpha), torch.zeros_like(lv.alpha)), lv))
        above = [float(f(self.sde.T)) for f in (self.sde.alpha, self.sde.sigma)]
        shrunk = lv.sigma[0] / above[1]
        k = lv.alpha[0] - above[0] * shrunk if self.grid in INNER else torch.zeros_like(shrunk)
        A, B = shrunk / self.start(lv) + k * b, k * a
        old, own, linear = table.scale[0], table.mix[0], table.linear[0]
        scale, mix = old * (1 - k * b) + own * B, own * A + old * b / a * (1 - A)
        carry = linear * B / scale
        corner = torch.zeros_like(table.weights)
        corner[0, 0] = 1
        return table._replace(
            scale=torch.cat([scale[None], table.scale[1:]]),
            mix=torch.cat([mix[None], table.mix[1:]]),
            linear=torch.cat([(linear * A - carry * mix)[None], table.linear[1:]]),
            weights=table.weights + carry * corner,
        )

    def start(self, lv: Levels) -> Tensor:
        """What a draw of the prior is multiplied by, to be evaluated: 1, or a growing process's change of size."""
        size = torch.hypot(lv.alpha[0], lv.sigma[0])
        ends = torch.tensor([self.sde.T, self.sde.t_min], dtype=torch.float64)
        prior, data = torch.hypot(self.sde.alpha(ends), self.sde.sigma(ends))
        return torch.ones_like(size) if prior < 2 * data else size / prior

    def __call__(self, x_T: Tensor) -> Tensor:
        """x_0 of draws of the prior."""
        lv, table = self.table(self.system)
        model = self.system.model.model
        output = remade(model) if self.remake and torch.is_grad_enabled() else model.output
        x = x_T * self.start(lv)
        history: list[Tensor] = []
        columns = (table.time, table.scale, table.mix, table.linear, table.weights)
        for time, scale, mix, linear, weights in zip(*columns, strict=True):
            history.insert(0, scale * output(x, time, None).to(x.dtype) + mix * x)
            x = linear * x
            for w, p in zip(weights, history, strict=False):
                x = x + w * p
        return x

    def loss(self, noise: Noises) -> Tensor:
        """Mean over samples of the RMS over the event."""
        return rms(noise.map(self, len(noise.x_T)) - noise.flow).mean()

    @torch.no_grad()
    def error(self, noise: Noises, batch: int) -> float:
        """The loss as a number."""
        return float(rms(noise.map(self, 4 * batch) - noise.flow).mean())

    @torch.no_grad()
    def calibration(self, error: float, start_error: float) -> Calibration:
        """The table as it stands, for a score: what a model predicts is no matter of the file."""
        lv, table = self.table(Reverse(self.sde, lambda x, t: x, 0.0))
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
            start=float(self.start(lv)),
        )
