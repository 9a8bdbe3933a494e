"""Other people's solvers behind the same call: the same system in, the same Solution out."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torchdiffeq
import torchsde
from scipy.integrate import solve_ivp
from torch import Tensor

from sdekit import _checks
from sdekit.noise.keyed import Noise
from sdekit.solvers.solution import SUCCESS, Solution, Trajectory, full, keep_indices, keep_times
from sdekit.system import System


def _torchdiffeq(
    system: System, x: Tensor, grid: Tensor, kept: list[int], method: str, rtol: float, atol: float, noise: Any
) -> list[Tensor]:
    _needs_ode(system, "torchdiffeq")
    times = grid.to(x.device, x.dtype) if x.device.type == "mps" else grid.to(x.device)

    def rhs(t: Tensor, y: Tensor) -> Tensor:
        try:
            return system.drift(y, _inside(t.item(), grid))  # of a graph float() would warn
        except AssertionError as error:  # the score's own, not the back-end's
            raise RuntimeError(f"the score failed: {error}") from error

    # Else it steps beyond these times and interpolates, which bosh3 and dopri8 do with a hundred times their tolerance.
    options = {"step_t": times[1:]} if f"torchdiffeq:{method}" in ADAPTIVE else None
    try:
        path = torchdiffeq.odeint(rhs, x, times, rtol=rtol, atol=atol, method=method, options=options)
    except AssertionError as error:  # its way to say "underflow in dt" and "non-finite values in state"
        raise GaveUpError(str(error)) from error
    return [path[k] for k in kept]


def _scipy(
    system: System, x: Tensor, grid: Tensor, kept: list[int], method: str, rtol: float, atol: float, noise: Any
) -> list[Tensor]:
    _needs_ode(system, "scipy")

    def rhs(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y).to(x).reshape(x.shape)
        dy = system.drift(state, _inside(float(t), grid))
        if not _checks.finite(dy):  # RK45 would go on for ever, LSODA call it a success
            raise GaveUpError(f"the drift is not finite at t = {t:g}")
        return dy.double().cpu().numpy().ravel()

    ends = (float(grid[0]), float(grid[-1]))
    start, dense = x.double().cpu().numpy().ravel(), len(kept) > 1
    out = solve_ivp(rhs, ends, start, method=method, rtol=rtol, atol=atol, dense_output=dense)
    if not out.success:
        raise GaveUpError(out.message)
    if not np.isfinite(out.y[:, -1]).all():
        raise GaveUpError("the state is not finite")
    path = [*(out.sol(float(grid[k])) for k in kept[:-1]), out.y[:, -1].copy()]
    return [torch.from_numpy(y).to(x).reshape(x.shape) for y in path]


class _Flat:
    """A system for torchsde on one interval: state (B, d), time tau = |u - t| from 0 to |s - t|.

    In decreasing time  dx = -drift dtau + diffusion dW: its noise is W_s - W_t, the increment of our step rules.
    """

    def __init__(self, system: System, like: Tensor, t: float, s: float, sde_type: str) -> None:
        self.system, self.shape, self.ends, self.sde_type = system, like.shape, (t, s), sde_type
        self.noise_type = "general" if system.noise_type == "general" else "diagonal"  # its additive wants a matrix
        self.sign = 1.0 if s > t else -1.0
        self._last: tuple[Tensor | None, float, Tensor] = (None, 0.0, like)

    def _t(self, tau: Tensor) -> float:
        return _inside(self.ends[0] + self.sign * float(tau), self.ends)

    def f(self, tau: Tensor, y: Tensor) -> Tensor:
        if y is not self._last[0] or float(tau) != self._last[1]:  # torchsde asks for the first drift twice, to see it
            drift = self.system.drift(y.reshape(self.shape), self._t(tau))
            self._last = y, float(tau), self.sign * drift.reshape(y.shape)
        return self._last[2]

    def g(self, tau: Tensor, y: Tensor) -> Tensor:
        if not self.system.churn:
            return torch.zeros_like(y)
        g = self.system.diffusion_at(y.reshape(self.shape), self._t(tau))
        if self.noise_type == "general":
            return g.reshape(*y.shape, -1)
        return torch.as_tensor(g, dtype=y.dtype, device=y.device).expand(self.shape).reshape(y.shape)


class _Path(torchsde.BaseBrownian):
    """The noise's increment from t to s, for a method that asks for that of its whole interval and for nothing else."""

    def __init__(self, noise: Any, like: Tensor, t: float, s: float) -> None:
        super().__init__()
        self._noise, self._like, self._ends = noise, like, (t, s)

    def __call__(self, ta: Any, tb: Any = None, return_U: bool = False, return_A: bool = False) -> Any:
        dW = self._noise.increment(*self._ends)
        if dW.shape != self._like.shape:
            shape, got = tuple(self._like.shape), tuple(dW.shape)
            raise ValueError(f"noise must be made for a tensor {shape}, as Noise(x.new_empty{shape}) is, not {got}")
        return dW.reshape(self.shape)

    def __repr__(self) -> str:
        return "sdekit's keyed noise"

    dtype = property(lambda self: self._like.dtype)
    device = property(lambda self: self._like.device)
    shape = property(lambda self: torch.Size((self._like.shape[0], self._like[0].numel())))
    levy_area_approximation = property(lambda self: "none")


