"""Which reading of a network fits the data.

A reading is right where the denoiser that it makes of the network errs least, level by level, over the same data and
the same noise. The difference between two readings is taken sample by sample, so that what all readings share (how
hard the sample is) drops out, and mistakes of a thousandth show.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit.evaluation.check.probe import LOWEST, Probe, chance, flat, own_clock
from sdekit.evaluation.check.readings import OWN, PROCESSES, Clock, Reading, Transform, clocks, shifts, transforms
from sdekit.processes.kinds import BLIND, KINDS, Kind, express, kind_of
from sdekit.processes.sde import SDE

_NUMBERS, _MOST = 2**16, 4096  # that it takes to tell clocks a step apart, and samples for it at most
_PLAIN = 8  # clocks: those that count t
_KEPT = 2**28  # numbers of what the network said, to be read in other ways


class Fit(NamedTuple):
    """A reading with its losses, (levels, data) in units of the trivial denoiser's; NaN at levels that it has not."""

    reading: Reading
    losses: Tensor

    @property
    def levels(self) -> int:
        """How many it has."""
        return int(self.losses.isfinite().all(1).sum())

    @property
    def loss(self) -> float:
        """The geometric mean over levels."""
        losses = self.losses.mean(1)
        return _mean(losses[losses.isfinite()]) if self.levels else math.inf

    def beside(self, own: "Fit") -> float:
        """The same over all levels; where it has none the loss of another, or the trivial: few may be the easy ones."""
        mine, theirs = self.losses.mean(1), own.losses.mean(1)
        return _mean(torch.where(mine.isfinite(), mine, theirs.nan_to_num(1.0)))

    def at(self, levels: Sequence[int]) -> "Fit":
        """Of these levels alone."""
        return self._replace(losses=self.losses[list(levels)])


def _mean(losses: Tensor) -> float:
    return float(losses.clamp_min(1e-12).log().mean().exp())


