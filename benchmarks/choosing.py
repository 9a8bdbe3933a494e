"""The tables of CHOOSING.md: aim, budget and model -> sampler, grid, what to expect. Written by pages.py.

What a cell recommends is looked up in the results, by the rules below; no number is set by hand, and no sampler's name
but SAFE, the library's default.
"""

import math
import statistics
from collections.abc import Iterable

import adaptive
import peers
from networks import BENCH
from nfe_vs_error import COLUMNS, best_of
from nfe_vs_fid import ADAPTIVE
from nfe_vs_fid_figure import Table
from page_data import distances, entries, errors, rows
from peers_figure import Entry
from tables import markdown

from sdekit import SAMPLERS

SAFE = "unipc_2"  # the default
PROBLEMS = tuple(peers.SIZES)  # the mixtures
TOLERANCES, FINE = (1e-2, 1e-3, 1e-4), 1e-5  # the finest for likelihoods alone
NOISY_SHOWN = 3
ABOUT = {
    "eps_linear": "eps, DDPM's linear betas",
    "eps_scaled_linear": "eps, Stable Diffusion's betas",
    "v_zero_snr": "v, zero terminal SNR",
    "flow_shift": "flow, shift 3",
    "x0_edm": "x0, EDM's preconditioning",
    "eps_conditional": "eps, with a class",
}
NEAR = 1.05  # distances that differ by less do so by chance


def named(sampler: str, grid: str | None = None) -> str:
    """A sampler and its grid: the one given, or its own."""
    return f"`{sampler}`, {grid or SAMPLERS[sampler].grid}"


def of_kind(table: Table, *, noise: bool) -> list[str]:
    """The rows of the network's table that draw noise, or draw none; clipped and calibrated ones are neither."""
    return [name for name in table if name in SAMPLERS and SAMPLERS[name].stochastic is noise]


def finite(value: float) -> float:
    """A breakdown is the worst there is."""
    return math.inf if math.isnan(value) else value


def best_for_network(table: Table, budget: int) -> str:
    """The cell of the best sampler without noise at a budget: of those that are NEAR it, the best over all budgets."""
    known = {name: {n: finite(e.mean) for n, e in table[name].items()} for name in of_kind(table, noise=False)}
    least = min((at[budget] for at in known.values() if budget in at), default=math.inf)
    near = [name for name, at in known.items() if at.get(budget, math.inf) <= NEAR * least < math.inf]
    best = min(near, key=lambda name: badness(known[name].values()), default=None)
    return "" if best is None else f"{named(best)}: {table[best][budget].mean:.3g}"


Row = tuple[str, str]  # sampler and grid


def on_both() -> dict[Row, dict[int, list[float]]]:
    """Row -> budget -> its errors on the mixtures, where it has one on each."""
    found = [errors(problem) for problem in PROBLEMS]
    return {
        row: {n: [f[row][n] for f in found] for n in found[0][row] if all(n in f[row] for f in found)}
        for row in found[0]
        if all(row in f for f in found)
    }


def badness(values: Iterable[float]) -> float:
    """The mean logarithm, by which errors on several problems are one number."""
    return statistics.mean(map(math.log, values))


def best_for_exact(found: dict[Row, dict[int, list[float]]], budget: int) -> Row | None:
    known = [row for row in found if budget in found[row]]
    return min(known, key=lambda row: badness(found[row][budget]), default=None)


def best_of_all(found: dict[Row, dict[int, list[float]]]) -> tuple[Row, float]:
    """The row that errs least over all budgets, and how many times the best of a budget it errs at most."""
    least = {n: badness(found[best_for_exact(found, n)][n]) for n in {n for at in found.values() for n in at}}
    worse = {row: [badness(at[n]) - least[n] for n in least] for row, at in found.items() if set(at) == set(least)}
    row = min(worse, key=lambda row: statistics.mean(worse[row]))
    return row, math.exp(max(worse[row]))


def slashed(values: Iterable[float]) -> str:
    return " / ".join(f"{value:.3g}" for value in values)


def samples() -> str:
    """The table of samplers with a number of evaluations."""
    table, known = distances(), on_both()
    fitted: dict[int, list[float]] = {}
    for e in (e for p in PROBLEMS for e in entries("peers", p) if e.side == "calibrated"):
        fitted.setdefault(e.budget, []).append(e.error)
    cheap = {n for name in of_kind(table, noise=False) for n in table[name]}
    budgets = sorted(cheap | set(fitted) | {n for at in known.values() for n in at})
    lines = []
    for n in budgets:
        row = best_for_exact(known, n)
        network = [f"{table[name][n].mean:.3g}" if n in table.get(name, {}) else "" for name in ("calibrated", SAFE)]
        exact = [slashed(fitted.get(n, [])), f"{named(*row)}: {slashed(known[row][n])}" if row else ""]
        lines.append([n, network[0], best_for_network(table, n), network[1], *exact])
    header = [
        "evaluations", "network: calibrated", "network: best on a fixed grid", f"network: {named(SAFE)}",
        "exact score: calibrated", "exact score: best on a fixed grid",
    ]  # fmt: skip
    return markdown(header, lines)


