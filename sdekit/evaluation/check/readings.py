"""How a network may be read: of which process, on which clock, as which prediction, of which data."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit.evaluation.check.probe import own_clock
from sdekit.processes.gaussian import VPSDE, CosineVP, HeatODE, RectifiedFlow, SubVPSDE
from sdekit.processes.sde import SDE
from sdekit.processes.tables import BetaTable

N = 1000  # the steps that the clocks of discrete models count, where no table says

# The processes of the models that are about: the name under which each is reported, and how it is made.
PROCESSES: dict[str, Callable[[], SDE]] = {
    "VPSDE() (DDPM's linear betas)": VPSDE,
    "BetaTable of Stable Diffusion's betas (linear in the root, .00085 ... .012)": lambda: BetaTable(
        torch.linspace(0.00085**0.5, 0.012**0.5, N, dtype=torch.float64).square()
    ),
    "CosineVP()": CosineVP,
    "RectifiedFlow()": RectifiedFlow,
    "HeatODE() (x_0 + sigma eps)": HeatODE,
    "SubVPSDE()": SubVPSDE,
}


class Clock(NamedTuple):
    """What a network is told of t: its name, (model, process, t) -> that, and the code for ``as_score(..., time=)``."""

    name: str
    at: Callable[[Any, Any, Tensor], Tensor]
    code: str
    shift: int = 0  # steps that the model's own clock is moved by


OWN = Clock("the clock as it is", lambda model, sde, t: own_clock(model, t), "")
LEVELS = (
    Clock("sigma", lambda _, sde, t: sde.sigma(t), "sde.sigma"),
    Clock("sigma/alpha", lambda _, sde, t: sde.sigma(t) / sde.alpha(t), "lambda t: sde.sigma(t) / sde.alpha(t)"),
    Clock("log(sigma/alpha)", lambda _, sde, t: -sde.half_log_snr(t), "lambda t: -sde.half_log_snr(t)"),
    Clock("log(sigma/alpha)/4 (EDM's c_noise)", lambda _, sde, t: -sde.half_log_snr(t) / 4,
          "lambda t: -sde.half_log_snr(t) / 4"),
    Clock("log-SNR/2", lambda _, sde, t: sde.half_log_snr(t), "sde.half_log_snr"),
    Clock("log-SNR", lambda _, sde, t: 2 * sde.half_log_snr(t), "lambda t: 2 * sde.half_log_snr(t)"),
    Clock("log-SNR/4", lambda _, sde, t: sde.half_log_snr(t) / 2, "lambda t: sde.half_log_snr(t) / 2"),
    Clock("alpha (the root of alphas_cumprod)", lambda _, sde, t: sde.alpha(t), "sde.alpha"),
    Clock("alpha^2 (alphas_cumprod)", lambda _, sde, t: sde.alpha(t) ** 2, "lambda t: sde.alpha(t) ** 2"),
)  # fmt: skip


def steps_of(sde: SDE) -> int:
    """Those of its table; 1000 of a process that has none."""
    times = getattr(sde, "times", None)
    return len(times) if isinstance(times, Tensor) else N


def clocks(sde: SDE) -> list[Clock]:
    """Those that networks of a process are told: its time, and that in steps, and levels of noise."""
    found = [Clock("t", lambda _, sde, t: t, "None"), Clock("T - t (time that runs to the data)",
             lambda _, sde, t: sde.T - t, "lambda t: sde.T - t")]  # fmt: skip
    for n in {N: None, steps_of(sde): None}:
        found += [
            Clock(f"{n} t", partial(_counted, n, 0), f"lambda t: {n} * t / sde.T"),
            Clock(f"{n - 1} t", partial(_counted, n - 1, 0), f"lambda t: {n - 1} * t / sde.T"),
            Clock(f"{n} t - 1 (a table's index from 0)", partial(_counted, n, -1),
                  f"lambda t: ({n} * t / sde.T - 1).clamp_min(0)"),
            Clock(f"{n} t + 1", partial(_counted, n, 1), f"lambda t: {n} * t / sde.T + 1"),
            Clock(f"{n} (T - t)", partial(_counted, -n, n), f"lambda t: {n} * (1 - t / sde.T)"),
        ]  # fmt: skip
    return [*found, *LEVELS]


def shifts(sde: SDE) -> list[Clock]:
    """The own clock off by a step of the process's table, either way."""
    n = steps_of(sde)
    return [
        Clock(f"as given, one step of {n} {way}", partial(_shifted, k / n),
              f"lambda t: clock((t {sign} sde.T / {n}).clamp(0, sde.T))", k)
        for k, way, sign in ((1, "later", "+"), (-1, "earlier", "-"))
    ]  # fmt: skip


