"""From noise to samples and back: samplers by name, time grids, samplers fitted to a model, encoding."""

from sdekit.sampling.adaptive import ode_sample, sde_sample
from sdekit.sampling.asktell import AskTell
from sdekit.sampling.calibrate import calibrate
from sdekit.sampling.calibration import Calibration, load_calibration
from sdekit.sampling.encoding import decode, encode, interpolate, round_trip_error, slerp
from sdekit.sampling.fixed import pc_sample, sample
from sdekit.sampling.grids import GRIDS
from sdekit.sampling.samplers import SAMPLERS, Sampler
from sdekit.sampling.sensitivity import Sensitivity, sensitivity

__all__ = [
    "GRIDS",
    "SAMPLERS",
    "AskTell",
    "Calibration",
    "Sampler",
    "Sensitivity",
    "calibrate",
    "decode",
    "encode",
    "interpolate",
    "load_calibration",
    "ode_sample",
    "pc_sample",
    "round_trip_error",
    "sample",
    "sde_sample",
    "sensitivity",
    "slerp",
]
