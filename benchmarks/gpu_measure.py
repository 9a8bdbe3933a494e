"""What gpu.py measures with: a device's clock, random networks, runs in turns, and how large everything is."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from sdekit import ode_sample, sample, sde_sample
from sdekit.training.networks import build

V = TypeVar("V")
NFE = 20
MOST_SECONDS = 10.0  # of the turns of one row: on a slow device there are fewer of them


class Scale(NamedTuple):
    """How large everything is."""

    network: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    trivial: tuple[tuple[int, ...], ...]  # of overhead's rows, which have no network
    steps: int  # of these, the longer run
    batch: int  # of training and of peak memory
    training: tuple[int, int]  # steps of the shorter and of the longer run
    turns: int
    compiler: str


FULL = Scale(
    {"width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2},
    ((16, 3, 32, 32), (4, 4, 64, 64)),
    ((1, 64), (64, 3, 32, 32)),
    64, 64, (10, 60), 7, "inductor",
)  # fmt: skip
SMALL = Scale(
    {"width": 8, "multipliers": (1, 2), "blocks": 1}, ((2, 3, 8, 8), (1, 4, 8, 8)), ((1, 16),), 8, 4, (1, 3), 1, "eager"
)


@dataclass(frozen=True)
class Setting:
    """Where and how large; ``cuda``: the device has a clock of its own, counts its memory and tells of waits."""

    device: torch.device
    cuda: bool
    scale: Scale
    seed: int

    def unet(self, channels: int) -> nn.Module:
        """A random U-Net on the device.

        Weights that training would start from zero are drawn as well, a third as large as keeps the variance: the
        adaptive methods then take about as many steps as for a trained network.
        """
        network = build("UNet", seed=self.seed, channels_in=channels, **self.scale.network).eval()
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for p in network.parameters():
                if p.ndim > 1 and not p.any():
                    p.copy_(torch.randn(p.shape, generator=generator) / (3 * math.sqrt(p[0].numel())))
        return network.to(self.device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normals on the device, the same on all."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(self.seed)).to(self.device)

    def wait(self) -> None:
        """Until the device has done what it was told."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """From the call to the result: the device is waited for at both ends, and nowhere between."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def repeat(self, measure: Callable[[], V]) -> list[V]:
        """Of a measurement as many turns as there is time for, at least one, after one that is left out."""
        measure()
        begin, found = time.perf_counter(), [measure()]
        while len(found) < self.scale.turns and time.perf_counter() - begin < MOST_SECONDS:
            found.append(measure())
        return found

    def pair(self, ours: Callable[[], object], other: Callable[[], object]) -> tuple[float, float, float]:
        """Median seconds of two runs that take turns, and the median over turns of the first to the second."""
        found = self.repeat(lambda: (self.seconds(ours), self.seconds(other)))
        a, b = (statistics.median(times) for times in zip(*found, strict=True))
        return a, b, statistics.median(x / y for x, y in found)


class Watched(nn.Module):
    """A network whose calls are marked at both ends, by ``mark()``."""

    def __init__(self, network: nn.Module, mark: Callable[[], Any]) -> None:
        super().__init__()
        self.network, self.mark, self.marks = network, mark, []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network says."""
        before = self.mark()
        out = self.network(x, t)
        self.marks.append((before, self.mark()))
        return out


def event() -> torch.cuda.Event:
    """A mark in the device's own queue, which nobody waits for."""
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def elapsed(before: Any, after: Any) -> float:
    return after - before if isinstance(before, float) else before.elapsed_time(after) / 1000


def calls(score: Any, shape: tuple[int, ...], s: Setting) -> dict[str, Callable[[], Tensor]]:
    """What is measured with a network, by name."""
    sde = score.sde
    return {
        **{
            f"sample {name} {NFE}": partial(sample, sde, score, shape, name, nfe=NFE, seed=s.seed)
            for name in ("dpmpp_2m", "unipc_2")
        },
        "ode_sample adams 1e-2": partial(
            ode_sample, sde, score, shape, method="adams", rtol=1e-2, atol=1e-2, seed=s.seed
        ),
        "sde_sample": partial(sde_sample, sde, score, shape, seed=s.seed),
    }


def size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
