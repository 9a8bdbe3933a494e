"""guided-diffusion, improved-diffusion and DiT (openai, facebookresearch): tables of betas, and 2 C channels.

Their convention: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps for t = 0 ... N - 1, where t = 0 has one step of noise:
it is i - 1 for our time i/N, so alpha^2 = abar and the model is told N t - 1; between the table's times it is told the
fraction, which its sinusoids take. Conditions: ``score.given(y=labels)``.
Traps: with learned variance the model returns 2 C channels, the mean first; the rest is the variance of their own
chain, which no other sampler asks for. A respaced diffusion has other betas and a map of times: the model is of the
whole table. ``rescale_timesteps`` tells it 1000/N of the place.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.models.network import NetworkScore, as_score
from sdekit.processes.sde import SDE
from sdekit.processes.tables import BetaTable


def linear(steps: int) -> Tensor:
    """DDPM's line from 1e-4 to 0.02, scaled by 1000/N  (Ho et al. 2020)."""
    return torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)


def cosine(steps: int) -> Tensor:
    """1 - abar_{i+1}/abar_i <= 0.999 with abar = cos^2(pi/2 (t + 0.008)/1.008)  (Nichol & Dhariwal 2021, eq. 17)."""
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    bar = torch.cos(math.pi / 2 * (t + 0.008) / 1.008).square()
    return (1 - bar[1:] / bar[:-1]).clamp_max(0.999)


BETAS: dict[str, Callable[[int], Tensor]] = {"linear": linear, "cosine": cosine}
# ModelMeanType -> what is predicted
MEANS = {"EPSILON": "eps", "START_X": "x0"}


def from_guided_diffusion(
    model: Callable[..., Any],
    betas: Any = "linear",
    *,
    steps: int = 1000,
    predicts: str = "eps",
    rescale_timesteps: bool = False,
) -> tuple[SDE, NetworkScore]:
    """(process, model) of ``model(x, t, **conditions)``, with or without learned variance.

    ``betas``: a name in ``BETAS`` ("linear", "cosine") for a table of ``steps``, the betas (N,) themselves, or the
    ``diffusion`` that their ``create_model_and_diffusion`` or ``create_diffusion`` made, which brings everything else.
    ``predicts``: "eps", "x0" (their predict_xstart), or what a fork's model says ("v").

    Raises ValueError for an unknown name, a respaced diffusion, one whose model predicts the mean of x_{t-1}.
    """
    if hasattr(betas, "model_mean_type"):
        mean = betas.model_mean_type
        predicts = _checks.lookup(MEANS, getattr(mean, "name", mean), "model_mean_type")
        kept, whole = len(betas.betas), getattr(betas, "original_num_steps", len(betas.betas))
        if kept != whole:
            raise ValueError(
                f"betas is a diffusion respaced to {kept} of {whole} steps, and a sampler here chooses its own: "
                'create it with timestep_respacing=""'
            )
        betas, rescale_timesteps = betas.betas, bool(getattr(betas, "rescale_timesteps", False))
    elif isinstance(betas, str):
        betas = _checks.lookup(BETAS, betas, "beta schedule")(_checks.count(steps, "steps", minimum=2))
    sde = BetaTable(betas)
    n = len(sde.betas)
    clock = partial(_index, n=n, scale=1000 / n if rescale_timesteps else 1.0)
    return sde, as_score(model, sde, predicts, time=clock, output="mean")


def _index(t: Tensor, n: int, scale: float) -> Tensor:
    """What the model is told at t: the place in its table, from 0."""
    return (n * t - 1) * scale
