"""Time grids: plain decreasing float64 tensors from T to t_min, n steps and n + 1 times.

Data of unit size do not tell the noise level sigma/alpha = 1,000 from infinity: where a process goes beyond, to
alpha(T) = 0 or nearly, a grid by noise levels is that from there, with its first time moved to T. Few steps have better
uses than such levels, and than the lowest: the "inner" grids leave them out (:func:`inner`).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.processes.kept import kept
from sdekit.processes.sde import SDE
from sdekit.system import NOTHING, Time

_INFINITE = 1000.0

Grid = str | Tensor | Callable[[SDE, int], Tensor]


def uniform(sde: SDE, n: int) -> Tensor:
    """Uniform in t."""
    return _pin(sde, torch.linspace(sde.T, sde.t_min, n + 1, dtype=torch.float64))


def quadratic(sde: SDE, n: int) -> Tensor:
    """Uniform in sqrt(t)  (Song, Meng & Ermon 2021, appendix D.2)."""
    return _pin(sde, torch.linspace(sde.T**0.5, sde.t_min**0.5, n + 1, dtype=torch.float64).square())


def log_snr(sde: SDE, n: int) -> Tensor:
    """Uniform in half log-SNR  (Lu et al. 2022, section 3.2)."""
    return _from_half_log_snr(sde, torch.lerp(*_levels(sde), torch.linspace(0, 1, n + 1, dtype=torch.float64)))


def karras(sde: SDE, n: int, rho: float = 7.0) -> Tensor:
    """Uniform in (sigma/alpha)^(1/rho)  (Karras et al. 2022, eq. 5). Raises ValueError for rho <= 0."""
    rho = _checks.positive(rho, "rho")
    first, last = (torch.exp(-lam / rho) for lam in _levels(sde))
    return _from_half_log_snr(
        sde, -rho * torch.lerp(first, last, torch.linspace(0, 1, n + 1, dtype=torch.float64)).log()
    )


def vp_quadratic(sde: SDE, n: int, power: float = 2.0) -> Tensor:
    """Uniform in t^(1/power) of the linear VP schedule, VPSDE(), carried over to any process by its noise level.

    For VPSDE() itself power 2 is :func:`quadratic`, DDIM's grid. With b(t) = log(1 + (sigma/alpha)^2) the level of
    VPSDE() at t is b = beta_min t + (beta_max - beta_min) t^2/2 with 0.1 and 20, solved for t here. Few steps at the
    highest noise, where all predictions are alike, and few at the lowest. Raises ValueError for power <= 0.
    """
    power = _checks.positive(power, "power")
    linear, curve = 0.1, (20.0 - 0.1) / 2
    first, last = (
        ((linear**2 + 4 * curve * torch.nn.functional.softplus(-2 * lam)).sqrt() - linear) / (2 * curve)
        for lam in _levels(sde)
    )
    t = torch.lerp(first ** (1 / power), last ** (1 / power), torch.linspace(0, 1, n + 1, dtype=torch.float64)) ** power
    return _from_half_log_snr(sde, -torch.expm1(linear * t + curve * t**2).log() / 2)


def vp_cubic(sde: SDE, n: int) -> Tensor:
    """:func:`vp_quadratic` with power 3: more steps at low noise, for rules that interpolate x_0."""
    return vp_quadratic(sde, n, 3.0)


def inner(make: Callable[[SDE, int], Tensor], to_end: bool = False) -> Callable[[SDE, int], Tensor]:
    """That grid between the levels that matter to n steps, r = sigma/alpha from 2 (n + 1) down to min(0.4, 0.8/n^1.5)
    (and an eighth of a lower first level).

    Where the process itself has these: it grows into the whole grid as n grows, VPSDE()'s at 76 steps. The levels are
    in units of the process's ``unit_level``, which is 1 for data of about unit size. Both numbers were chosen on the
    networks and closed forms of benchmarks/nfe_vs_error.py.
    Above, what a model says of x_0 is one number for all x, and an error of eps counts r times in it: the way from T
    is taken in one go (:func:`sdekit.sampling.starts.bridge`). Below, x_0 is known to within r, and in an evaluation
    at the end of a step an error of x counts 1/r times: E[x_0|x] is taken from there. ``to_end``: down to t_min.
    """

    def grid(sde: SDE, n: int) -> Tensor:
        sde = cast(SDE, _Part(sde, sde.T, sde.t_min, math.log(_checks.positive(sde.unit_level, "unit_level"))))
        first, last = _levels(sde)
        low = -math.log(2.0 * (n + 1))
        high = -math.log(min(0.4, 0.8 / n**1.5, math.exp(-float(first)) / 8))
        if low >= last or high <= first:  # data of another size
            return make(sde, n)
        start = sde.T if first >= low else float(sde.inverse_half_log_snr(first.new_tensor(low)))
        end = sde.t_min if to_end or last <= high else float(sde.inverse_half_log_snr(first.new_tensor(high)))
        return make(between(sde, start, end), n)

    return grid


class _Part:
    """A process on [t_min, T] of its own, its half log-SNR counted from ``- zero``. alpha and sigma are those of the
    whole one, and may be functions of its T.
    """

    def __init__(self, whole: SDE, start: float, end: float, zero: float = 0.0) -> None:
        self.whole, self.T, self.t_min, self.zero = whole, start, end, zero

    def half_log_snr(self, t: Time) -> Tensor:
        """That of the whole one, and zero."""
        return self.whole.half_log_snr(t) + self.zero

    def inverse_half_log_snr(self, lam: Any) -> Tensor:
        """The time at which it is lam."""
        return self.whole.inverse_half_log_snr(lam - self.zero)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)


def between(sde: SDE, start: float, end: float | None = None) -> SDE:
    """The process on [end, start] alone, for a grid to be made of; end = t_min unless given."""
    return cast(SDE, _Part(sde, start, sde.t_min if end is None else end))


def by_levels(levels: Sequence[float]) -> Callable[[SDE, int], Tensor]:
    """The grid of a hand-made list of noise levels sigma/alpha, for any process and number of steps.

    The list is interpolated in log(level) over its index (Sabour et al. 2024, section 4). Levels that the process does
    not have are left out, and the ends of the rest are moved to the process's own. A 0 at the end, the step to x_0 in
    other programs' lists, is left out too: samplers take that step by ``denoise``.
    Raises ValueError for fewer than two levels and for levels that do not decrease or are not positive.
    """
    listed = torch.as_tensor(levels, dtype=torch.float64)
    if listed.ndim == 1 and len(listed) > 2 and listed[-1] == 0:  # others end a list with the step to x_0
        listed = listed[:-1]
    if listed.ndim != 1 or len(listed) < 2 or not (listed > 0).all() or not (listed.diff() < 0).all():
        raise ValueError(f"levels must be at least two positive numbers that decrease, got {listed.tolist()[:8]}")

    def grid(sde: SDE, n: int) -> Tensor:
        first, last = _levels(sde)
        lam = -listed.log()
        kept = lam[(lam > first - 1e-3) & (lam < last + 1e-3)]
        inside = torch.cat([first[None], kept[1:-1], last[None]])
        at = torch.linspace(0, len(inside) - 1, n + 1, dtype=torch.float64)
        i = at.floor().long().clamp_max(len(inside) - 2)
        return _from_half_log_snr(sde, torch.lerp(inside[i], inside[i + 1], at - i))

    return grid


# Align Your Steps (Sabour et al. 2024, table of their project page), ten steps each, as levels sigma/alpha.
AYS_SD15 = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
AYS_SVD = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)

GRIDS: dict[str, Callable[[SDE, int], Tensor]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "log_snr": log_snr,
    "karras": karras,
    "vp_quadratic": vp_quadratic,
    "vp_cubic": vp_cubic,
    "ays_sd15": by_levels(AYS_SD15),
    "ays_sdxl": by_levels(AYS_SDXL),
    "ays_svd": by_levels(AYS_SVD),
}

_INNER: dict[str, Callable[[SDE, int], Tensor]] = {
    "inner_log_snr": log_snr,
    "inner_karras": karras,
    "inner_vp_1.5": partial(vp_quadratic, power=1.5),
    "inner_quadratic": vp_quadratic,
    "inner_cubic": vp_cubic,
}
# The samplers' own: not from T, nor to t_min unless x is wanted there.
INNER = {name: inner(make) for name, make in _INNER.items()}
INNER_TO_END = {name: inner(make, to_end=True) for name, make in _INNER.items()}


def make_grid(sde: SDE, grid: Grid, steps: int | None = None, start: float | None = None) -> Tensor:
    """The times of ``grid``: a name in GRIDS or INNER, a callable (sde, steps), or a tensor of times as it is.

    ``start``: the process is taken on [t_min, start], T unless given.

    Raises ValueError where the times are not strictly decreasing within [t_min, T], or are not
    ``steps`` + 1; TypeError for anything that is no grid.
    """
    part = sde if start in (None, sde.T) else between(sde, start)
    if isinstance(grid, str):
        make, n = _checks.lookup({**GRIDS, **INNER}, grid, "grid"), _checks.count(steps, "steps")
        times = kept(
            sde, (make, n, part.T, part.t_min, sde.unit_level), lambda: make(part, n), lambda times: times
        ).clone()
    elif callable(grid):
        times = grid(part, _checks.count(steps, "steps"))
    else:
        times = grid
    return check_grid(part, times, steps, "T" if part is sde else "start")


def before_zero(sde: SDE, times: Any) -> Any:
    """A list of times without the 0 at its end, the step to which is the denoising."""
    try:
        listed = torch.as_tensor(times, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return times  # which check_grid refuses
    return listed[:-1] if listed.ndim == 1 and len(listed) > 2 and listed[-1] == 0 < sde.t_min else times


def check_grid(sde: SDE, times: Any, steps: int | None, top: str = "T") -> Tensor:
    """The times as a float64 CPU tensor, or an error that says what is wrong with them."""
    try:
        times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"grid must be a name, a callable (sde, steps) or a tensor of times, got {times!r}") from None
    if times.ndim != 1 or times.numel() < 2:
        raise ValueError(f"grid must be a 1-d tensor of at least two times, got shape {tuple(times.shape)}")
    if not torch.isfinite(times).all() or (times.diff() >= 0).any():
        raise ValueError(f"grid must decrease strictly from noise to data; got {times[:4].tolist()} ...; try .flip(0)")
    slack = 1e-6 * sde.T
    if times[0] > sde.T + slack or times[-1] < sde.t_min * (1 - 1e-6):
        ends = f"[{float(times[-1]):g}, {float(times[0]):g}]"
        zero = "; the step to 0 is the denoising, denoise=True: leave the 0 out" if times[-1] == 0 else ""
        raise ValueError(f"grid must lie in [t_min, {top}] = [{sde.t_min:g}, {sde.T:g}], got {ends}{zero}")
    if steps is not None and times.numel() != steps + 1:
        raise ValueError(f"grid has {times.numel() - 1} steps but {steps} are asked for; leave steps and nfe out")
    return times


def first_level(sde: SDE) -> Tensor:
    """The half log-SNR at T, or where alpha(T) = 0 what stands for it."""
    lam = sde.half_log_snr(sde.T)
    return torch.where(lam < math.log(NOTHING), -math.log(_INFINITE), lam)


def _levels(sde: SDE) -> tuple[Tensor, Tensor]:
    return first_level(sde).clamp_min(-math.log(_INFINITE)), sde.half_log_snr(sde.t_min)


def _from_half_log_snr(sde: SDE, lam: Tensor) -> Tensor:
    return _pin(sde, sde.inverse_half_log_snr(lam))


def _pin(sde: SDE, times: Tensor) -> Tensor:
    times[0], times[-1] = sde.T, sde.t_min  # the ends are exact, not to rounding
    return times
