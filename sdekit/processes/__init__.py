"""Forward processes, each its alpha and its sigma, or drift and diffusion, and the reverse family of each."""

from sdekit.processes.affine import AffineSDE, BridgeSDE, ShiftedSDE
from sdekit.processes.correlated import CorrelatedSDE
from sdekit.processes.gaussian import VESDE, VPSDE, CosineVP, HeatODE, RectifiedFlow, SubVPSDE
from sdekit.processes.ito import ItoSDE
from sdekit.processes.poisson import PoissonFlow
from sdekit.processes.reverse import Reverse
from sdekit.processes.sde import SDE
from sdekit.processes.tables import BetaTable, SigmaTable

__all__ = [
    "SDE",
    "VESDE",
    "VPSDE",
    "AffineSDE",
    "BetaTable",
    "BridgeSDE",
    "CorrelatedSDE",
    "CosineVP",
    "HeatODE",
    "ItoSDE",
    "PoissonFlow",
    "RectifiedFlow",
    "Reverse",
    "ShiftedSDE",
    "SigmaTable",
    "SubVPSDE",
]
