"""sdekit: SDE and ODE solvers for diffusion models, with any score, checked against closed forms."""

from sdekit.adaptive_samplers import ode_sample, sde_sample
from sdekit.bits import BitsPerDim, bits_per_dim
from sdekit.bound import VariationalBound, variational_bound
from sdekit.brownian import BrownianPath
from sdekit.calibrate import calibrate
from sdekit.calibration import Calibration, load_calibration
from sdekit.encoding import decode, encode, interpolate, round_trip_error, slerp
from sdekit.grids import GRIDS
from sdekit.likelihood import Likelihood, log_likelihood, sample_with_log_prob
from sdekit.mixture import GaussianMixture
from sdekit.noise import Noise
from sdekit.pretrained import load_pretrained
from sdekit.processes import VESDE, VPSDE, HeatODE, SubVPSDE
from sdekit.reverse import Reverse
from sdekit.samplers import SAMPLERS, Sampler, pc_sample, sample
from sdekit.score import as_score
from sdekit.sde import SDE
from sdekit.solution import Solution, SolverError
from sdekit.solve import solve
from sdekit.steppers import StepRule, step_rule
from sdekit.system import System
from sdekit.tables import BetaTable, SigmaTable
from sdekit.thresholding import dynamic_threshold, static_threshold

__version__ = "0.1.0"

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "SDE",
    "VESDE",
    "VPSDE",
    "BetaTable",
    "BitsPerDim",
    "BrownianPath",
    "Calibration",
    "GaussianMixture",
    "HeatODE",
    "Likelihood",
    "Noise",
    "Reverse",
    "Sampler",
    "SigmaTable",
    "Solution",
    "SolverError",
    "StepRule",
    "SubVPSDE",
    "System",
    "VariationalBound",
    "as_score",
    "bits_per_dim",
    "calibrate",
    "decode",
    "dynamic_threshold",
    "encode",
    "interpolate",
    "load_calibration",
    "load_pretrained",
    "log_likelihood",
    "ode_sample",
    "pc_sample",
    "round_trip_error",
    "sample",
    "sample_with_log_prob",
    "sde_sample",
    "slerp",
    "solve",
    "static_threshold",
    "step_rule",
    "variational_bound",
]
