"""Whether a process is what it says: its schedule, its equation, and its ends for the data at hand."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.evaluation.check import ends, kernel, schedule
from sdekit.evaluation.check.kernel import Simulated
from sdekit.evaluation.check.lines import attempt
from sdekit.evaluation.parts import Figure, Line
from sdekit.evaluation.report import Report
from sdekit.processes.sde import SDE

_WRITTEN = "write alpha(t) and sigma(t) with torch operations on a float64 tensor t, entry by entry"


def check_process(
    sde: SDE,
    *,
    data: Tensor | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    shape: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Report:
    """Look at a process, one's own above all: are its schedule, its equation and its ends right, and for this data?

    ``data``: samples (N, *event), by whose mean and spread, entry by entry, t_min and the prior are judged; or these as
    numbers, ``mean`` and ``std``, with ``shape`` (B, *event) for totals of an event. ``dtype``: of the states that will
    be sampled. ``seed``: of the draws of the prior, which alone are random.

    Lines: "interval", "levels" (alpha and sigma finite, entry by entry), "jumps", "slope" (automatic differentiation
    against differences), "snr" (falls with t), "diffusion" (g^2 >= 0), "kernel mean" and "kernel spread" (what the
    process's own drift and diffusion make of a point at t_min, by Heun's method, against alpha and sigma; exact, by the
    response to each noise: no false alarms, and 2 % off fails), "noise" (L of correlated noise, where the event is
    known), "prior" (its draws: 6 standard errors off, 3 % of sigma, fail), "t_min" (noise that is left there warns from
    5 % of the data's spread on, x's rounding from 2 % of that noise; with a t_min that would do), "prior mismatch" (the
    KL divergence, in nats, from the law at T of Gaussian data of this mean m and spread s to the prior,
    1/2 (alpha^2 (m^2 + s^2)/sigma^2 - log(1 + alpha^2 s^2/sigma^2)) for each entry: 0.001 a dimension warns, 0.05
    fails) and "terminal snr" (alpha^2 s^2/sigma^2 at T, where 0.001 warns: Lin et al. 2024).
    Where no Brownian motion makes the process there are no lines on its equation and its draws. What raises is a line
    that fails, with the message.

    Raises TypeError for what is no process with alpha and sigma (an ItoSDE has none), and ValueError or TypeError for
    other arguments; a process that has another mean for each sample needs ``shape`` or ``data``.
    """
    _checks.instance(sde)
    if not hasattr(sde, "half_log_snr"):
        raise TypeError(f"{type(sde).__name__} has alpha and sigma alone: subclass sdekit.SDE, which derives the rest")
    known = ends.Data.of(data, mean, std, shape)
    _checks.floating(dtype)
    if known.shape is None and not sde.common(torch.zeros(1, 1)):
        raise ValueError(f"{type(sde).__name__} has a mean for each sample, or of an event: give shape = (B, *event)")
    figures: list[Figure] = []
    lines = tuple(_lines(sde, known, dtype, seed, figures))
    settings = {
        "process": type(sde).__name__, "T": sde.T, "t_min": sde.t_min,
        "mean of the data": float(known.mean.mean()), "spread of the data": known.spread,
        "event": None if known.shape is None else list(known.shape[1:]), "dtype": str(dtype), "seed": seed,
        "simulated": "by heun's method" if sde.diffuses else "no: no Brownian motion makes it",
    }  # fmt: skip
    return Report(f"check_process: {type(sde).__name__}", lines, settings, tuple(figures))


def _lines(sde: SDE, data: ends.Data, dtype: torch.dtype, seed: int, figures: list[Figure]) -> Iterator[Line]:
    yield (first := attempt("interval", lambda: schedule.interval(sde)))
    if first.verdict == "fail":
        return  # there are no times to look at
    times = schedule.visited(sde)
    yield (found := attempt("levels", lambda: schedule.levels(sde, times), _WRITTEN))
    if found.verdict == "fail" and found.text.startswith("raised"):
        return
    figures += _drawn(sde, times)
    for look in (schedule.jumps, schedule.slope, schedule.snr):
        yield attempt(look.__name__, partial(look, sde, times), _WRITTEN)
    yield attempt("diffusion", lambda: schedule.diffusion(sde, times), "see the lines slope and snr")
    if sde.diffuses:
        yield from _equation(sde, times, data, figures)
        if sde.root is not None and data.shape is not None:
            shape = data.shape
            yield attempt("noise", lambda: ends.noise(sde, shape, seed), "CorrelatedSDE says what root must be")
        yield attempt("prior", lambda: ends.prior(sde, data, seed), "prior_sample must draw N(m(T), sigma(T)^2)")
    yield attempt("t_min", lambda: ends.t_min(sde, data, dtype))
    yield attempt("prior mismatch", lambda: ends.mismatch(sde, data, seed))
    yield attempt("terminal snr", lambda: ends.terminal(sde, data))


def _equation(sde: SDE, times: Tensor, data: ends.Data, figures: list[Figure]) -> Iterator[Line]:
    made: list[Simulated] = []

    def mean() -> Line:
        made.append(kernel.simulate(sde, times, data.shape))
        return kernel.kernel_mean(made[0])

    yield attempt("kernel mean", mean, "drift(x, t) and diffusion(t) must run; leave them out, and they are derived")
    for s in made:
        yield attempt("kernel spread", lambda s=s: kernel.kernel_spread(s))  # type: ignore[misc]
        t, made_of = s.t[1:].tolist(), s.moments.noise.reshape(len(s.t) - 1, -1)[:, 0].sqrt().tolist()
        fine = times[(times >= t[0]) & (times <= t[-1])][::16]
        wanted = (sde.sigma(fine) ** 2 - (sde.alpha(fine) / sde.alpha(s.t[0]) * sde.sigma(s.t[0])) ** 2).sqrt()
        curves = {"alpha, sigma": (fine.tolist(), wanted.tolist()), "drift, diffusion": (t, made_of)}
        figures.append(Figure("Spread from a point at t_min", "t", "standard deviation", curves, "xy"))


def _drawn(sde: SDE, times: Tensor) -> list[Figure]:
    t, alpha, sigma = (y[::8].tolist() for y in (times, sde.alpha(times), sde.sigma(times)))
    wide = "xy" if max(sigma) > 3 else "x"
    lam = sde.half_log_snr(times)[::8].clamp(-20, 20).tolist()
    return [
        Figure("Signal and noise", "t", "alpha, sigma", {"alpha": (t, alpha), "sigma": (t, sigma)}, wide),
        Figure("Noise level", "t", "half log-SNR, log(alpha/sigma)", {"log(alpha/sigma)": (t, lam)}, "x"),
    ]
