"""EDM and EDM2 (Karras et al. 2022, 2024; NVlabs/edm, NVlabs/edm2): preconditioned denoisers.

Their convention: x = x_0 + sigma eps, and D(x, sigma, class_labels) is x_0; sigma_data and log(sigma)/4 are inside. So
alpha = 1, t = sigma and predicts = "x0", for every ``*Precond`` class of theirs, the VP and VE ones too.
Traps: class_labels are one-hot rows; labels (B,) would be reshaped to (-1, label_dim), and a network without classes
drops them without a word. EDM2 keeps float16 weights, and wants its state in float32 all the same. Their range says
what a network takes, 0 ... inf for EDM's own: where to start and stop is their sampler's 0.002 ... 80 within it.
Guidance by a weaker network (autoguidance) is ``weaker.lerp(D, w)``.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdekit import _checks
from sdekit.models.network import NetworkScore, as_score
from sdekit.processes.gaussian import HeatODE
from sdekit.processes.sde import SDE

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # of their samplers


def from_edm(
    network: Callable[..., Any],
    *,
    class_labels: Any = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
) -> tuple[SDE, NetworkScore]:
    """(process, model) of a preconditioned network D(x, sigma, class_labels=None, ...), such as ``pickle["ema"]``.

    ``class_labels``: whole numbers, 0-d or (B,), or their rows (B, label_dim); also later, by
    ``score.given(class_labels=...)``, as every other option of the network (``force_fp32=True``).
    ``sigma_min``, ``sigma_max``: t_min and T; unless given, what the network's own attributes leave of [0.002, 80].

    Raises TypeError for what is no callable, ValueError for levels that are none or leave nothing between them.
    """
    if not callable(network) or isinstance(network, type):
        raise TypeError(
            f"network must be a denoiser D(x, sigma), such as the 'ema' of an EDM pickle, got {_named(network)}"
        )
    low = max(SIGMA_MIN, _level(network, "sigma_min", 0.0)) if sigma_min is None else sigma_min
    high = min(SIGMA_MAX, _level(network, "sigma_max", math.inf)) if sigma_max is None else sigma_max
    sde = heat(low, high)
    score = as_score(_Denoiser(network), sde, "x0")
    return sde, score if class_labels is None else score.given(class_labels=class_labels)


def heat(sigma_min: float, sigma_max: float) -> HeatODE:
    """The process x_0 + t eps on [sigma_min, sigma_max]."""
    low, high = _checks.positive(sigma_min, "sigma_min"), _checks.positive(sigma_max, "sigma_max")
    if low >= high:
        raise ValueError(f"sigma_min must be smaller than sigma_max, got {low:g} and {high:g}; are they swapped?")
    sde = HeatODE(T=high)
    sde.t_min = low
    return sde


class _Denoiser(nn.Module):
    """The network, with labels as the rows that it takes."""

    def __init__(self, network: Callable[..., Any]) -> None:
        super().__init__()
        weights = network.parameters() if isinstance(network, nn.Module) else iter(())
        weight = next((w for w in weights if w.is_floating_point()), None)
        if weight is not None and weight.dtype.itemsize < 4:
            # The first weight says in which dtype a network takes x; at sigma = 80 float16 has one digit of x_0 left.
            self.wide = nn.Parameter(torch.zeros((), device=weight.device), requires_grad=False)
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Any = None, **options: Any) -> Any:
        if class_labels is None:
            return self.network(x, sigma, **options)
        classes, labels = int(getattr(self.network, "label_dim", 0)), torch.as_tensor(class_labels, device=x.device)
        if not classes:
            raise ValueError("class_labels were given, and the network has no classes: its label_dim is 0 or missing")
        if labels.ndim == 2:
            labels = labels.to(sigma.dtype)
        elif not labels.is_floating_point():
            labels = nn.functional.one_hot(labels.long().expand(x.shape[0]), classes).to(sigma.dtype)
        return self.network(x, sigma, labels, **options)


def _level(network: Any, name: str, default: float) -> float:
    level = getattr(network, name, default)
    return float(default if level is None else level)


def _named(y: Any) -> str:
    return f"the class {y.__name__}" if isinstance(y, type) else type(y).__name__
