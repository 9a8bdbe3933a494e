"""Other libraries' deterministic samplers on a given list of noise levels, for peers.py and order.py.

Everything is in the frame  y = x0 + s eps : ``run(denoise, y, levels)`` takes y at levels[0] to levels[-1], which may
be 0, and ``denoise(y, s)`` is E[x0|y]. What was set in each library, so that all solve the same problem:

diffusers: ``set_timesteps`` is called for the counts, then its noise levels are replaced by the given ones in float64
(its own are float32, and UniPC, DEIS, Heun, LMS and DDIM offer none that start at 80). DPM-Solver++, Euler, Heun and
LMS work in this frame; UniPC, DEIS, DDIM and IPNDM in the variance-preserving one, y/sqrt(1 + s^2). The denoiser is
handed over in each one's own parameterisation. The step to level 0 is the scheduler's own, except for UniPC and DEIS:
it is the denoised value by their first-order formula, but bh1 and DEIS come to 0 * inf there; the value is used.
IPNDM has order 4 only, with the coefficients of equal steps, whatever the levels are. EDMEulerScheduler computes in
float32. torchdiffeq: Euler, midpoint and RK4 on  dy/ds = (y - E[x0|y])/s  with the given levels as its times, then
the denoised value as the step to 0; in log s they are worse by far at these counts. Its adaptive solver and torchode's
only know the first and the last positive level. azula: its VESchedule between the ends of the levels, and the times
at which that has them; its samplers take the logarithm of each level, so the step to 0 is the denoised value.

Not here: k-diffusion, whose modules import torchvision; diffusers' SA-Solver and SDE samplers, which draw noise; its
PNDM, which warms up by Runge-Kutta at levels between the given ones; of azula, what is its DDIM again: Euler, Ito
without noise, PC without noise (at twice the evaluations), and order 1 of zAB, vAB, zEAB and xEAB.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]

EXTRA = 'pip install -e ".[peers]"'
# package -> how to get it
PACKAGES = {
    **dict.fromkeys(("diffusers", "torchdiffeq", "torchode", "torchsde"), EXTRA),
    "azula": "pip install --no-deps azula==0.11.1 einops (it pulls torchvision otherwise)",
}
EXCLUDED = "k-diffusion has no rows: its modules import torchvision, which is never installed here"


@dataclass(frozen=True)
class Peer:
    """A sampler of another package: its evaluations per step, and the order that its authors claim."""

    package: str
    run: Callable[[Denoiser, Tensor, Tensor], Tensor]
    evaluations: int = 1
    order: int = 1


def available(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def missing() -> list[str]:
    """One line for each package that is not installed, and how to get it."""
    gone = [name for name in PACKAGES if not available(name)]
    return [f"{name} is not installed, its rows are missing: {PACKAGES[name]}" for name in gone]


def _schedulers() -> Any:
    import diffusers

    return diffusers


def _prepared(scheduler: Any, levels: Tensor) -> Any:
    """A diffusers scheduler at its first step, with the given levels (and its own last one where they end at 0)."""
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = levels
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True  # the denoiser scales its input itself
    return scheduler


def _last(levels: Tensor) -> str:
    return "zero" if levels[-1] == 0 else "sigma_min"


def dpmpp(order: int, **settings: Any) -> Callable[[Denoiser, Tensor, Tensor], Tensor]:
    def run(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
        make = _schedulers().EDMDPMSolverMultistepScheduler
        scheduler = _prepared(make(solver_order=order, final_sigmas_type=_last(levels), **settings), levels)
        c = scheduler.config.sigma_data**2
        for s, t in zip(levels[:-1], scheduler.timesteps, strict=True):
            # EDM's network output: denoised = c_skip y + c_out output
            c_skip, c_out = c / (s**2 + c), s * (c / (s**2 + c)) ** 0.5
            y = scheduler.step((denoise(y, s) - c_skip * y) / c_out, t, y, return_dict=False)[0]
        return y

    return run


def _preserving(make: Callable[[Tensor], Any]) -> Callable[[Denoiser, Tensor, Tensor], Tensor]:
    """A multistep scheduler in the variance-preserving frame that takes the denoised value."""

    def run(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
        scheduler = _prepared(make(levels), levels)
        alpha = (1 + levels**2).rsqrt()
        for i, t in enumerate(scheduler.timesteps):
            denoised = denoise(y, levels[i])
            if levels[i + 1] == 0:
                return denoised
            y = scheduler.step(denoised, t, alpha[i] * y, return_dict=False)[0] / alpha[i + 1]
        return y

    return run


def unipc(order: int, variant: str) -> Callable[[Denoiser, Tensor, Tensor], Tensor]:
    # Lower orders at the end are for the step to 0; elsewhere they would cap the order.
    return _preserving(
        lambda levels: _schedulers().UniPCMultistepScheduler(
            solver_order=order, solver_type=variant, prediction_type="sample", lower_order_final=bool(levels[-1] == 0)
        )
    )


def deis(order: int) -> Callable[[Denoiser, Tensor, Tensor], Tensor]:
    return _preserving(
        lambda levels: _schedulers().DEISMultistepScheduler(solver_order=order, prediction_type="sample")
    )


def ddim(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
    """DDIM looks its levels up in a table, so the table is made of the given ones: one training time per level."""
    n = len(levels) - 1
    scheduler = _schedulers().DDIMScheduler(num_train_timesteps=n, clip_sample=False, prediction_type="sample")
    squares = 1 / (1 + levels**2)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = squares[:-1].flip(0), squares[-1]
    scheduler.set_timesteps(n)
    alpha = squares.sqrt()
    for i, t in enumerate(scheduler.timesteps):
        y = scheduler.step(denoise(y, levels[i]), int(t), alpha[i] * y, return_dict=False)[0] / alpha[i + 1]
    return y


def ipndm(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
    """Its network predicts v = alpha eps - sigma x0; its betas are the variance-preserving sigmas."""
    scheduler = _schedulers().IPNDMScheduler()
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.set_begin_index(0)
    alpha = (1 + levels**2).rsqrt()
    sigma = levels * alpha
    scheduler.alphas, scheduler.betas = alpha, sigma
    for i, t in enumerate(scheduler.timesteps):
        denoised = denoise(y, levels[i])
        v = alpha[i] * (y - denoised) / levels[i] - sigma[i] * denoised
        y = scheduler.step(v, t, alpha[i] * y, return_dict=False)[0] / alpha[i + 1]
    return y


def edm_euler(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
    scheduler = _prepared(_schedulers().EDMEulerScheduler(), levels)
    for s, t in zip(levels[:-1], scheduler.timesteps, strict=True):
        y = scheduler.step(y, t, y, pred_original_sample=denoise(y, s), return_dict=False)[0]
    return y


def heun(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
    """Two evaluations a step, one in the step to 0. It keeps the inner levels twice, as its own set_timesteps does."""
    scheduler = _prepared(_schedulers().HeunDiscreteScheduler(prediction_type="sample"), levels)
    inner = levels[1:-1] if levels[-1] == 0 else levels[1:]
    scheduler.sigmas = torch.cat([levels[:1], inner.repeat_interleave(2), levels[-1:]])
    for s in scheduler.sigmas[:-1]:
        y = scheduler.step(denoise(y, s), None, y, return_dict=False)[0]
    return y


def lms(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
    scheduler = _prepared(_schedulers().LMSDiscreteScheduler(prediction_type="sample"), levels)
    for s, t in zip(levels[:-1], scheduler.timesteps, strict=True):
        y = scheduler.step(denoise(y, s), t, y, return_dict=False)[0]
    return y


def azula_sampler(
    name: str, mean: Denoiser, schedule: Any, times: Tensor, **settings: Any
) -> Callable[[Tensor], Tensor]:
    """A sampler of azula at the given times, with ``mean(x, t)`` as its denoiser."""
    from azula import denoise, sample

    class Network(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = schedule

        def forward(self, x: Tensor, t: Tensor) -> Any:
            return denoise.DiracPosterior(mean(x, t))

    kind = type(name, (getattr(sample, name),), {"timesteps": times})  # there it is a property, of equal steps
    return kind(Network(), silent=True, **settings)


def azula(name: str, **settings: Any) -> Callable[[Denoiser, Tensor, Tensor], Tensor]:
    def run(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
        from azula.noise import VESchedule

        log, positive = levels[levels > 0].log(), levels[levels > 0]
        schedule = VESchedule(sigma_min=float(positive[-1]), sigma_max=float(positive[0]))
        times = (log - log[-1]) / (log[0] - log[-1]) if len(log) > 1 else torch.ones_like(log)
        sampler = azula_sampler(name, lambda x, t: denoise(x, schedule.sigma(t)), schedule, times, **settings)
        with torch.random.fork_rng(devices=[]):  # DDIM draws noise to multiply it by 0
            out = sampler(y)
        return denoise(out, positive[-1]) if levels[-1] == 0 else out

    return run


def torchdiffeq_fixed(method: str) -> Callable[[Denoiser, Tensor, Tensor], Tensor]:
    """The levels are torchdiffeq's times; where they end at 0, that step is the denoising."""

    def run(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
        import torchdiffeq

        times = levels[levels > 0]
        out = torchdiffeq.odeint(lambda s, z: (z - denoise(z, s)) / s, y, times, method=method)[-1]
        return denoise(out, times[-1]) if levels[-1] == 0 else out

    return run


def torchdiffeq_adaptive(tolerance: float, log: bool) -> Callable[[Denoiser, Tensor, Tensor], Tensor]:
    """Dormand-Prince from the first positive level to the last, the whole batch in one step size, then denoising."""

    def run(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
        import torchdiffeq

        ends = levels[levels > 0][[0, -1]]

        def in_s(s: Tensor, z: Tensor) -> Tensor:
            s = s.clamp(ends[1], ends[0])  # its last step goes beyond the end, where there is no process
            return (z - denoise(z, s)) / s

        def in_log_s(u: Tensor, z: Tensor) -> Tensor:
            return z - denoise(z, u.exp().clamp(ends[1], ends[0]))

        rhs, times = (in_log_s, ends.log()) if log else (in_s, ends)
        out = torchdiffeq.odeint(rhs, y, times, rtol=tolerance, atol=tolerance, method="dopri5")[-1]
        return denoise(out, ends[-1]) if levels[-1] == 0 else out

    return run


def torchode_adaptive(method: str, tolerance: float) -> Callable[[Denoiser, Tensor, Tensor], Tensor]:
    """A step size per sample, in log s. The network sees the whole batch until the last sample has arrived."""

    def run(denoise: Denoiser, y: Tensor, levels: Tensor) -> Tensor:
        import torchode

        start, end = (float(s) for s in levels[levels > 0][[0, -1]])
        term = torchode.ODETerm(lambda u, z: z - denoise(z, u.exp().clamp(end, start)))
        stepper = {"dopri5": torchode.Dopri5, "tsit5": torchode.Tsit5}[method](term=term)
        controller = torchode.IntegralController(atol=tolerance, rtol=tolerance, term=term)
        first, last = (torch.full((len(y),), math.log(s), dtype=y.dtype) for s in (start, end))
        problem = torchode.InitialValueProblem(y0=y, t_start=first, t_end=last)
        solution = torchode.AutoDiffAdjoint(stepper, controller).solve(problem)
        if (solution.status != 0).any():
            raise RuntimeError(f"torchode {method} gave up at tolerance {tolerance:g}")
        out = solution.ys[:, -1]
        return denoise(out, y.new_tensor(end)) if levels[-1] == 0 else out

    return run


FIXED: dict[str, Peer] = {
    "diffusers DPM++ 2M": Peer("diffusers", dpmpp(2), order=2),
    "diffusers DPM++ 2M heun": Peer("diffusers", dpmpp(2, solver_type="heun"), order=2),
    "diffusers DPM++ 3M": Peer("diffusers", dpmpp(3), order=3),
    **{
        f"diffusers UniPC {variant} {order}": Peer("diffusers", unipc(order, variant), order=order + 1)
        for variant in ("bh1", "bh2")
        for order in (2, 3)
    },
    "diffusers DEIS 2": Peer("diffusers", deis(2), order=2),
    "diffusers DEIS 3": Peer("diffusers", deis(3), order=3),
    "diffusers IPNDM": Peer("diffusers", ipndm, order=4),
    "diffusers LMS 4": Peer("diffusers", lms, order=4),
    "diffusers Heun": Peer("diffusers", heun, evaluations=2, order=2),
    "diffusers EDM Euler": Peer("diffusers", edm_euler),
    "diffusers DDIM": Peer("diffusers", ddim),
    "azula DDIM": Peer("azula", azula("DDIMSampler")),
    "azula Heun": Peer("azula", azula("HeunSampler"), evaluations=2, order=2),
    **{
        f"azula {name}{order}": Peer("azula", azula(f"{name}Sampler", order=order), order=order)
        for name in ("zAB", "vAB", "zEAB", "xEAB", "REAB")
        for order in (2, 3, 4)
    },
    "torchdiffeq euler": Peer("torchdiffeq", torchdiffeq_fixed("euler")),
    "torchdiffeq midpoint": Peer("torchdiffeq", torchdiffeq_fixed("midpoint"), evaluations=2, order=2),
    "torchdiffeq rk4": Peer("torchdiffeq", torchdiffeq_fixed("rk4"), evaluations=4, order=4),
}
# method -> tolerance -> its run
ADAPTIVE: dict[str, tuple[str, Callable[[float], Callable[[Denoiser, Tensor, Tensor], Tensor]]]] = {
    "torchdiffeq dopri5": ("torchdiffeq", lambda tolerance: torchdiffeq_adaptive(tolerance, log=False)),
    "torchdiffeq dopri5 in log s": ("torchdiffeq", lambda tolerance: torchdiffeq_adaptive(tolerance, log=True)),
    "torchode dopri5 in log s": ("torchode", lambda tolerance: torchode_adaptive("dopri5", tolerance)),
    "torchode tsit5 in log s": ("torchode", lambda tolerance: torchode_adaptive("tsit5", tolerance)),
}
