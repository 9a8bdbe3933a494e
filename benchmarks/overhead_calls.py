"""What a call of ten evaluations costs beside its network: overhead.py's second table, whose protocol stands there."""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from overhead_measure import Row, keep_memory, seconds
from tables import markdown

from sdekit import (
    SAMPLERS,
    VPSDE,
    BetaTable,
    GaussianMixture,
    HeatODE,
    as_score,
    calibrate,
    load_calibration,
    sample,
)

SHAPE = (1, 64)
NFE = 10  # of a call
PROCESSES: dict[str, Callable[[], Any]] = {
    "VPSDE": VPSDE,
    "BetaTable": lambda: BetaTable(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)),  # DDPM's
    "HeatODE": HeatODE,
}


def called() -> list[str]:
    """The samplers of the second table: the deterministic ones of one evaluation a step, and three more."""
    one = [name for name, row in SAMPLERS.items() if row.rule.evaluations == 1 and not row.stochastic]
    return one + [name for name in ("heun", "dpm_solver_2", "sa_solver") if name in SAMPLERS]


def loaded(process: str) -> Any:
    """A calibration read back from its file. What it was fitted to, and how well, has no part in what it costs."""
    sde, data = PROCESSES[process](), GaussianMixture(torch.zeros(1, 4), torch.eye(4)[None])
    fitted = calibrate(sde, data.score(sde), (1, 4), nfe=NFE, sampler="ipndm", noises=2, iterations=1, batch=2, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        fitted.save(Path(folder) / "calibration.json")
        return load_calibration(Path(folder) / "calibration.json")


@torch.no_grad()
def calls(process: str, name: str, sampler: Any, processes: int, later: int) -> Row:
    """A row of the second table: medians over so many processes, and over as many later calls of each."""
    keep_memory()
    d, found = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), []
    for _ in range(processes + 1):
        sde = PROCESSES[process]()
        score = as_score(lambda x, t: d, sde, "eps")
        run = partial(sample, sde, score, SHAPE, sampler, nfe=NFE, seed=0)
        found.append([1e3 * seconds(run) for _ in range(later + 1)])
    first, *others = zip(*found[1:], strict=True)  # the first process of all pays for what is done once
    ms = {"first": statistics.median(first), "later": statistics.median(sum(others, ()))}
    return {"sampler": name, "process": process, **{key: round(value, 2) for key, value in ms.items()}}


def calls_table(rows: list[Row]) -> str:
    """Markdown of the second table."""
    at = {(row["sampler"], row["process"]): row for row in rows}
    names, processes = (list(dict.fromkeys(row[key] for row in rows)) for key in ("sampler", "process"))
    lines = []
    for name in names:
        found = [at[name, process] for process in processes]
        lines.append([name, *(f"{float(row['first']):.1f} / {float(row['later']):.2f}" for row in found)])
    return markdown(["milliseconds, first / later calls", *processes], lines)
