"""Several processes, as ``torchrun`` starts them: who this one is, and what they do together."""

import os
from typing import NamedTuple

import torch
from torch import Tensor, distributed


class Ranks(NamedTuple):
    """The number of this process and how many there are: (0, 1) without ``torch.distributed``."""

    rank: int
    world: int

    @classmethod
    def here(cls) -> "Ranks":
        """Of the process group that is set up now."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return cls(0, 1)
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def first(self) -> bool:
        """True for the one that prints and writes."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
            values /= self.world
        return values

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            distributed.barrier()


def join(device: str | None = None) -> torch.device:
    """The device to work on, ``device`` or cuda where there is one, and the group of ``torchrun``'s environment joined.

    Processes that ``torchrun`` started take a GPU each (nccl), or the CPU (gloo) where there are fewer GPUs than they
    are. Raises ValueError for a device that PyTorch does not know or have.
    """
    here = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "LOCAL_RANK" in os.environ:
        local, world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        if here == "cuda" and torch.cuda.device_count() >= world:
            here = f"cuda:{local}"
            torch.cuda.set_device(local)
        elif device is None:
            here = "cpu"
        distributed.init_process_group("nccl" if here.startswith("cuda") else "gloo")
    try:
        return torch.empty(0, device=here).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {here!r} cannot be used: {str(error).splitlines()[0]}") from error


def leave() -> None:
    """Leave the group, if any."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
