"""The times of the scheduler that is replaced, by its own formula, as times of the process."""

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdekit.adapters.diffusers.conventions import Convention

HOST = "host"  # the name of this grid


def told_by_pipelines(sigmas: Sequence[float], n: int) -> bool:
    """Whether these are what pipelines of flow models pass where the user has said nothing."""
    return len(sigmas) == n and bool(np.allclose(np.asarray(sigmas, dtype=float), np.linspace(1, 1 / n, n), atol=1e-6))


def host_times(
    host: Any,
    made: Convention,
    n: int,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    mu: float | None,
) -> tuple[Tensor, dict[float, float], bool]:
    """(times, what the network is told at each, whether the last step is to t = 0).

    Time and level are apart: levels come from the scheduler's sigmas, and what it tells the network from its
    timesteps, which some schedulers round. Its last step to a level above 0 (set_alpha_to_one=False) is a step to that;
    one that leads nowhere (from sigma_min to sigma_min) is the one to 0. Raises ValueError for times that do not
    decrease, of another number than n, or that the scheduler does not take.
    """
    takes, name = inspect.signature(host.set_timesteps).parameters, type(host).__name__
    chosen: dict[str, Any] = {}
    for key, value in (("timesteps", timesteps), ("sigmas", sigmas)):
        if value is None:
            continue
        if key not in takes or made.sigma_data is not None:  # EDM's "sigmas" are numbers from 0 to 1
            raise ValueError(f"{name} takes no {key}: leave them out, or replace a scheduler that does")
        listed = [float(v) for v in value]
        if made.flow and len(listed) == n + 1 and listed[-1] == 0:  # the step to 0 comes by itself
            listed = listed[:-1]
        if any(b >= a for a, b in pairwise(listed)):
            raise ValueError(f"{key} must decrease, from noise to data; got {listed[:4]} ...")
        if len(listed) != n and not (key == "sigmas" and len(listed) == n + 1 and listed[-1] == 0):
            raise ValueError(f"{key} must be as many as num_inference_steps = {n}, got {len(listed)}")
        chosen[key] = listed
    if made.flow and "timesteps" in chosen:  # as the network is told them: no shift comes on top
        told = torch.tensor(chosen["timesteps"], dtype=torch.float64)
        times = made.time(told)
        made.sde.t_min = min(made.sde.t_min, float(times[-1]))
        return times, dict(zip(times.tolist(), told.tolist(), strict=True)), True
    if not chosen:
        chosen["num_inference_steps"] = n
    if mu is not None and "mu" in takes and host.config.get("use_dynamic_shifting"):
        chosen["mu"] = mu
    host.set_timesteps(**chosen)
    told = host.timesteps.double().cpu()
    if getattr(host, "sigmas", None) is None:  # DDIM's kind: the levels are those of the table
        told = torch.unique_consecutive(told)
        times, last = made.time(told), float(getattr(host, "final_alpha_cumprod", 1.0))
        to_zero = last == 1 or told[-1] == 0
        if not to_zero:
            times = torch.cat([times, times.new_tensor([made.sde.t_min])])
    else:
        levels = torch.as_tensor(host.sigmas).double().cpu()
        new = torch.cat([torch.ones(1, dtype=torch.bool), levels[1:] != levels[:-1]])  # those of two stages are twice
        told, last, levels = told[new[:-1]], float(levels[-1]), levels[new]
        to_zero = last == 0 or not new[-1]
        times = _of_levels(made, levels[: len(told) + (not to_zero)])
        near = (made.clock(times[: len(told)]) - told).abs() < 1e-3  # the same, but for float32
        if made.sigma_data is None and not made.flow:
            times[: len(told)] = torch.where(near, made.time(told), times[: len(told)])
    if "sigmas" in chosen and len(told) != n:
        raise ValueError(f"{name} makes {len(told)} evaluations of these times, not {n}: its sigmas end with a 0")
    if len(times) > 1 and bool((times.diff() >= 0).any()):
        raise ValueError(f"the times of {name} do not decrease: {times.tolist()[:6]} ...")
    made.sde.t_min = min(made.sde.t_min, float(times[-1]))
    return times, dict(zip(times.tolist(), told.tolist(), strict=False)), bool(to_zero)


def _of_levels(made: Convention, sigmas: Tensor) -> Tensor:
    """The process's times at a scheduler's sigmas: sigma/alpha of a table and EDM, u of a flow."""
    if made.flow:
        return made.time(made.steps * sigmas)
    sde = made.sde
    first, last = (sde.half_log_snr(torch.tensor(t, dtype=torch.float64)) for t in (sde.T, sde.t_min))
    lam = -sigmas.log()
    if bool((lam < first - 1e-3).any()) or bool((lam > last + 1e-3).any()):
        ends = f"{float(torch.exp(-last)):.4g} ... {float(torch.exp(-first)):.4g}"
        raise ValueError(f"sigmas must be levels of the model's table, {ends}; got {sigmas.tolist()[:6]} ...")
    return sde.inverse_half_log_snr(lam.clamp(first, last)).clamp(sde.t_min, sde.T)
