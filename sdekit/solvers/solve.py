"""One call for every system and method: fixed grid, adaptive, or a back-end."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import Padding, only_real, padded, real_state
from sdekit.noise.brownian import BrownianPath
from sdekit.noise.keyed import Noise
from sdekit.processes.reverse import Reverse
from sdekit.solvers import backends
from sdekit.solvers.adams import Adams
from sdekit.solvers.adaptive import MAX_NFE, adaptive
from sdekit.solvers.fixed import integrate
from sdekit.solvers.frame import FlowFrame, InFrame
from sdekit.solvers.rungekutta import TABLEAUS, RungeKutta
from sdekit.solvers.solution import Callback, Solution, Trajectory, keep_times
from sdekit.solvers.sra import SRA1
from sdekit.solvers.steppers import RULES, StepRule, as_rule
from sdekit.system import NOISE_TYPES, System

ADAPTIVE = (*TABLEAUS, *(f"flow_{name}" for name in TABLEAUS), "adams")  # for ODEs
ADAPTIVE_SDE = "adaptive_sra1"


def solve(
    system: System,
    x: Tensor,
    grid: Tensor | Sequence[float],
    method: str | StepRule | Any = None,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_nfe: int | None = None,
    noise: Noise | None = None,
    keep: int = 0,
    denoise: bool = False,
    estimate: bool = False,
    progress: bool = False,
    callback: Callback | None = None,
    differentiable: bool | str = False,
    mask: Tensor | Padding | None = None,
) -> Solution:
    """Integrate ``system`` from x at grid[0] to grid[-1].

    ``system``: an SDE (its forward equation), ``sde.reverse(score)``, ``sde.probability_flow(score)``, or
    any :class:`System` with drift and diffusion, whose ``noise_type`` says whether the diffusion depends on x.
    ``x``: (B, *event). ``grid``: monotone times; forwards in time too, except against the noise of a reverse SDE.
    ``method``: a step rule or its name (``RULES``), which takes the grid's steps; an adaptive method, with error and
    step size per sample between the grid's ends: "rk45" (Dormand-Prince 5(4)) and "rk23" (Bogacki-Shampine 3(2)); for
    a probability flow also "flow_rk45" and "flow_rk23", the same in a frame where its linear part is exact
    (:class:`sdekit.solvers.frame.FlowFrame`), and, in the same frame, "adams" (:class:`sdekit.solvers.adams.Adams`),
    which needs by far the fewest evaluations and is the default there ("rk45" for any other ODE); for an SDE
    "adaptive_sra1" (:class:`sdekit.solvers.sra.SRA1`), on a Brownian path; or a back-end and its method, such as
    "torchdiffeq:dopri5", "scipy:RK45" or "torchsde:euler" (``backends.METHODS``), whose steps are the whole batch's.
    Where the diffusion depends on x, euler_maruyama, milstein, rk4, torchsde:euler and torchsde:milstein solve Ito's
    equation, heun and torchsde's other methods Stratonovich's; sra1 and adaptive_sra1 refuse, and general noise is
    torchsde's alone.
    ``rtol``, ``atol``: of an adaptive method; ``max_nfe``: its limit of evaluations
    (default 100,000), a final denoising counted.
    ``noise``: the source of randomness: :class:`Noise`, or a :class:`BrownianPath`, of which euler_maruyama, milstein,
    heun, rk4, sra1 and torchsde's methods take increments (other rules draw exact noise of their own kind); fresh
    unless given. Made for x; for general noise for a tensor (B, m).
    ``keep``: how many states (>= 2) to keep as trajectory, 0 for none; an adaptive method steps onto each of those
    times, which costs evaluations (SciPy's interpolate there, which costs none).
    ``denoise``: take the step from the last time to t = 0 as well, x to E[x_0|x], one evaluation; reverse systems only.
    ``estimate``: report ``Solution.error``, per sample, for rules with a corrector. It costs a norm a step.
    ``callback(step, t, x)``: after each step, with a copy of x.
    ``differentiable``: keep the graph (else there is none); "checkpoint": make that of each evaluation of a model again
    when the gradient needs it.
    ``mask``: which entries of padded samples are real, as in :func:`sdekit.sample`. Of a drift of your own the real
    entries must not depend on the others. Not for back-ends and general noise.

    An adaptive method that stops early returns what it has, with a status per sample.
    Raises ValueError or TypeError for bad input, FloatingPointError for a non-finite score or state.
    """
    without_graph(x, "x", differentiable)
    x, padding = real_state(x, mask, system)
    if differentiable and isinstance(method, str) and method.startswith("scipy:"):
        raise ValueError(f"{method} has no gradients, which differentiable asks for: use adams or torchdiffeq:dopri5")
    if isinstance(system, Reverse):
        system.model.remake = differentiable == "checkpoint"
    elif differentiable == "checkpoint":
        raise ValueError('differentiable="checkpoint" needs a system of a model, such as sde.probability_flow(score)')
    told = callback
    with graph(differentiable), padded(padding):
        if system.shifted:  # it runs on x less a mean of the process's own
            x = system.centre(x, torch.as_tensor(grid, dtype=torch.float64).reshape(-1)[0])
            told = callback and (lambda k, t, y: callback(k, t, system.place(y, t)))
        out = _solve(
            system, x, grid, method, rtol=rtol, atol=atol, max_nfe=max_nfe, noise=noise, keep=keep,
            denoise=denoise, estimate=estimate, progress=progress, callback=told, padding=padding,
        )  # fmt: skip
        if not system.shifted:
            return out
        path = out.trajectory
        if path is not None:
            path = Trajectory(path.t, torch.stack([system.place(y, t) for t, y in zip(path.t, path.x, strict=True)]))
        there = out.x if denoise and out.success else system.place(out.x, out.t.to(x.device))
        return replace(out, x=there, trajectory=path)


def graph(differentiable: bool | str) -> Any:
    """The mode of gradients that goes with ``differentiable``, whatever that of the caller."""
    return torch.enable_grad() if differentiable else torch.no_grad()


def without_graph(x: Any, name: str, differentiable: bool | str) -> None:
    """Refuse a state whose gradient would be cut off without a word, and a ``differentiable`` that is none."""
    if differentiable not in (False, True, "checkpoint"):
        raise ValueError(f'differentiable must be False, True or "checkpoint", got {differentiable!r}')
    if differentiable and torch.is_inference_mode_enabled():
        raise ValueError("differentiable needs gradients, and inference mode has none: leave torch.inference_mode")
    if not differentiable and isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, and there is none: pass differentiable=True, or {name}.detach()")


def _solve(
    system: System,
    x: Tensor,
    grid: Tensor | Sequence[float],
    method: Any,
    *,
    rtol: float,
    atol: float,
    max_nfe: int | None,
    noise: Noise | None,
    keep: int,
    denoise: bool,
    estimate: bool,
    progress: bool,
    callback: Callback | None,
    padding: Padding | None,
) -> Solution:
    times = _monotone(grid, system)
    schedules = (system.sde.alpha, system.sde.sigma) if isinstance(system, Reverse) and torch.is_grad_enabled() else ()
    if any(schedule(times).requires_grad for schedule in schedules):
        raise ValueError("parameters of the process require a gradient, and samples have none to them: detach them")
    if method is None:
        if system.churn:
            raise ValueError(f"method must be given where churn = {system.churn:g} > 0: {ADAPTIVE_SDE} or a step rule")
        method = "adams" if isinstance(system, Reverse) and type(system).drift is Reverse.drift else "rk45"
    _checks.lookup(NOISE_TYPES, system.noise_type, "noise_type")
    rtol, atol = _checks.positive(rtol, "rtol"), _checks.positive(atol, "atol")
    if denoise and not isinstance(system, Reverse):
        system.at(float(times[-1]), x)  # raises, since there is no score
    if keep:
        keep = _checks.count(keep, "keep", minimum=2)
    if estimate and (method in (*ADAPTIVE, ADAPTIVE_SDE) or (isinstance(method, str) and ":" in method)):
        raise ValueError(
            f"estimate is for fixed-step rules with a corrector; {method} controls its error by rtol and atol"
        )
    if isinstance(noise, Noise):
        if noise.root is not system.root:
            raise ValueError("noise must have the process's root: Noise(x, seed, root=sde.root), or a BrownianPath so")
        fits = noise.shape == x.shape or system.noise_type == "general"  # the back-end knows what that needs
        if not fits or noise.dtype != x.dtype:
            made = f"{noise.dtype} {tuple(noise.shape)}"
            raise ValueError(f"noise must be made for x, {x.dtype} {tuple(x.shape)}, not for a tensor {made}")
        if noise.padding is not padding and not (noise.padding and padding and noise.padding.same(padding)):
            raise ValueError("noise and solve must be given the same mask: Noise(x, seed, mask=mask)")
    if isinstance(method, str) and ":" in method:
        backend = _checks.lookup(backends.METHODS, method, "method")
        if callback is not None or max_nfe is not None or progress:
            raise ValueError(f"callback, max_nfe and progress are not known to {method}; leave them out")
        if padding is not None:
            raise ValueError(f"mask is not known to {method}: use adams, rk45, adaptive_sra1 or a step rule")
        system.prepare(times.tolist(), x)
        solution = backends.run(backend, system, x, times, method, rtol=rtol, atol=atol, noise=noise, keep=keep)
        return _denoised(system, solution, float(times[-1])) if denoise else solution
    if system.churn and system.noise_type == "general":
        raise ValueError(f"step rules take additive or diagonal noise; for general noise use {backends.GENERAL}")
    if method in (*ADAPTIVE, ADAPTIVE_SDE):
        least = 2 * torch.finfo(x.dtype).eps
        if max(rtol, atol) < least:
            raise ValueError(
                f"rtol = {rtol:g} and atol = {atol:g} ask for more than {x.dtype} resolves, {least:.1g}: raise one of "
                "them, or take a state of torch.float64"
            )
        if system.churn and method != ADAPTIVE_SDE:
            raise ValueError(
                f"{method} integrates ODEs: it needs churn = 0, got {system.churn:g}; use {ADAPTIVE_SDE} or a step rule"
            )
        system.prepare(times[[0, -1]].tolist(), x)
        if system.churn and isinstance(system, Reverse) and bool((system.levels(times[[0, -1]]).alpha == 0).any()):
            system.require_drift()
        limit = _checks.count(MAX_NFE if max_nfe is None else max_nfe, "max_nfe", minimum=8 + denoise) - denoise
        ends = keep_times(times, keep) if keep else times[[0, -1]]
        solution = adaptive(
            _adaptive_method(str(method), system, rtol, atol, x, times, noise, padding), x, ends, max_nfe=limit,
            keep=bool(keep), progress=progress, callback=callback, calls=lambda: system.nfe,
            network_calls=system.network_calls,
        )  # fmt: skip
        system.settle()
        if max_nfe is not None and "max_nfe" in solution.status:
            solution.reason = f"max_nfe = {max_nfe}"
        return _denoised(system, solution, float(times[-1])) if denoise else solution
    if max_nfe is not None:
        raise ValueError("max_nfe limits an adaptive method; a step rule takes exactly the grid's steps")
    if isinstance(method, str):
        method = _checks.lookup(RULES, method, f"method (besides {', '.join((*ADAPTIVE, ADAPTIVE_SDE))})")
    rule = as_rule(method)
    return integrate(
        system, rule, x, times, noise or Noise(x, root=system.root, mask=padding), keep=keep, denoise=denoise,
        estimate=estimate, progress=progress, callback=callback,
    )  # fmt: skip


def _adaptive_method(
    name: str,
    system: Any,
    rtol: float,
    atol: float,
    x: Tensor,
    times: Tensor,
    noise: Noise | None,
    padding: Padding | None,
) -> InFrame | RungeKutta | SRA1:
    if name == ADAPTIVE_SDE:
        path = noise or BrownianPath(x, start=float(times[0]), end=float(times[-1]), root=system.root, mask=padding)
        if not isinstance(path, BrownianPath):
            raise TypeError(f"{name} needs a BrownianPath for noise, got {type(path).__name__}")
        return SRA1(system, rtol, atol, path)
    if name == "adams" or name.startswith("flow_"):
        frame = FlowFrame(system)
        if name == "adams":
            return InFrame(frame, Adams(frame.velocity, rtol, atol))
        return InFrame(frame, RungeKutta(frame.velocity, rtol, atol, TABLEAUS[name.removeprefix("flow_")]))
    # t comes in float64, one per sample; a drift that multiplies by it must not make x one too
    return RungeKutta(lambda y, t, run: only_real(system.drift(y, t).to(y)), rtol, atol, TABLEAUS[name])


def _denoised(system: Any, solution: Solution, t: float) -> Solution:
    """The step to t = 0, if every sample came to t."""
    if not solution.success:
        return solution
    before = system.nfe
    x = system.denoise(solution.x, t)
    system.settle()
    more = system.nfe - before
    return replace(solution, x=x, nfe=solution.nfe + more, nfe_per_sample=solution.nfe_per_sample + more)


def _monotone(grid: Tensor | Sequence[float], system: System) -> Tensor:
    times = torch.as_tensor(grid, dtype=torch.float64, device="cpu")
    steps = times.diff()
    if times.ndim != 1 or times.numel() < 2 or not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise ValueError(f"grid must be at least two times, all increasing or all decreasing, got {times.tolist()[:8]}")
    low, high = system.interval
    # A float32 grid may lie a rounding beyond the ends.
    if times.min() < low - 1e-6 * abs(low) or times.max() > high + 1e-6 * abs(high):
        ends = f"[{float(times.min()):g}, {float(times.max()):g}]"
        zero = "; the step to 0 is the denoising, denoise=True: leave the 0 out" if times.min() == 0 < low else ""
        raise ValueError(f"grid must lie in [{low:g}, {high:g}] for {type(system).__name__}, got {ends}{zero}")
    if system.backwards_only and steps[0] > 0:
        raise ValueError(
            f"grid must decrease: a reverse SDE (churn = {system.churn:g}) only holds backwards in time; "
            "use the process itself to go forwards, or churn = 0"
        )
    return times.clamp(low, high)
