"""Other people's solvers behind the same call: the same system in, the same Solution out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torchdiffeq
import torchsde
from scipy.integrate import solve_ivp
from torch import Tensor

from sdekit.solution import SUCCESS, Solution, full
from sdekit.system import System


def _torchdiffeq(system: System, x: Tensor, grid: Tensor, method: str, rtol: float, atol: float, noise: Any) -> Tensor:
    _needs_ode(system, "torchdiffeq")
    times = grid.to(x.device, x.dtype) if x.device.type == "mps" else grid.to(x.device)

    def rhs(t: Tensor, y: Tensor) -> Tensor:
        try:
            return system.drift(y, _inside(float(t), grid))
        except AssertionError as error:  # the score's own, not the back-end's
            raise RuntimeError(f"the score failed: {error}") from error

    try:
        return torchdiffeq.odeint(rhs, x, times, rtol=rtol, atol=atol, method=method)[-1]
    except AssertionError as error:  # its way to say "underflow in dt" and "non-finite values in state"
        raise GaveUpError(str(error)) from error


def _scipy(system: System, x: Tensor, grid: Tensor, method: str, rtol: float, atol: float, noise: Any) -> Tensor:
    _needs_ode(system, "scipy")

    def rhs(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y).to(x).reshape(x.shape)
        return system.drift(state, _inside(float(t), grid)).double().cpu().numpy().ravel()

    ends = (float(grid[0]), float(grid[-1]))
    out = solve_ivp(rhs, ends, x.double().cpu().numpy().ravel(), method=method, rtol=rtol, atol=atol)
    if not out.success:
        raise GaveUpError(out.message)
    return torch.from_numpy(out.y[:, -1].copy()).to(x).reshape(x.shape)


class _Flat:
    """A system on [t, s] for torchsde: state (B, d), increasing time tau = |t - t_0|."""

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, system: System, shape: torch.Size, ends: Tensor) -> None:
        self.system, self.shape, self.ends = system, shape, ends
        self.sign = 1.0 if ends[-1] > ends[0] else -1.0

    def _t(self, tau: Tensor) -> float:
        return _inside(float(self.ends[0]) + self.sign * float(tau), self.ends)

    def f(self, tau: Tensor, y: Tensor) -> Tensor:
        return self.sign * self.system.drift(y.reshape(self.shape), self._t(tau)).reshape(y.shape)

    def g(self, tau: Tensor, y: Tensor) -> Tensor:
        return y.new_full(y.shape, float(self.system.diffusion(self._t(tau))))


class _Path(torchsde.BaseBrownian):
    """A noise source as torchsde's Brownian motion: the increment of the step from t to s, which is all it asks for."""

    def __init__(self, noise: Any, x: Tensor, t: float, s: float) -> None:
        super().__init__()
        self._noise, self._like, self._step = noise, x, (t, s)

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        if return_U or return_A or tb is None:
            raise ValueError("torchsde methods that need more than the path's increments are not supported here")
        return self._noise.increment(*self._step).reshape(self.shape)

    def __repr__(self) -> str:
        return "sdekit's keyed noise"

    dtype = property(lambda self: self._like.dtype)
    device = property(lambda self: self._like.device)
    shape = property(lambda self: torch.Size((self._like.shape[0], self._like[0].numel())))
    levy_area_approximation = property(lambda self: "none")


def _torchsde(system: System, x: Tensor, grid: Tensor, method: str, rtol: float, atol: float, noise: Any) -> Tensor:
    y = x.reshape(x.shape[0], -1)
    for ends in grid.unfold(0, 2, 1):  # its steps have one length: one call per interval
        t, s = ends.tolist()
        noise.enter(t, s)
        flat, path, h = _Flat(system, x.shape, ends), _Path(noise, x, t, s), abs(s - t)
        y = torchsde.sdeint(flat, y, [0.0, h], bm=path, method=method, dt=h)[-1]
    return y.reshape(x.shape)


class GaveUpError(Exception):
    """A back-end's own solver failed."""


# Those that choose their steps themselves, and those that take the grid's. torchsde's other methods ask for more of
# the Brownian path than increments of successive intervals.
ADAPTIVE = {
    **{f"torchdiffeq:{m}": _torchdiffeq for m in ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")},
    **{f"scipy:{m}": _scipy for m in ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")},
}
METHODS: dict[str, Callable[..., Tensor]] = {
    **ADAPTIVE,
    **{f"torchdiffeq:{m}": _torchdiffeq for m in ("euler", "midpoint", "heun3", "rk4")},
    "torchsde:euler": _torchsde,
}


def run(
    backend: Callable[..., Tensor],
    system: System,
    x: Tensor,
    grid: Tensor,
    method: str,
    *,
    rtol: float,
    atol: float,
    noise: Any,
) -> Solution:
    """x at grid[-1] by a back-end's ``method``; its own failure becomes the status "failed", its reason, and NaN."""
    nfe, status, t, reason = system.nfe, SUCCESS, float(grid[-1]), ""
    try:
        out = backend(system, x, grid, method.partition(":")[2], rtol, atol, noise)
    except GaveUpError as error:
        out, status, t, reason = torch.full_like(x, torch.nan), "failed", float(grid[0]), str(error)
    system.settle()
    evaluations = system.nfe - nfe
    return Solution(
        x=out,
        t=full(x, t, torch.float64),
        nfe=evaluations,
        nfe_per_sample=full(x, evaluations, torch.int64),
        accepted=None,
        rejected=None,
        status=[status] * x.shape[0],
        reason=reason,
    )


def _needs_ode(system: System, name: str) -> None:
    if system.churn:
        raise ValueError(f"{name} integrates ODEs: it needs churn = 0, got {system.churn:g}; torchsde takes noise")


def _inside(t: float, grid: Tensor) -> float:
    """A back-end's time, a float32 rounding or a probe step beyond the ends brought back to them."""
    low, high = sorted((float(grid[0]), float(grid[-1])))
    return min(max(t, low), high)
