"""score_sde (Song et al. 2021; yang-song/score_sde_pytorch): noise-conditional networks of the VP, sub-VP and VE SDEs.

Their convention, in t in [0, 1] as ours: x = alpha x_0 + sigma eps, model(x, labels).
VP, sub-VP: labels = 999 t, and score = -model/sigma: the model says eps. Of a discrete VP model (``continuous=False``)
labels are the places 0 ... N - 1 in the table of betas.
VE: the model says the score itself (configs with scale_by_sigma divide within), and labels = sigma(t); of a discrete VE
model they are whole places in the table of sigmas, 0 for the *largest*.
Traps: the two signs; sigma as the label, which the model takes the logarithm of; ``config.data.centered = False`` (VE):
data in [0, 1], not in [-1, 1]; their samplers stop at t = 1e-3 (VP, sub-VP), ours at the process's t_min = 1e-5 (VP).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.models.network import NetworkScore, as_score
from sdekit.processes.gaussian import VESDE, VPSDE, SubVPSDE
from sdekit.processes.sde import SDE
from sdekit.processes.tables import BetaTable, SigmaTable

# name, theirs in lower case -> ours, and what (first, last) of its rates or levels is called there
NAMES: dict[str, tuple[type[SDE], tuple[str, str]]] = {
    "vpsde": (VPSDE, ("beta_0", "beta_1")),
    "subvpsde": (SubVPSDE, ("beta_0", "beta_1")),
    "vesde": (VESDE, ("sigma_min", "sigma_max")),
}


def from_score_sde(
    model: Callable[..., Any], sde: Any = "vpsde", *, continuous: bool = True
) -> tuple[SDE, NetworkScore]:
    """(process, model) of their ``model(x, labels)``.

    ``sde``: "vpsde", "subvpsde" or "vesde" (``config.training.sde``) with the usual constants, their object of that
    class (of ``beta_0``, ``beta_1``, ``sigma_min``, ``sigma_max``, ``N``), or ours, which is taken as it is.
    ``continuous``: ``config.training.continuous``; False for the models of a table of N noise levels (1000 unless sde
    says otherwise).

    Raises ValueError for another name or class, and for a discrete sub-VP model, of which they have none.
    """
    if isinstance(sde, str):
        name = sde.lower().removesuffix("sde") + "sde"
    elif isinstance(sde, type):
        raise TypeError(f"sde must be a process or a name, not its class: {sde.__name__}(), got {sde.__name__}")
    else:
        bases = [base.__name__.lower() for base in type(sde).__mro__]
        name = next((base for base in bases if base in NAMES), type(sde).__name__)
    ours, ends = _checks.lookup(NAMES, name, "sde")
    process: Any = sde if hasattr(sde, "half_log_snr") else ours(*_ends(sde, ends))
    if continuous:
        said, clock = ("score", process.sigma) if name == "vesde" else ("eps", _999)
        return process, as_score(model, process, said, time=clock)
    n = _checks.count(getattr(sde, "N", 1000), "sde.N", minimum=2)
    if name == "vpsde":
        low, high = process.beta_min / n, process.beta_max / n
        table: SDE = BetaTable(torch.linspace(low, high, n, dtype=torch.float64))
        return table, as_score(model, table, "eps", time=partial(_place, n=n))
    if name == "vesde":
        low, high = math.log(process.sigma_min), math.log(process.sigma_max)
        table = SigmaTable(torch.linspace(low, high, n, dtype=torch.float64).exp())
        return table, as_score(model, table, "score", time=partial(_place_from_top, n=n))
    raise ValueError("continuous=False goes with vpsde and vesde; a sub-VP model is told 999 t: continuous=True")


def _ends(sde: Any, names: tuple[str, str]) -> list[float]:
    """The process's constants; none for a name, which has the usual ones."""
    if isinstance(sde, str):
        return []
    missing = [name for name in names if not hasattr(sde, name)]
    if missing:
        raise ValueError(f"sde is a {type(sde).__name__} without {' and '.join(missing)}, which score_sde's has")
    return [float(getattr(sde, name)) for name in names]


def _999(t: Tensor) -> Tensor:
    return 999 * t


def _place(t: Tensor, n: int) -> Tensor:
    return n * t - 1


def _place_from_top(t: Tensor, n: int) -> Tensor:
    return (n - n * t).round().long()
