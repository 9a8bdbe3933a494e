"""Other libraries' loops beside overhead.py's: their steps as they come, with a network that is free."""

from functools import partial
from typing import Any

import overhead
import peer_samplers
import torch
from overhead_measure import Row, Run
from torch import Tensor

DIFFUSERS_STEPS = {  # the pipelines' schedulers, as they come
    "diffusers DDIM": "DDIMScheduler",
    "diffusers DPM++ 2M": "DPMSolverMultistepScheduler",
    "diffusers UniPC": "UniPCMultistepScheduler",
}
AZULA_STEPS = {"azula DDIM": ("DDIMSampler", {}), "azula xEAB2": ("xEABSampler", {"order": 2})}
COLUMNS = ("eps", overhead.WORST, overhead.SUMS)  # that are shown
PEER_LOOPS = (*DIFFUSERS_STEPS, *AZULA_STEPS, "torchdiffeq euler", "torchsde euler")


def scheduler_loop(scheduler: Any, d: Tensor, steps: int) -> Run:
    """The steps of a diffusers scheduler whose network is free."""

    def loop() -> Tensor:
        scheduler.set_timesteps(steps)
        y = d
        for t in scheduler.timesteps:
            y = scheduler.step(d, t, y, return_dict=False)[0]
        return y

    return loop


def azula_loop(name: str, d: Tensor, steps: int) -> Run:
    """A whole run, coefficients included. Its DDIM draws the noise that it then multiplies by zero."""
    from azula.noise import VPSchedule

    kind, settings = AZULA_STEPS[name]
    times = torch.linspace(1, 0, steps + 1)
    sampler = peer_samplers.azula_sampler(kind, lambda x, t: d, VPSchedule(), times, **settings)
    return lambda: sampler(d)


def torchdiffeq_loop(d: Tensor, steps: int) -> Run:
    import torchdiffeq

    times = torch.linspace(0, 1, steps + 1)
    return lambda: torchdiffeq.odeint(lambda t, y: d, d, times, method="euler")


def torchsde_loop(d: Tensor, steps: int) -> Run:
    import torchsde

    flat = d.reshape(len(d), -1)
    system = torchsde.SDEIto("diagonal")
    system.f, system.g = (lambda t, y: flat), (lambda t, y: flat)
    return lambda: torchsde.sdeint(system, flat, torch.tensor([0.0, 1.0]), method="euler", dt=1 / steps)


def peer_loop(name: str, d: Tensor, steps: int) -> dict[str, Run]:
    """The loop of a row of PEER_LOOPS, which has one prediction."""
    if name.startswith("diffusers"):
        import diffusers

        return {overhead.WORST: scheduler_loop(getattr(diffusers, DIFFUSERS_STEPS[name])(), d, steps)}
    if name.startswith("azula"):
        return {overhead.WORST: azula_loop(name, d, steps)}
    return {overhead.WORST: (torchsde_loop if name.startswith("torchsde") else torchdiffeq_loop)(d, steps)}


def overhead_rows(turns: int, quick: bool) -> list[Row]:
    """The cost of an evaluation beside the network, ours and theirs, as ratios to overhead.py's bare loop."""
    rows = [row._replace(name=f"sdekit {row.name}") for row in overhead.rows()]
    for name in PEER_LOOPS:
        if peer_samplers.available(name.split()[0]):
            noisy = name.startswith("torchsde")
            rows.append(overhead.Loop(name, lambda n, noisy=noisy: (n, n * noisy), partial(peer_loop, name)))
    return [overhead.measure(row, turns, shorter=10 if quick else 1) for row in rows]
