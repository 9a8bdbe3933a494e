"""What the overhead is measured with: the bare loop, a thread's clock, runs in turns."""

import csv
import ctypes
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[], object]
Row = dict[str, Any]


def bare(d: Tensor, evaluations: int, draws: int) -> Run:
    """The loop that a sampler is measured by, on d's device."""
    generator = torch.Generator(d.device).manual_seed(0)
    drawn = [(k + 1) * draws // evaluations - k * draws // evaluations for k in range(evaluations)]

    def loop() -> Tensor:
        y = d
        for k in range(evaluations):
            y = 0.9 * y + (0.1 + k / evaluations) * d
            for _ in range(drawn[k]):
                y = y + 0.1 * torch.randn(d.shape, generator=generator, device=d.device)
        return y

    return loop


def seconds(run: Run) -> float:
    """Of this thread's own work, whatever else the machine does."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def keep_memory() -> None:
    """glibc: give nothing back to the kernel, and take no tensor from it directly."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another allocator
        return
    for option, value in ((-1, 2**30), (-3, 2**30)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        mallopt(option, value)


class Cost(NamedTuple):
    """Of an evaluation the ratio to the bare one, and seconds."""

    ratio: float
    seconds: float


def compare(base: Iterable[Run], runs: Iterable[tuple[Run, Run]], evaluations: list[int], turns: int) -> list[Cost]:
    """Of pairs, a short run and a long one, medians over turns; one is left out, and who begins moves on."""
    every, found = [tuple(base), *runs], []
    for turn in range(turns + 1):
        cost = [0.0] * len(every)
        for i in (i % len(every) for i in range(turn, turn + len(every))):
            short, long = map(seconds, every[i])
            cost[i] = (long - short) / (evaluations[1] - evaluations[0])
        if turn:
            found.append([Cost(one / cost[0], one) for one in cost[1:]])
    return [Cost(*map(statistics.median, zip(*costs, strict=True))) for costs in zip(*found, strict=True)]


def write(path: Path, rows: list[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