class Search:
    """Readings of a model, by loss over the first ``n`` samples at ``levels`` of the probe.

    What the network says is kept by what it is asked: many readings ask alike.
    """

    def __init__(self, probe: Probe) -> None:
        self.probe = probe
        self._said: dict[Any, Tensor | None] = {}
        self._kept = 0
        self._processes: dict[str | None, SDE] = {None: probe.sde}
        self._time, self._kind = cache(self._time_of), cache(self._kind_of)
        # A network that is told whole numbers may look them up in a table, and on a device to ask beyond its end is
        # the end of the process.
        ends = [own_clock(probe.model, torch.tensor(t, dtype=torch.float64)) for t in (probe.sde.t_min, probe.sde.T)]
        self.last = None if ends[0].is_floating_point() else max(int(end.max()) for end in ends)

    def process(self, name: str | None) -> SDE:
        """The process of that name, made once."""
        if name not in self._processes:
            self._processes[name] = PROCESSES[name]()  # type: ignore[index]
        return self._processes[name]

    def fits(self, readings: Iterable[Reading], levels: Sequence[int], n: int) -> list[Fit]:
        """Each reading's losses, with the factor that it has."""
        return [Fit(reading, self._losses(reading, self._asked(reading, levels, n), n)) for reading in readings]

    def free(self, like: Reading, levels: Sequence[int], n: int) -> list[Fit]:
        """All predictions of a reading's process, clock and data, each with the factor 1, -1 and the best one."""
        asked, found = self._asked(like, levels, n), []
        for predicts in KINDS if asked else ():
            best = self._factor(replace(like, predicts=predicts), asked)
            for factor in {1.0, -1.0, *best}:
                reading = replace(like, predicts=predicts, factor=factor)
                found.append(Fit(reading, self._losses(reading, asked, n)))
        return found

    def _asked(self, reading: Reading, levels: Sequence[int], n: int) -> "list[_Asked]":
        return [a for a in (self._ask(reading, k, n) for k in levels) if a is not None]

    def _losses(self, reading: Reading, asked: "list[_Asked]", n: int) -> Tensor:
        probe, losses = self.probe, torch.full((len(self.probe.eps), n), math.nan, dtype=torch.float64)
        sde, stretch = self.process(reading.process), self._stretch(reading.transform)
        for k, out, x, x0, t in asked:
            a, b = express(Kind(1.0, 0.0), self._kind(reading.predicts, reading.process, float(t)), *probe.at(t, sde))
            x_0 = a.to(x) * reading.factor * out + b.to(x) * probe.centre(x, t, sde)
            error = flat(x_0 - x0).square().mean(1) / (float(probe.trivial[k]) * stretch**2)
            losses[k] = error.nan_to_num(1e9, 1e9).clamp_max(1e9)
        return probe.fold(losses.mT).mT

    def _factor(self, reading: Reading, asked: "list[_Asked]") -> list[float]:
        """What the output is best multiplied by: of the regression of what it should be, all levels alike. None where
        that is near 1 or -1, and with it the round number that is near.
        """
        products = squares = 0.0
        for k, out, _, x0, t in asked:
            m, n = self._kind(reading.predicts, reading.process, float(t))
            target = (m.to(x0) * x0 + n.to(x0) * self.probe.eps[k][: len(x0)]).double()
            unit = float(target.square().mean())
            products += float((out * target).mean()) / unit
            squares += float(out.double().square().mean()) / unit
        best = products / squares if squares > 0 else 0.0
        if best == 0 or not math.isfinite(best) or abs(abs(best) - 1) < 0.1:
            return []
        return [
            float(f"{best:.3g}"),
            *(y for y in (float(f"{best:.0e}"), 1 / float(f"{1 / best:.0e}")) if abs(y / best - 1) < 0.1),
        ]

    def _kind_of(self, predicts: str, process: str | None, t: float) -> Kind:
        return kind_of(predicts, self.process(process), torch.tensor(t, dtype=torch.float64))

    def _time_of(self, process: str | None, k: int, stretch: float) -> Tensor:
        """Where that process has the probe's level, of data so much wider. ValueError where it has not."""
        return self.process(process).inverse_half_log_snr(-math.log(float(self.probe.r[k]) * stretch))

    def _stretch(self, transform: Transform | None) -> float:
        """How much wider the transformed data are: their levels are wider by as much, so that losses compare."""
        if transform is None:
            return 1.0
        x0, mean = self.probe.x0, self.probe.mean[None]
        wide = (transform.forward(x0) - transform.forward(mean)).square().mean()
        return float((wide / (x0 - mean).square().mean()).sqrt())

    def _ask(self, reading: Reading, k: int, n: int) -> "_Asked | None":
        """None where the reading's process has not got the level, or the network does not take the clock."""
        probe, sde = self.probe, self.process(reading.process)
        try:
            t = self._time(reading.process, k, self._stretch(reading.transform))
            clock = reading.clock.at(probe.model, sde, t)
        except ValueError:
            return None
        if self.last is not None:
            clock = clock.round().long().clamp(0, self.last)
        x0 = probe.x0[:n] if reading.transform is None else reading.transform.forward(probe.x0[:n])
        x = probe.state(k, sde, x0, float(t))
        told = tuple(round(float(c), 9) for c in clock.reshape(-1))
        name = None if reading.transform is None else reading.transform.name
        key = (n, k, told, name, round(float(sde.alpha(t)), 6))
        if key not in self._said:
            self._kept += x.numel()
            if self._kept > _KEPT:
                self._said.clear()
                self._kept = x.numel()
            try:
                self._said[key] = probe.ask(x, clock)
            except Exception:  # it takes no such clock, and who knows how it says so
                self._said[key] = None
        out = self._said[key]
        return None if out is None else _Asked(k, out, x, x0, t)


class _Asked(NamedTuple):
    level: int
    out: Tensor
    x: Tensor
    x0: Tensor
    t: Tensor


class Identified(NamedTuple):
    """The reading that fits best, those that the data cannot tell from it, and the model's own."""

    best: Fit
    others: list[Fit]
    own: Fit
    probe: Probe  # whose levels the losses are of

    @property
    def accused(self) -> bool:
        """Whether another reading than the model's own fits, beyond chance."""
        return better(self.best, self.own) if self.own.levels else self.fits(self.best)

    def fits(self, fit: Fit) -> bool:
        """Whether a reading is as it should be: at no level worse than the trivial denoiser."""
        return fits(fit, self.probe)


