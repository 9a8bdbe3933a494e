"""diffusers' networks as scores."""

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import is_accelerate_available
from torch import Tensor, nn

from sdekit.adapters.diffusers.conventions import Convention, convention, parts
from sdekit.models.network import NetworkScore, as_score
from sdekit.processes.sde import SDE

# What flow networks are told of a scheduler's timestep 1000 u, as their pipelines do it. Others differ (u, 1 - u, the
# output's sign), so that there is no guessing.
THOUSANDS = ("UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel", "LTXVideoTransformer3DModel",
             "WanTransformer3DModel")  # fmt: skip
UNITS = ("FluxTransformer2DModel", "Flux2Transformer2DModel", "ChromaTransformer2DModel", "QwenImageTransformer2DModel")


def from_diffusers(
    model: Any,
    scheduler: Any,
    *,
    mu: float | None = None,
    time: Callable[[Tensor], Tensor] | None = None,
) -> tuple[SDE, NetworkScore]:
    """(process, score) of a network of diffusers and the scheduler, or its config, that it is used with.

    ``model``: UNet2DModel, UNet2DConditionModel, a DiT, SD3's or Flux's transformer, or what is called like these:
    ``model(x, timestep=..., **conditions)``. Its conditions: ``score.given(encoder_hidden_states=...)``; of an output
    of 2 C channels for C (learned variance) the first C, the mean, are taken. The process is the one that the config
    describes: the table of DDPM's betas (linear, scaled_linear, squaredcos_cap_v2, trained_betas; also
    rescale_betas_zero_snr) with a prediction of eps, v or x_0; a rectified flow and its shift; or EDM's, with its
    preconditioning. How the scheduler steps (its spacing, its order, clipping) is of no account: see
    :class:`Scheduler` for that.
    ``mu``: the log of the shift, where the scheduler takes it from the size of the image.
    ``time``: for flow networks of other classes than are known: what they are told, of the scheduler's timestep.

    Raises TypeError or ValueError for settings and classes that are not known, by name.
    """
    name, settings = parts(scheduler)
    made = convention(name, settings, mu)
    kind = type(model).__name__
    if not callable(model):
        raise TypeError(f"model must be a network, got {kind}")
    if time is not None and not callable(time):
        raise TypeError(f"time must be a function of the scheduler's timestep, got {time!r}")
    if made.flow and time is None and kind not in (*THOUSANDS, *UNITS):
        known = ", ".join((*THOUSANDS, *UNITS))
        raise ValueError(
            f"what a {kind} takes for the time of a flow is not known here ({known} are): give time=, the function of "
            "the scheduler's timestep (1000 u, noise at u = 1) that its pipeline applies, such as lambda t: t / 1000"
        )
    if made.flow and time is None and kind in UNITS:
        time = partial(torch.mul, other=1 / made.steps)
    clock: Any = made.clock if time is None else partial(_then, made.clock, time)
    if made.sigma_data is not None:
        clock = None  # the preconditioning takes sigma itself, and makes the network's clock of it
    return made.sde, as_score(_Called(model, made), made.sde, made.predicts, time=clock)


def load_folder(path: str | Path, device: torch.device | str | None = None) -> tuple[SDE, NetworkScore]:
    """(process, score) of a folder on disk, as ``save_pretrained`` of a pipeline, or of its parts, has written it.

    In it ``unet`` or ``transformer``, and ``scheduler``; the network is of the class that its config names, in
    evaluation mode, and ``score.event`` the shape of its items, where the config tells. Raises FileNotFoundError or
    ValueError for a folder that is none, and what :func:`from_diffusers` raises.
    """
    folder = Path(path)
    inside = [folder / name for name in ("unet", "transformer") if (folder / name / "config.json").is_file()]
    settings = folder / "scheduler" / "scheduler_config.json"
    if not inside or not settings.is_file():
        raise FileNotFoundError(f"{folder} must hold unet/ or transformer/, and scheduler/, as save_pretrained does")
    name = json.loads((inside[0] / "config.json").read_text(encoding="utf-8")).get("_class_name", "")
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ValueError(f"{inside[0]} is of class {name!r}, which is no network of diffusers {diffusers.__version__}")
    spare = is_accelerate_available()  # without it diffusers warns that it cannot
    with torch.random.fork_rng(devices=[]):  # without it it also draws first weights, which are not kept
        network = kind.from_pretrained(inside[0], low_cpu_mem_usage=spare)  # type: ignore[attr-defined]
    network = network.to(device or "cpu").eval()
    sde, score = from_diffusers(network, json.loads(settings.read_text(encoding="utf-8")))
    size = network.config.get("sample_size")
    if isinstance(size, int | list | tuple):
        score.event = (network.config.in_channels, *((size, size) if isinstance(size, int) else size))
    return sde, score


def _then(clock: Any, time: Any, t: Tensor) -> Tensor:
    return time(clock(t))


class _Called(nn.Module):
    """A network of diffusers, called as its pipelines do; under EDM's convention with the preconditioning.

    (The time of that is sigma: the network's own, log(sigma)/4, is made here.)
    """

    def __init__(self, model: Any, made: Convention) -> None:
        super().__init__()
        self._made = made if made.sigma_data is not None else None
        weights = model.parameters() if isinstance(model, nn.Module) else iter(())
        weight = next((w for w in weights if w.is_floating_point()), None)
        self._dtype = None if weight is None else weight.dtype
        if self._made is not None and weight is not None and weight.dtype.itemsize < 4:
            # The first weight says in which dtype x comes; at sigma = 80 bfloat16 has no digit of x_0 left.
            self.wide = nn.Parameter(torch.zeros((), device=weight.device), requires_grad=False)
        self.model = model
        takes = inspect.signature(model.forward if isinstance(model, nn.Module) else model).parameters
        any_name = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        self._plain = {"return_dict": False} if any_name or "return_dict" in takes else {}

    def forward(self, x: Tensor, time: Tensor, *unnamed: Any, **conditions: Any) -> Tensor:
        """The prediction, like x."""
        if unnamed:
            raise TypeError("conditions of a network of diffusers go by name: score.given(encoder_hidden_states=...)")
        if self._made is None:
            return self._said(x, time, conditions)
        sigma = time.reshape(-1, *(1,) * (x.ndim - 1))
        c_in, c_skip, c_out = self._made.precondition(sigma)
        said = self._said((c_in * x).to(self._dtype or x.dtype), self._made.clock(time), conditions)
        return (c_skip * x + c_out * said).to(x.dtype)

    def _said(self, x: Tensor, time: Tensor, conditions: dict[str, Any]) -> Tensor:
        out = self.model(x, timestep=time, **self._plain, **conditions)
        out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
        if isinstance(out, torch.Tensor) and x.ndim > 2 and out.shape[1] == 2 * x.shape[1]:
            return out[:, : x.shape[1]]
        return out