def networks() -> str:
    """What a network predicts x budget -> the row that is truest to it, its error, and that of the default."""
    found, lines = rows("nfe_vs_error"), []
    for name, about in BENCH.items():
        here = [row for row in found if row["problem"] == name and row["side"] == "sdekit"]
        best = best_of(here, "sdekit")
        default = {row["nfe"]: row["error"] for row in here if row["sampler"] == SAFE}
        cells = [f"`{sampler}` {error:.2g}; {default[n]:.2g}" for n, (error, sampler) in sorted(best.items())]
        lines.append([ABOUT.get(name, about.predicts), *cells])
    return markdown([f"the network predicts: best row; `{SAFE}`", *map(str, COLUMNS)], lines)


def adaptive_curves() -> dict[str, list[Entry]]:
    return {name: c for name, c in adaptive.curves(entries("adaptive")).items() if c[0].side == "ours"}


def best_adaptive() -> str:
    """Our adaptive method that needs the fewest evaluations for the errors of adaptive.py's table."""
    found = adaptive_curves()
    return min(found, key=lambda name: badness(adaptive.needed(found[name], e) for e in adaptive.ERRORS))


def other_aims() -> str:
    """The table of everything else: what to call, what it takes, what to expect."""
    table, method = distances(), best_adaptive()
    lines = []
    chosen = [(n, entry, name) for name in ADAPTIVE if name in table for n, entry in table[name].items()]
    for n, entry, name in sorted(chosen):
        call = f'`ode_sample(method="{name}")`, tolerance {ADAPTIVE[name]:g}'
        lines.append(["samples, steps chosen for you", "network", call, n, f"distance {entry}"])
    for e in (e for e in adaptive_curves()[method] if float(e.grid.split()[-1]) in TOLERANCES):
        call = f'`ode_sample(method="{method}")`, {e.grid}'
        error = f"error {e.error:.2g}"
        lines.append(["samples, steps chosen for you", "exact score", call, round(e.nfe_per_sample), error])
    noisy = [(table[name][n], n, name) for name in of_kind(table, noise=True) for n in table[name]]
    for entry, n, name in sorted(noisy)[:NOISY_SHOWN]:
        lines.append(["best samples, with noise", "network", f"`sample`, {named(name)}", n, f"distance {entry}"])
    for row in rows("likelihood"):
        if row["method"] == "sdekit" and row["tolerance"] in (*TOLERANCES, FINE):
            call = f"`log_likelihood`, tolerance {row['tolerance']:g}"
            off = f"{row['mean']:.2g} nats off in the mean, {row['max']:.2g} at most"
            lines.append(["log-likelihood", "exact score", call, round(row["evaluations"]), off])
    bits = rows("bits_per_dim")
    for row in (row for row in bits if row["process"] == bits[0]["process"]):
        call = "`bits_per_dim`" if row["bound"] == "flow" else f"`variational_bound`, {row['bound']}"
        value = f"{row['held out']:.3f} ± {row['held out +-']:.3f} bits per dimension"
        lines.append(["bits of images", "network", call, row["evaluations"], value])
    twice = [round(2 * e.nfe_per_sample) for e in adaptive_curves()[method] if e.grid == f"tolerance {TOLERANCES[1]:g}"]
    call = f"`encode`, `decode`, `interpolate`, tolerance {TOLERANCES[1]:g}"
    expect = f"each way the error of `{method}` above; `round_trip_error` measures it"
    lines.append(["latents, interpolation", "any", call, f"{twice[0]}, both ways", expect])
    return markdown(["aim", "model", "call", "evaluations", "what to expect"], lines)


def floor() -> str:
    """What the distances of the table of samplers are to be compared with, and how it chooses."""
    entry = distances()["real"][0]
    return (
        f"Real images have a distance of {entry} from other real images; a good sampler comes out there or below, "
        f"since the model has seen all of them. Rows within {NEAR - 1:.0%} of a budget's best cannot be told apart: "
        "of these the table names the one that is best over all budgets."
    )


def one_row() -> str:
    """The one row for whoever does not want to look the budget up."""
    row, worst = best_of_all(on_both())
    return (
        f"If one row is to serve all budgets with an exact score: {named(*row)} errs at most {worst:.2g} times as much "
        f"as the best row of a budget (geometric mean over {' and '.join(PROBLEMS)})."
    )
