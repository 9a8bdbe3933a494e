"""A training run on disk: all that the next step depends on, in safetensors and JSON; nothing in it is executed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdekit.training import checkpoint
from sdekit.training.checkpoint import LOSSES, read_tensors, write_tensors
from sdekit.training.ema import EMA
from sdekit.training.settings import changes

FORMAT = "sdekit-run-1"
_KEPT = 2  # files: the newest, and one to fall back on

Read = tuple[Path, dict[str, Any], dict[str, Tensor]]  # a file, what it says of itself, its tensors


def states(folder: Path) -> list[Path]:
    """The saved states of a run, oldest first."""
    return sorted(path for path in folder.glob("state-*.safetensors") if path.is_file())


def save_state(
    folder: Path,
    step: int,
    network: nn.Module,
    average: EMA,
    optimizer: torch.optim.Optimizer,
    losses: Tensor,
    settings: dict[str, Any],
) -> None:
    """The state after ``step``, as a file of its own; of those before, one is kept."""
    tensors = {f"network.{name}": w for name, w in network.state_dict().items()}
    tensors |= {f"average.{name}": w for name, w in average.network.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in entries.items()}
    tensors[LOSSES] = losses
    path = folder / f"state-{step:09d}.safetensors"
    write_tensors(path, tensors, FORMAT, {"step": step, "settings": settings})
    for old in [state for state in states(folder) if state <= path][:-_KEPT]:  # a later one could not be read
        old.unlink()


def load_state(
    folder: Path,
    network: nn.Module,
    average: EMA,
    optimizer: torch.optim.Optimizer,
    settings: dict[str, Any],
    change: Sequence[str] = (),
) -> tuple[int, Tensor, list[str]]:
    """(step, losses, what to say of it) of the newest state in the folder that can be read, which the three take on;
    (0, none, ...) where there is no state. ``settings["init"]``, which is of the beginning, becomes the run's own.

    Raises ValueError where none of the files can be read, and for settings that differ from the run's and are not named
    in ``change``.
    """
    read, said = _newest(folder)
    if read is None:
        changes(settings, settings, change, str(folder))
        return 0, torch.zeros(0), [f"no state in {folder} to go on from, so the run begins"]
    path, about, tensors = read
    then = about.get("settings", {})
    settings["init"] = settings.get("init") or then.get("init")
    said += changes(then, settings, change, str(folder))
    try:
        for part, module in (("network.", network), ("average.", average.network)):
            module.load_state_dict({k.removeprefix(part): w for k, w in tensors.items() if k.startswith(part)})
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                entries.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})
        average.updates = step = int(about["step"])
        losses = tensors[LOSSES]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no state of this network: {error}") from error
    if step > settings["steps"]:
        raise ValueError(f"steps must be at least {step}, which the run in {folder} has done; got {settings['steps']}")
    return step, losses, said


def begin(network: nn.Module, init: str | os.PathLike[str]) -> str:
    """Give ``network`` the weights of a file of ``save_checkpoint``, or the averaged ones of a run's folder.

    Returns what they predicted. Raises FileNotFoundError where there are none, ValueError for another network's.
    """
    path = Path(init)
    if path.is_dir():
        read, _ = _newest(path)
        if read is None:
            raise FileNotFoundError(f"init must be a checkpoint or a run's folder, and {path} has no state")
        path, about, tensors = read
        about, part = about.get("settings", {}), "average."
        weights = {name.removeprefix(part): w for name, w in tensors.items() if name.startswith(part)}
    else:
        about, weights = read_tensors(path, checkpoint.FORMAT)
    own = network.state_dict()
    pairs = {name: (_shape(weights, name), _shape(own, name)) for name in sorted(own.keys() | weights.keys())}
    other = [f"{name} {there} (here {here})" for name, (there, here) in pairs.items() if there != here]
    if other:
        more = f", and {len(other) - 3} more" if len(other) > 3 else ""
        raise ValueError(
            f"init {path} has the weights of another network: {', '.join(other[:3])}{more}; build this one as that was"
        )
    network.load_state_dict(weights)
    return str(about.get("predicts"))


def _shape(weights: dict[str, Tensor], name: str) -> str:
    return str(tuple(weights[name].shape)) if name in weights else "nowhere"


def _newest(folder: Path) -> tuple[Read | None, list[str]]:
    """The newest state that can be read, or None where there is no file, and what is to be said of those after it."""
    found = states(folder)
    said: list[str] = []
    for path in reversed(found):
        try:
            return (path, *read_tensors(path, FORMAT)), said
        except ValueError as error:
            said.append(f"left aside, {error}")
    if found:
        raise ValueError(
            f"no state in {folder} can be read: {'; '.join(said)}. Begin a run in another folder, from the last "
            "checkpoint of this one by init= (--init)"
        )
    return None, said
