"""Training by denoising score matching, and the files that hold what was trained."""

from sdekit.training.checkpoint import load_checkpoint, save_checkpoint
from sdekit.training.ema import EMA
from sdekit.training.networks import MLP, UNet, build
from sdekit.training.trainer import Trained, train

__all__ = ["EMA", "MLP", "Trained", "UNet", "build", "load_checkpoint", "save_checkpoint", "train"]