def identify(probe: Probe) -> Identified:
    """Which reading of the model fits: all on the data as they are, its own on other data; if none does, all on all."""
    search, own = Search(probe), Reading(probe.model.predicts)
    every, n = range(len(probe.eps)), len(probe.x0)
    near_by = shifts(probe.sde)
    ways: list[tuple[str | None, Clock]] = [(None, clock) for clock in (OWN, *near_by, *clocks(probe.sde))]
    if probe.sde.root is None and probe.sde.centred and probe.sde.diffuses:
        ways += [(name, clock) for name in PROCESSES for clock in clocks(search.process(name))]
    mine = search.fits([own], every, n)[0]
    sure = [mine, *search.fits([replace(own, clock=clock) for clock in near_by], every, n)]

    def look(changes: Sequence[Transform | None], ways: list[Any], levels: Sequence[int], few: int) -> None:
        here = search.fits([own], levels, min(n, few))[0].at(levels)
        found = []  # of each way to ask its best few, by loss: what else is made of the same answers costs nothing
        for transform in changes:
            for process, clock in ways:
                free = search.free(Reading(own.predicts, 1.0, clock, process, transform), levels, min(n, few))
                some = [(fit.at(levels).beside(here), fit.reading) for fit in free if fit.levels > 0.7 * len(levels)]
                found.append(sorted(some, key=lambda one: one[0])[:5])
        found = sorted(filter(None, found), key=lambda some: some[0][0])[:8]
        near = [reading for some in found for loss, reading in some if loss < 1.5 * found[0][0][0]]
        sure.extend(search.fits([reading for reading in near if reading != own], every, n))

    def judged() -> Identified:
        best = min(sure, key=lambda fit: fit.beside(mine))
        order = [OWN, *clocks(search.process(best.reading.process)), *near_by]
        if search.last is not None:  # of a table, which has no entry for 1000 t at T
            order.sort(key=lambda clock: not (clock is OWN or "index" in clock.name))
        # Where the data cannot tell, the plainest clock is said, which may not have been among the few looked at.
        plain = [replace(best.reading, clock=clock) for clock in order[best.reading.process is not None : _PLAIN]]
        known = [fit.reading for fit in sure]
        sure.extend(search.fits([reading for reading in plain if reading not in known], every, n))
        ties = [fit for fit in sure if fit.levels and not better(best, fit)] or [best]
        ties.sort(key=lambda fit: (
            fit.reading.changes(own.predicts),
            order.index(fit.reading.clock) if fit.reading.clock in order else len(order),
            fit.beside(mine),
        ))  # fmt: skip
        return Identified(ties[0], ties[1:], mine, probe)

    changes = transforms(probe.x0)
    look([None], ways, every[::3], 12)
    look(changes, ways[:1], every[::3], 12)
    if not fits(judged().best, probe):
        look(changes, ways, every[::4], 8)
    found = judged()
    near = _near(probe, mine) if found.best is mine else found
    return near if near.accused else found


def _near(probe: Probe, mine: Fit) -> Identified:
    """The own reading beside its clock off by one: that shows at the lowest levels alone, where a step is much of t.

    It takes some tens of thousands of numbers to show at all.
    """
    if float(probe.r[0]) > 2 * LOWEST * probe.spread:  # there are no such levels
        return Identified(mine, [], mine, probe)
    low = probe.below(4 * LOWEST, levels=4, least=min(_MOST, _NUMBERS // probe.x0[0].numel()))
    own, search, every = mine.reading, Search(low), range(len(low.eps))
    mine, *others = search.fits([own, *(replace(own, clock=clock) for clock in shifts(low.sde))], every, len(low.x0))
    best = min(others, key=lambda fit: fit.loss)
    return Identified(best, [], mine, low)


def allowed(predicts: str, probe: Probe) -> Tensor:
    """The losses, (levels,), up to which a model is no worse than the trivial denoiser.

    One that says eps is allowed an error of .1 in it, which is .1 sigma/alpha in x_0: it is no fault of a reading.
    """
    return 1.15 + (0.1 * probe.r) ** 2 / probe.trivial * (predicts in BLIND)


def fits(fit: Fit, probe: Probe) -> bool:
    """Whether a reading is as it should be: at no level worse than the trivial denoiser, beyond chance."""
    losses = torch.stack([level.mean() - chance(level, 4) for level in fit.losses])
    return fit.levels > 0.7 * len(losses) and bool(
        ((losses <= allowed(fit.reading.predicts, probe)) | losses.isnan()).all()
    )


def better(a: Fit, b: Fit, sigmas: float = 6.0, gain: float = 1e-3) -> bool:
    """Whether a errs less than b, at the levels of both: by ``sigmas`` standard errors of the mean over samples of
    the difference, relative to b's loss at each level, and by more than ``gain``.
    """
    off = ((b.losses - a.losses) / b.losses.mean(1, keepdim=True)).nanmean(0)
    return bool(off.mean() > gain and off.mean() > chance(off, sigmas))
