"""Trained scores that come with the package."""

from importlib import resources

import torch

from sdekit import _checks
from sdekit.models.network import NetworkScore
from sdekit.processes.sde import SDE
from sdekit.training.checkpoint import load_checkpoint

PRETRAINED = {"digits": "digits.safetensors"}


def load_pretrained(name: str, device: torch.device | str | None = None) -> tuple[SDE, NetworkScore]:
    """(sde, score) of a bundled model, ready for any sampler.

    "digits": scikit-learn's 1797 digits, event (1, 8, 8) in [-1, 1], VPSDE, a U-Net of 0.7M weights
    (made by ``python -m sdekit.training.digits``). ``score.event``, ``score.data_range`` and ``score.levels`` tell the
    shape, the bounds and the number of grey values of the data. ``device``: where the weights go, the CPU unless given.
    Raises ValueError for an unknown name.
    """
    file = _checks.lookup(PRETRAINED, name, "pretrained model")
    with resources.as_file(resources.files("sdekit") / "assets" / file) as path:
        return load_checkpoint(path, device)
