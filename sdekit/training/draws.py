"""What training draws at random, each a function of seed, step and place in the batch.

So a run that stops goes on as if it had not, and the processes of a distributed run draw one batch together: each makes
all of its numbers and keeps its own.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from sdekit import _checks
from sdekit.processes.kinds import BLIND, zero_signal
from sdekit.processes.sde import SDE
from sdekit.training.distributed import Ranks


class Draws:
    """The numbers of one step after another, for this process's part of the batch."""

    def __init__(self, seed: int, batch: int, ranks: Ranks, device: torch.device) -> None:
        if batch % ranks.world:
            raise ValueError(f"batch must divide among the {ranks.world} processes, got {batch}")
        self.seed, self.batch, self.device = seed, batch, device
        own = batch // ranks.world
        self.own = slice(ranks.rank * own, (ranks.rank + 1) * own)
        self.generator = torch.Generator(device)

    def enter(self, step: int) -> None:
        """The draws that follow are those of this step, from its first on."""
        self.generator.manual_seed(_key(self.seed, "step", step))

    def levels(self) -> Tensor:
        """u (b,) in [0, 1), float64: a uniform shift of an even grid over the batch (Kingma et al. 2021, app. I.1)."""
        u = torch.rand(1, generator=self.generator, device=self.device, dtype=torch.float64)
        return ((u + torch.arange(self.batch, dtype=u.dtype, device=u.device) / self.batch) % 1)[self.own]

    def uniform(self) -> Tensor:
        """(b,) in [0, 1), independent."""
        return torch.rand(self.batch, generator=self.generator, device=self.device)[self.own]

    def normal(self, like: Tensor) -> Tensor:
        """Standard normals like ``like`` (b, *event)."""
        shape = (self.batch, *like.shape[1:])
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=like.dtype)[self.own]


class Order(Sampler[list[int]]):
    """Which data the steps ``first`` ... ``last`` see: all once in a random order, then all in another, and so on."""

    def __init__(self, n: int, draws: Draws, first: int, last: int) -> None:
        self.n, self.draws, self.steps = n, draws, range(first, last + 1)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[int]]:
        shuffled, order = -1, torch.zeros(0)
        for step in self.steps:
            place, end = ((step - 1) * self.draws.batch + k for k in (self.draws.own.start, self.draws.own.stop))
            chosen: list[int] = []
            while place < end:
                epoch, offset = divmod(place, self.n)
                if epoch != shuffled:
                    generator = torch.Generator().manual_seed(_key(self.draws.seed, "order", epoch))
                    shuffled, order = epoch, torch.randperm(self.n, generator=generator)
                chosen += order[offset : offset + end - place].tolist()
                place = min(end, (epoch + 1) * self.n)
            yield chosen


def lognormal(sde: SDE, mean: float = -1.2, std: float = 1.2) -> Callable[[Tensor], Tensor]:
    """u (B,) -> t with log(sigma/alpha) ~ N(mean, std^2), cut off at the ends (Karras et al. 2022, table 1).

    From a table of 4,097 quantiles: within one of the 4,096 parts t is uniform.
    """
    _checks.positive(std, "std")
    low, high = (-float(sde.half_log_snr(t)) for t in (sde.t_min, sde.T))
    ends = torch.special.ndtr((torch.tensor([low, high], dtype=torch.float64) - mean) / std).tolist()

    parts = 4096
    quantiles = torch.linspace(ends[0], ends[1], parts + 1, dtype=torch.float64)
    log_r = (mean + std * torch.special.ndtri(quantiles)).clamp(low, high)
    table = sde.inverse_half_log_snr(-log_r).clamp(sde.t_min, sde.T)

    def times(u: Tensor) -> Tensor:
        nodes, place = table.to(u), u * parts
        k = place.long()
        return torch.lerp(nodes[k], nodes[k + 1], place - k)

    return times


def tabled(sde: SDE) -> Callable[[Tensor], Tensor]:
    """u (B,) -> each of ``sde.times`` alike: of a process with a table, BetaTable or SigmaTable."""
    nodes = getattr(sde, "times", None)
    if nodes is None:
        raise ValueError(
            f"times 'table' needs a process with a table (BetaTable, SigmaTable), got {type(sde).__name__}"
        )
    return lambda u: nodes.to(u)[(u * len(nodes)).long()]


# How times lie in [t_min, T], by name: of a process, a function from u in [0, 1) to t.
TIMES: dict[str, Callable[[SDE], Callable[[Tensor], Tensor]]] = {
    "uniform": lambda sde: lambda u: sde.t_min + (sde.T - sde.t_min) * u,
    "lognormal": lognormal,
    "table": tabled,
}


def doubts(
    sde: Any, predicts: str, times: Callable[[Tensor], Tensor] | None, std: float = 1.0, mean: float = 0.0
) -> list[str]:
    """What is likely to end in wrong samples without a word, of data of this standard deviation and mean."""
    if not hasattr(sde, "alpha"):
        return []
    found = []
    top = float(torch.exp(-sde.half_log_snr(sde.T)))
    if predicts in BLIND and not math.isfinite(top):
        found.append(zero_signal(sde, predicts))
    if std > 8 or 0 < std < 0.05 or abs(mean) > 8:  # of one number it is NaN, and nothing is said
        found.append(
            f"the data's mean is {mean:.3g} and their standard deviation {std:.3g}, and processes and networks are "
            "made for about 0 and 1: scale the data, and the samples back"
        )
    elif times is not None:  # those of the caller's own are nobody else's, and may know his batch
        found += _missed(sde, predicts, times, std if std > 0 else 1.0, top)
    return found


def _missed(sde: SDE, predicts: str, times: Callable[[Tensor], Tensor], std: float, top: float) -> list[str]:
    found = []
    t = times((torch.arange(2048, dtype=torch.float64) + 0.5) / 2048)
    r = torch.exp(-sde.half_log_snr(t))
    share = float(((r > 0.03 * std) & (r < 3 * std)).double().mean())
    if share < 0.1:
        found.append(
            f"only {share:.1%} of the times are at levels sigma/alpha that hide a part of the data, which here are "
            f"{0.03 * std:.2g} to {3 * std:.2g}: times='lognormal' draws them there"
        )
    if predicts in BLIND and math.isfinite(top) and float((r > top / 8).double().mean()) < 0.01:
        found.append(
            f"a network that predicts {predicts} is hardly shown the levels near {top:.3g}, where its error counts "
            "that many times in x_0, and samplers begin: predict v or x0"
        )
    return found


def _key(seed: int, purpose: str, number: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=7).digest(), "little")