def _counted(times: int, plus: int, model: Any, sde: SDE, t: Tensor) -> Tensor:
    """t/T in steps."""
    return (times * t / sde.T + plus).clamp_min(0.0)


def _shifted(by: float, model: Any, sde: SDE, t: Tensor) -> Tensor:
    return own_clock(model, (t + by * sde.T).clamp(0.0, sde.T))


class Transform(NamedTuple):
    """What may have been done to the data before training, and not here; the name ends "it was trained on ..."."""

    name: str
    forward: Callable[[Tensor], Tensor]


RANGES = {"[-1, 1]": (-1.0, 1.0), "[0, 1]": (0.0, 1.0), "[0, 255]": (0.0, 255.0)}


def transforms(data: Tensor) -> list[Transform]:
    """Those that the data allow: their range, their scale, their sign, the order of channels and axes."""
    low, high = float(data.min()), float(data.max())
    mean, std = float(data.mean()), float(data.std())
    found = []
    for name, (a, b) in RANGES.items():
        slack = 0.02 * (b - a)
        if a - slack <= low and high <= b + slack and low < 0.3 * b + 0.7 * a and high > 0.7 * b + 0.3 * a:
            for other, (c, d) in RANGES.items():
                if other != name:
                    told = f"data in {other}, and these are in {name}"
                    found.append(Transform(told, partial(_affine, scale=(d - c) / (b - a), first=a, to=c)))
            break
    if abs(mean) > 0.05 * std or abs(std - 1) > 0.05:
        told = f"these data less their mean, {mean:.3g}, and over their spread, {std:.3g}"
        found.append(Transform(told, partial(_affine, scale=1 / std, first=mean)))
    found.append(Transform("these data times -1", partial(_affine, scale=-1.0)))
    if data.ndim == 4 and data.shape[1] in (3, 4):
        order = [2, 1, 0, *range(3, data.shape[1])]
        found.append(Transform("these data with the channels in the order 2, 1, 0 (BGR)", lambda x: x[:, order]))
    if data.ndim >= 3 and data.shape[-1] == data.shape[-2]:
        found.append(Transform("these data with the last two axes swapped", lambda x: x.mT.contiguous()))
    for k in FACTORS:
        found += [Transform(f"these data times {y:.5g}", partial(_affine, scale=y)) for y in (k, 1 / k)]
    return found


FACTORS = (0.18215, 0.13025, 0.5)  # latents of Stable Diffusion 1 and XL; data of unit size taken for half of it


def _affine(x: Tensor, *, scale: float, first: float = 0.0, to: float = 0.0) -> Tensor:
    return to + (x - first) * scale


@dataclass(frozen=True)
class Reading:
    """A process, a clock, a prediction and its factor, and what the data were; None is what the model was given as."""

    predicts: str
    factor: float = 1.0
    clock: Clock = OWN
    process: str | None = None
    transform: Transform | None = None

    def changes(self, own: str) -> int:
        """In how many ways this is not what the model was given as."""
        return sum((
            self.predicts != own, self.factor != 1.0, self.clock != OWN, self.process is not None,
            2 * (self.transform is not None),
        ))  # fmt: skip

    def __str__(self) -> str:
        factor = "" if self.factor == 1 else "minus " if self.factor == -1 else f"{1 / self.factor:.3g} times "
        text = f"it predicts {factor}{self.predicts}"
        text += "" if self.clock == OWN else f" on the clock {self.clock.name}"
        text += "" if self.process is None else f" of {self.process}"
        return text if self.transform is None else f"{text}, and was trained on {self.transform.name}"
