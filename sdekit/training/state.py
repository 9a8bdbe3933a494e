"""A training run on disk: all that the next step depends on, in safetensors and JSON; nothing in it is executed."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdekit.training.checkpoint import read_tensors, write_tensors
from sdekit.training.ema import EMA

FORMAT = "sdekit-run-1"
_KEPT = 2  # files: the newest, and one to fall back on


def states(folder: Path) -> list[Path]:
    """The saved states of a run, oldest first."""
    return sorted(folder.glob("state-*.safetensors"))


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
    tensors["losses"] = losses
    write_tensors(folder / f"state-{step:09d}.safetensors", tensors, FORMAT, {"step": step, "settings": settings})
    for old in states(folder)[:-_KEPT]:
        old.unlink()


def load_state(
    folder: Path, network: nn.Module, average: EMA, optimizer: torch.optim.Optimizer, settings: dict[str, Any]
) -> tuple[int, Tensor]:
    """(step, losses) of the newest state in the folder, which the three take on; (0, none) where there is none.

    Raises ValueError for a file that is truncated or foreign, and for settings that differ from the run's.
    """
    found = states(folder)
    if not found:
        return 0, torch.zeros(0)
    newest = found[-1]
    try:
        about, tensors = read_tensors(newest, FORMAT)
    except ValueError as error:
        hint = f"; delete it to go on from {found[-2].name}" if len(found) > 1 else ""
        raise ValueError(f"{error}{hint}") from error
    then = about.get("settings", {})
    changed = [name for name in then.keys() | settings.keys() if then.get(name) != settings.get(name)]
    if changed:
        was = ", ".join(f"{name} = {then.get(name)!r} (now {settings.get(name)!r})" for name in sorted(changed))
        raise ValueError(f"{newest} is of a run with {was}; resume it with the same, or choose another folder")
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
        return step, tensors["losses"]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{newest} is no state of this network: {error}") from error
