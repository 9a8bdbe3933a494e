"""sdekit: SDE and ODE solvers for diffusion models, with any score, checked against closed forms."""

import sys

from sdekit import posterior
from sdekit.evaluation import check
from sdekit.evaluation.check import check_process, check_rule, check_score
from sdekit.evaluation.compare import compare
from sdekit.evaluation.comparison import Comparison
from sdekit.evaluation.report import Report
from sdekit.likelihood import (
    BitsPerDim,
    Likelihood,
    VariationalBound,
    bits_per_dim,
    log_likelihood,
    sample_with_log_prob,
    variational_bound,
)
from sdekit.models import GaussianMixture, PointSet, as_score, dynamic_threshold, guidance, static_threshold
from sdekit.noise import BrownianPath, Noise
from sdekit.pretrained import load_pretrained
from sdekit.processes import (
    SDE,
    VESDE,
    VPSDE,
    AffineSDE,
    BetaTable,
    BridgeSDE,
    CorrelatedSDE,
    CosineVP,
    HeatODE,
    ItoSDE,
    PoissonFlow,
    RectifiedFlow,
    Reverse,
    SigmaTable,
    SubVPSDE,
)
from sdekit.sampling import (
    GRIDS,
    SAMPLERS,
    Calibration,
    Sampler,
    calibrate,
    decode,
    encode,
    interpolate,
    load_calibration,
    ode_sample,
    pc_sample,
    round_trip_error,
    sample,
    sde_sample,
    slerp,
)
from sdekit.solvers import Solution, SolverError, StepRule, solve, step_rule
from sdekit.system import System

__version__ = "0.1.0"

# Two names of the surface are modules within a room: `from sdekit.guidance import classifier_free` finds them, too.
sys.modules.update({f"{__name__}.guidance": guidance, f"{__name__}.check": check})

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "SDE",
    "VESDE",
    "VPSDE",
    "AffineSDE",
    "BetaTable",
    "BitsPerDim",
    "BridgeSDE",
    "BrownianPath",
    "Calibration",
    "Comparison",
    "CorrelatedSDE",
    "CosineVP",
    "GaussianMixture",
    "HeatODE",
    "ItoSDE",
    "Likelihood",
    "Noise",
    "PointSet",
    "PoissonFlow",
    "RectifiedFlow",
    "Report",
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
    "check",
    "check_process",
    "check_rule",
    "check_score",
    "compare",
    "decode",
    "dynamic_threshold",
    "encode",
    "guidance",
    "interpolate",
    "load_calibration",
    "load_pretrained",
    "log_likelihood",
    "ode_sample",
    "pc_sample",
    "posterior",
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
