"""Training scores, and the files that hold what was trained."""

from sdekit.training.checkpoint import load_checkpoint, save_checkpoint
from sdekit.training.config import Config
from sdekit.training.data import Data, load_data
from sdekit.training.ema import EMA
from sdekit.training.networks import MLP, Classifier, Preconditioned, UNet, build
from sdekit.training.objectives import (
    OBJECTIVES,
    classification,
    denoising,
    explicit,
    finite_difference,
    implicit,
    sliced,
    variational,
)
from sdekit.training.trainer import Trained, train

__all__ = [
    "EMA",
    "MLP",
    "OBJECTIVES",
    "Classifier",
    "Config",
    "Data",
    "Preconditioned",
    "Trained",
    "UNet",
    "build",
    "classification",
    "denoising",
    "explicit",
    "finite_difference",
    "implicit",
    "load_checkpoint",
    "load_data",
    "save_checkpoint",
    "sliced",
    "train",
    "variational",
]
