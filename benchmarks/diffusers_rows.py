"""diffusers' own schedulers on a network of the bench, each with its own grid, as its pipelines run them.

The scheduler is made for the network's process: from the table alpha(t)^2 at 1,000 times for eps and v, with the same
shift for a flow, with the same sigmas for EDM's x_0. The network is told the time that the scheduler's step is at. All
start from the same noise as ours and take one evaluation a step but Heun, which takes two.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdekit import SDE
from sdekit.models.network import NetworkScore

TABLE = 1000

# name -> class, settings
DISCRETE: dict[str, tuple[str, dict[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}),
    "DDIM trailing": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M trailing": ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "UniPC karras": ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
    "DEIS": ("DEISMultistepScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
}
FLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "Heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "UniPC": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "DEIS": ("DEISMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}
EDM: dict[str, tuple[str, dict[str, Any]]] = {
    "Euler": ("EDMEulerScheduler", {}),
    "DPM++ 2M": ("EDMDPMSolverMultistepScheduler", {}),
    "DPM++ 2M exponential": ("EDMDPMSolverMultistepScheduler", {"sigma_schedule": "exponential"}),
}
FAMILIES = {"eps": DISCRETE, "v": DISCRETE, "flow": FLOW, "x0": EDM}


def names(predicts: str) -> list[str]:
    """The rows for a network that predicts this."""
    return list(FAMILIES[predicts])


def run(name: str, sde: SDE, score: NetworkScore, x_T: Tensor, nfe: int) -> Tensor:
    """Samples by the scheduler of that name, from x_T, a draw at T, in at most ``nfe`` evaluations."""
    import diffusers

    kind, settings = FAMILIES[score.predicts][name]
    make = partial_of(getattr(diffusers, kind), settings)
    steps = (nfe + 1) // 2 if "Heun" in name else nfe
    drive = {"flow": _flow, "x0": _edm}.get(score.predicts, _discrete)
    return drive(make, sde, score, x_T, steps)


def partial_of(make: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
    """The scheduler's class with what is set in the row, and more."""
    return lambda **more: make(**settings, **more)


def _discrete(make: Callable[..., Any], sde: SDE, score: NetworkScore, x_T: Tensor, steps: int) -> Tensor:
    square = sde.alpha(torch.arange(1, TABLE + 1, dtype=torch.float64) / TABLE).square()
    betas = 1 - square / torch.cat([square.new_ones(1), square[:-1]])
    prediction = {"eps": "epsilon", "v": "v_prediction"}[score.predicts]
    scheduler = make(trained_betas=betas.tolist(), prediction_type=prediction)
    if (
        square[-1] == 0
    ):  # what diffusers itself does to zero terminal SNR, without which Euler's first sigma is infinite
        scheduler.alphas_cumprod[-1] = 2**-24
    scheduler.set_timesteps(steps)
    x = x_T * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = score.output(scheduler.scale_model_input(x, t).to(x_T.dtype), (t.double() + 1) / TABLE)
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


def _flow(make: Callable[..., Any], sde: SDE, score: NetworkScore, x_T: Tensor, steps: int) -> Tensor:
    shift = float(sde.shift)  # type: ignore[attr-defined]
    try:
        scheduler = make(shift=shift)
    except TypeError:
        scheduler = make(flow_shift=shift)
    scheduler.set_timesteps(steps)
    x = x_T
    for t in scheduler.timesteps:
        u = (t.double() / TABLE).clamp_max(1.0)
        out = score.output(x, u / (shift - (shift - 1) * u))
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


def _edm(make: Callable[..., Any], sde: SDE, score: NetworkScore, x_T: Tensor, steps: int) -> Tensor:
    scheduler = make(sigma_max=float(sde.T), sigma_min=float(sde.t_min))
    scheduler.set_timesteps(steps)
    x, d = x_T, scheduler.config.sigma_data
    for t, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        x_0 = score.output(x, s.double())
        # EDM's network output: x_0 = c_skip x + c_out output
        c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2) ** 0.5
        scheduler.scale_model_input(x, t)
        x = scheduler.step((x_0 - c_skip * x) / c_out, t, x, return_dict=False)[0]
    return x