# Torchsde's methods that ask for the increments of successive intervals alone, and whose integral they take.
_SDE_TYPES = {
    "euler": "ito",
    "milstein": "ito",
    "heun": "stratonovich",
    "midpoint": "stratonovich",
    "euler_heun": "stratonovich",
}
GENERAL = "torchsde:euler (Ito), or torchsde:heun, torchsde:midpoint or torchsde:euler_heun (Stratonovich)"


def _torchsde(
    system: System, x: Tensor, grid: Tensor, kept: list[int], method: str, rtol: float, atol: float, noise: Any
) -> list[Tensor]:
    """One call per interval, one step each. Strong order 1, but for euler on diagonal and all on general noise 1/2."""
    like = x
    system.require_sense(_SDE_TYPES[method], "torchsde:euler" if _SDE_TYPES[method] != "ito" else "torchsde:heun")
    if system.noise_type == "general":
        if method == "milstein":
            raise ValueError(f"torchsde:milstein takes additive or diagonal noise; for general noise use {GENERAL}")
        like = x.new_empty(x.shape[0], system.diffusion_at(x, float(grid[0])).shape[-1])
    noise, y = noise or Noise(like, root=system.root), x.reshape(x.shape[0], -1)
    path = {0: x}
    for k, (t, s) in enumerate(pairwise(grid.tolist()), start=1):
        noise.enter(t, s)
        flat, increment = _Flat(system, x, t, s, _SDE_TYPES[method]), _Path(noise, like, t, s)
        # dt: to the interval's end in one step, however both are rounded. grad_free: of milstein, whose derivatives
        # would keep a graph through all steps.
        ends, options = torch.tensor([0.0, abs(s - t)], dtype=y.dtype), {"grad_free": True}
        y = torchsde.sdeint(flat, y, ends, bm=increment, method=method, dt=math.inf, options=options)[-1]
        if k in kept:
            path[k] = y.reshape(x.shape)
    return [path[k] for k in kept]


class GaveUpError(Exception):
    """A back-end's own solver failed."""


# Those that choose their steps themselves, and those that take the grid's.
ADAPTIVE = {
    **{f"torchdiffeq:{m}": _torchdiffeq for m in ("dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2")},
    **{f"scipy:{m}": _scipy for m in ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")},
}
METHODS: dict[str, Callable[..., list[Tensor]]] = {
    **ADAPTIVE,
    **{f"torchdiffeq:{m}": _torchdiffeq for m in ("euler", "midpoint", "heun3", "rk4")},
    **{f"torchsde:{m}": _torchsde for m in _SDE_TYPES},
}


def run(
    backend: Callable[..., list[Tensor]],
    system: System,
    x: Tensor,
    grid: Tensor,
    method: str,
    *,
    rtol: float,
    atol: float,
    noise: Any,
    keep: int,
) -> Solution:
    """x at grid[-1] by a back-end's ``method``; its own failure becomes the status "failed", its reason, and NaN.

    ``keep`` states make the trajectory: at times of the grid, or between its ends where the method chooses its steps.
    """
    nfe, status, t, reason = system.nfe, SUCCESS, float(grid[-1]), ""
    if method in ADAPTIVE:
        grid = keep_times(grid, keep) if keep else grid[[0, -1]]
    kept = sorted(keep_indices(len(grid) - 1, keep)) or [len(grid) - 1]
    try:
        path = backend(system, x, grid, kept, method.partition(":")[2], rtol, atol, noise)
    except GaveUpError as error:  # and does not say how far it came
        path = [torch.full_like(x, torch.nan)] * len(kept)
        status, t, reason = "failed", float(grid[0]), str(error)
    system.settle()
    if status == SUCCESS and not _checks.finite(path[-1]):  # of steps that the grid chose; others have given up
        raise FloatingPointError(f"the state overflowed between t = {float(grid[0]):g} and {t:g}; take more steps")
    evaluations = system.nfe - nfe
    return Solution(
        x=path[-1],
        t=full(x, t, torch.float64),
        nfe=evaluations,
        nfe_per_sample=full(x, evaluations, torch.int64),
        accepted=None,
        rejected=None,
        status=[status] * x.shape[0],
        trajectory=Trajectory(grid[kept], torch.stack([x, *path[1:]])) if keep else None,
        reason=reason,
    )


def _needs_ode(system: System, name: str) -> None:
    if system.churn:
        raise ValueError(f"{name} integrates ODEs: it needs churn = 0, got {system.churn:g}; torchsde takes noise")


def _inside(t: float, grid: Tensor | tuple[float, float]) -> float:
    """A back-end's time, a float32 rounding or a probe step beyond the ends brought back to them."""
    low, high = sorted((float(grid[0]), float(grid[-1])))
    return min(max(t, low), high)
