"""The model that a command is about."""

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from sdekit.models.guidance import classifier_free
from sdekit.models.network import NetworkScore
from sdekit.processes.sde import SDE
from sdekit.training.checkpoint import load_checkpoint


def load_model(path: Path, device: Any = None) -> tuple[SDE, NetworkScore]:
    """(process, score) of a checkpoint of ours, or of a folder that diffusers wrote."""
    if not path.is_dir():
        return load_checkpoint(path, device)
    from sdekit.adapters.diffusers import load_folder  # not everybody has diffusers

    return load_folder(path, device)


def conditioned(score: NetworkScore, options: argparse.Namespace) -> Any:
    """The model of --label, at the scale --guidance. ValueError where the checkpoint's network does not know of these.

    A network that has never been without its labels still has the first weights, zeros, of the label for none.
    """
    network, label, scale = score.network, options.label, options.guidance
    assert isinstance(network, nn.Module)
    classes: int = getattr(network, "classes", 0)
    if label is not None and not 0 <= label < classes:
        hint = "" if classes else "; sdekit train --conditional makes a model that knows labels"
        raise ValueError(f"--label must be one of {options.checkpoint}'s {classes} classes, got {label}{hint}")
    if label is None and scale is not None:
        raise ValueError("--guidance is towards a label: give --label too")
    if classes and (label is None or scale is not None):
        none = next(w for name, w in network.named_parameters() if name.endswith("time.vectors.weight"))[classes]
        if not none.any():
            way = "give --label" if label is None else "leave --guidance out"
            raise ValueError(
                f"{options.checkpoint} was never trained without labels: {way}, or train one with --label-drop 0.1"
            )
    if label is None:
        return score
    return score.given(label) if scale is None else classifier_free(score, label, classes, scale)


def require_score(score: Any, path: Path) -> None:
    """Raise ValueError for a checkpoint of a classifier."""
    if not hasattr(score, "given"):
        raise ValueError(f"{path} holds a classifier, which guides a score and is none: name a score's checkpoint")


def event_of(score: NetworkScore, path: Path) -> tuple[int, ...]:
    """The shape of an item. Raises ValueError for a checkpoint that does not tell, or of a classifier."""
    require_score(score, path)
    if score.event is None:
        raise ValueError(f"{path} does not say the shape of its data; save it with event=")
    return score.event
