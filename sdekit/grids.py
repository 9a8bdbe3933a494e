"""Time grids: plain decreasing float64 tensors from T to t_min, n steps and n + 1 times."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.sde import SDE

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


GRIDS: dict[str, Callable[[SDE, int], Tensor]] = {
    "uniform": uniform,
    "quadratic": quadratic,
    "log_snr": log_snr,
    "karras": karras,
}


def make_grid(sde: SDE, grid: Grid, steps: int | None = None) -> Tensor:
    """The times of ``grid``: a name in GRIDS or a callable (sde, steps), or a tensor of times as it is.

    Raises ValueError where the times are not strictly decreasing within [t_min, T], or are not
    ``steps`` + 1; TypeError for anything that is no grid.
    """
    if isinstance(grid, str) or callable(grid):
        make = _checks.lookup(GRIDS, grid, "grid") if isinstance(grid, str) else grid
        times = make(sde, _checks.count(steps, "steps"))
    else:
        times = grid
    return check_grid(sde, times, steps)


def check_grid(sde: SDE, times: Any, steps: int | None) -> Tensor:
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
        raise ValueError(f"grid must lie in [t_min, T] = [{sde.t_min:g}, {sde.T:g}], got {ends}")
    if steps is not None and times.numel() != steps + 1:
        raise ValueError(f"grid has {times.numel() - 1} steps but {steps} are asked for; leave steps and nfe out")
    return times


def _levels(sde: SDE) -> tuple[Tensor, Tensor]:
    return sde.half_log_snr(sde.T), sde.half_log_snr(sde.t_min)


def _from_half_log_snr(sde: SDE, lam: Tensor) -> Tensor:
    return _pin(sde, sde.inverse_half_log_snr(lam))


def _pin(sde: SDE, times: Tensor) -> Tensor:
    times[0], times[-1] = sde.T, sde.t_min  # the ends are exact, not to rounding
    return times
