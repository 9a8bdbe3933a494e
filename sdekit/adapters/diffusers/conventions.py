"""What a scheduler's config says of the model that it was made for: process, prediction, and the time told to it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from sdekit import _checks
from sdekit.processes.gaussian import HeatODE, RectifiedFlow
from sdekit.processes.sde import SDE
from sdekit.processes.tables import BetaTable

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow"}

# diffusers' classes by what their configs tell of a model. Others are of another kind of model (discrete states,
# consistency, cascades), or say nothing of a process.
TABLES = (
    "DDIMInverseScheduler", "DDIMParallelScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSDEScheduler", "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LMSDiscreteScheduler", "PNDMScheduler",
    "SASolverScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
FLOWS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
OWN = ("sampler", "grid", "calibration", "replaces")  # of the config of our scheduler


@dataclass(frozen=True)
class Convention:
    """The model that a scheduler is for.

    ``clock``: from the process's t to the scheduler's timestep, float64 tensors; ``time``: back; ``steps``: how many of
    these there are (a flow's are u times that). ``sigma_data``: of
    EDM's preconditioning, which diffusers leaves to the scheduler: its networks say F of

        D(x, sigma) = sigma_d^2/(sigma^2 + sigma_d^2) x + c_out F(x/sqrt(sigma^2 + sigma_d^2), log(sigma)/4),

    c_out = sigma sigma_d/sqrt(sigma^2 + sigma_d^2), with the sign ``sign``  (Karras et al. 2022, table 1).
    """

    sde: SDE
    predicts: str
    clock: Callable[[Tensor], Tensor]
    time: Callable[[Tensor], Tensor]
    steps: int = 1000
    sigma_data: float | None = None
    sign: float = 1.0

    @property
    def flow(self) -> bool:
        """Whether the model is a rectified flow."""
        return self.predicts == "flow"

    def by_level(self) -> "Convention":
        """A flow in the time u = sigma, that diffusers' schedulers of flows step in, whatever the shift."""
        return _in_noise(RectifiedFlow(), self.steps) if self.flow else self

    def precondition(self, sigma: Any) -> tuple[Any, Any, Any]:
        """EDM's c_in, c_skip and c_out."""
        d = self.sigma_data or 0.0
        square = sigma**2 + d**2
        return square**-0.5, d**2 / square, self.sign * sigma * d * square**-0.5


def parts(scheduler: Any) -> tuple[str, dict[str, Any]]:
    """(class, settings) of a scheduler or a config.

    Raises TypeError for what is neither; ValueError for other kinds of model, and for a config that does not name its
    class (one of a scheduler that was made by hand): several classes with the same settings are of different models.
    """
    config = getattr(scheduler, "config", scheduler)
    if not isinstance(config, Mapping):
        raise TypeError(f"scheduler must be one of diffusers' or its config, got {type(scheduler).__name__}")
    settings = {key: value for key, value in config.items() if not key.startswith("_") and key not in OWN}
    named = type(scheduler).__name__ if config is not scheduler else config.get("_class_name")
    name = config.get("replaces") or named
    if name is None:
        raise ValueError("this config does not say of which class it is ('_class_name'): give the scheduler itself")
    if name not in (*TABLES, *FLOWS, *EDMS):
        raise ValueError(f"scheduler {name} tells no process that is known here; {_KNOWN}")
    return name, settings


_KNOWN = f"known are {', '.join((*TABLES, *FLOWS, *EDMS))}"


def takes(name: str) -> set[str]:
    """The settings of diffusers' class of that name; none where it is not there."""
    kind = getattr(diffusers, name, None)
    return set() if kind is None else {*inspect.signature(kind.__init__).parameters} - {"self", "kwargs"}


def build(name: str, settings: Mapping[str, Any]) -> Any:
    """diffusers' scheduler of that class and those settings. Raises ValueError for settings that it refuses."""
    kind = getattr(diffusers, name, None)
    if kind is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {name}")
    try:
        return kind.from_config(dict(settings))
    except (NotImplementedError, ValueError) as error:
        said = f", beta_schedule {settings['beta_schedule']!r}" * ("beta_schedule" in settings)
        raise ValueError(f"{name} refuses the config{said}: {error}") from error


def convention(name: str, settings: Mapping[str, Any], mu: float | None = None) -> Convention:
    """The convention of a class's config.

    ``mu``: the log of the shift where this depends on the size of the image (use_dynamic_shifting). Raises ValueError
    for a prediction type or a schedule that is not known, and where mu is missing.
    """
    if name in EDMS:
        return _edm(name, settings)
    if name in FLOWS or settings.get("use_flow_sigmas"):
        return _flow(name, settings, mu)
    predicts = _prediction(name, settings, ("epsilon", "v_prediction", "sample"))
    if settings.get("timestep_type", "discrete") != "discrete":
        raise ValueError(f"timestep_type {settings['timestep_type']!r} of {name} is not known; 'discrete' is")
    # float32 products are what the models were trained with; where diffusers nudges zero terminal SNR it is 0 again
    square = build(name, settings).alphas_cumprod.double()
    if settings.get("rescale_betas_zero_snr"):  # which not all classes heed
        known = {key: settings[key] for key in takes("DDPMScheduler") & set(settings)}
        square = build("DDPMScheduler", known).alphas_cumprod.double()
        square[-1] = 0.0
    n = len(square)
    sde = BetaTable(1 - square / torch.cat([square.new_ones(1), square[:-1]]))
    return Convention(sde, predicts, partial(_index, n), partial(_of_index, n), n)


def _prediction(name: str, settings: Mapping[str, Any], known: tuple[str, ...]) -> str:
    said = settings.get("prediction_type", known[0])
    if said not in known:
        raise ValueError(f"prediction_type {said!r} of {name} is not known; known are {', '.join(known)}")
    return PREDICTIONS[said]


def _flow(name: str, settings: Mapping[str, Any], mu: float | None) -> Convention:
    if name not in FLOWS:
        _prediction(name, settings, ("flow_prediction",))
    for key in ("invert_sigmas", "stochastic_sampling"):
        if settings.get(key):
            raise ValueError(f"{key} of {name} is not known here: take a model whose noise is at sigma = 1")
    shift = settings.get("shift", settings.get("flow_shift", 1.0))
    if settings.get("use_dynamic_shifting"):
        if mu is None:
            raise ValueError(
                f"mu must be given: {name} shifts by the size of the image (use_dynamic_shifting), by "
                "base_shift ... max_shift over base_image_seq_len ... max_image_seq_len tokens; 0 is no shift"
            )
        mu = float(mu)
        linear = settings.get("time_shift_type", "exponential") == "linear"
        shift = mu if linear else float(torch.tensor(mu, dtype=torch.float64).exp())
    sde = RectifiedFlow(_checks.positive(shift, "shift"))
    sde.unit_level = sde.shift  # which grows with the pixels: so must the noise, to hide as much (Esser et al. 2024)
    return _in_noise(sde, settings.get("num_train_timesteps", 1000))


def _in_noise(sde: RectifiedFlow, n: int) -> Convention:
    return Convention(sde, "flow", partial(_noise, n, sde), partial(_of_noise, n, sde), n)


def _edm(name: str, settings: Mapping[str, Any]) -> Convention:
    _prediction(name, settings, ("epsilon", "v_prediction"))
    sde = HeatODE(T=float(settings.get("sigma_max", 80.0)))
    sde.t_min = float(settings.get("sigma_min", 0.002))
    sign = 1.0 if settings.get("prediction_type", "epsilon") == "epsilon" else -1.0
    data = _checks.positive(settings.get("sigma_data", 0.5), "sigma_data")
    return Convention(sde, "x0", _c_noise, _of_c_noise, sigma_data=data, sign=sign)


# The clocks, and back: functions of the module, so that scores can be pickled.


def _index(n: int, t: Tensor) -> Tensor:
    """The table's index, from 0: whole at its own times."""
    index = n * t - 1
    whole = index.round()
    return torch.where((index - whole).abs() < 1e-6, whole, index)


def _of_index(n: int, index: Tensor) -> Tensor:
    return (index.double() + 1) / n


def _noise(n: int, sde: SDE, t: Tensor) -> Tensor:
    return n * sde.sigma(t)


def _of_noise(n: int, sde: RectifiedFlow, told: Tensor) -> Tensor:
    u = told.double() / n
    return u / (sde.shift - (sde.shift - 1) * u)


def _c_noise(t: Tensor) -> Tensor:
    return t.log() / 4


def _of_c_noise(told: Tensor) -> Tensor:
    return torch.exp(4 * told.double())
