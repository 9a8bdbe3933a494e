"""Write every table and every measured number of the pages anew, from benchmarks/results.

    python benchmarks/pages.py            # rewrites README.md, those of benchmarks and of evaluation, CHOOSING.md
    python benchmarks/pages.py --check    # changes nothing; exits 1 and names the pages that would change

In a page a block is what follows ``<!-- table:NAME -->`` or ``<!-- numbers:NAME -->`` and an empty line, up to the next
empty line; BLOCKS says what stands there. A benchmark writes its CSV and figure to benchmarks/out: copy what is to be
shown to benchmarks/results, then run this.
"""

import argparse
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable

import adaptive
import bits_per_dim
import choosing
import compare_digits
import diffusers_unet
import likelihood
import network_overhead
import nfe_vs_error
import nfe_vs_fid
import noisy_rows
import overhead
import overhead_calls
import peer_loops
import peers
import poisson
import posterior
import training
import trust
from choosing import slashed
from page_data import ROOT, distances, entries, rows
from peers_figure import Entry, best_of, cell, rows_of, same_name_table
from tables import markdown

PAGES = ("README.md", "benchmarks/README.md", "benchmarks/CHOOSING.md", "sdekit/evaluation/README.md")
BLOCK = re.compile(r"(<!-- (?:table|numbers):(\w+) -->\n\n)(.*?)(?=\n\n|\n?\Z)", re.S)

# Rows that the pages show, of the many in the CSVs; what a CSV lacks is left out.
DIGITS = (
    "calibrated", "calibrated, clipped", "flow_3m", "v_3m", "flow_unipc_3", "ipndm", "deis", "dpmpp_2m",
    "dpmpp_2m, clipped", "unipc_2", "unipc_3", "ddim", "heun", "sa_solver", "dpmpp_3m_sde", "ancestral", "edm",
    "restart", "pc",
)  # fmt: skip
OURS = ("flow_unipc_3", "flow_3m", "ipndm", "unipc_3", "unipc_2", "dpmpp_2m", "ddim")
PEERS = (
    "azula zEAB4", "diffusers IPNDM", "diffusers UniPC bh2 3", "diffusers DEIS 3", "diffusers DPM++ 3M",
    "diffusers DPM++ 2M", "diffusers DDIM",
)  # fmt: skip
SIDES = {
    "sdekit, calibrated": ("calibrated",),
    "sdekit, best on fixed grids": ("ours",),
    "best of the peers": ("peers",),
    "best of the peers, on our grids too": ("peers", "peers on our grids"),
}
HEADLINE = {
    "sdekit, calibrated to the model": ("calibrated",),
    "sdekit, its best sampler on a fixed grid": ("ours",),
    "the best of the other libraries": ("peers",),
    "the best of the others, on sdekit's grids too": ("peers", "peers on our grids"),
}
HEADLINE_BUDGETS, HEADLINE_ERROR = (5, 10, 20), 1e-3
MIXTURE = "digits64"


def peers_table() -> str:
    """Of each side the best of every column, and chosen samplers on their best grids."""
    found = entries("peers", MIXTURE)
    columns = sorted({e.budget for e in found if e.budget})

    def best(label: str) -> list[str]:
        by_budget = best_of(found, *SIDES[label])
        return [label, *(cell(by_budget.get(n)) for n in columns)]

    def chosen(side: str, names: tuple[str, ...], prefix: str) -> list[list[str]]:
        known, lines = rows_of(found, side), []
        for name in (name for name in names if name in known):
            at = {e.budget: e for e in known[name] if math.isfinite(e.error)}
            lines.append([f"{prefix}{name}, {known[name][0].grid}", *(cell(at.get(n)) for n in columns)])
        return lines

    labels = list(SIDES)
    lines = [*map(best, labels[:2]), *chosen("ours", OURS, "sdekit "), *map(best, labels[2:])]
    return markdown(["error at evaluations", *columns], [*lines, *chosen("peers", PEERS, "")])


def same_name() -> str:
    found = entries("peers", MIXTURE)
    columns = sorted({e.budget for e in found if e.budget})
    return same_name_table(found, columns, peers.SAME_NAME.items(), peers.PEER_GRIDS).partition("\n\n")[0]


def digits_table() -> str:
    table = distances()
    return nfe_vs_fid.markdown({name: table[name] for name in (*DIGITS, "real") if name in table})


def digits_numbers() -> str:
    table, every = distances(), rows("nfe_vs_fid_digits")
    found = [f"Each entry is of {every[0]['samples']} images, mean ± standard deviation of {seeds(every)} seeds."]
    for name in (name for name in nfe_vs_fid.ADAPTIVE if name in table):
        ((n, entry),) = table[name].items()
        tolerance = f"`{name}` at tolerance {nfe_vs_fid.ADAPTIVE[name]:g}"
        found.append(f"{tolerance} takes {n} evaluations and has {entry}.")
    by_row: dict[str, list[float]] = {}
    more = rows("nfe_vs_fid_digits_12_seeds")
    few = min(row["budget"] for row in more if row["budget"])
    for row in more:
        if row["budget"] == few:
            by_row.setdefault(row["sampler"], []).append(row["distance"])
    fitted = by_row.pop("calibrated")
    name, fixed = min(by_row.items(), key=lambda item: statistics.mean(item[1]))
    times = statistics.mean(fitted) / statistics.mean(fixed)
    found.append(
        f"Over {seeds(more)} seeds `calibrated` at {few} has {times:.2f} times the distance of the best fixed row "
        f"(`{name}`); the correlation of the two over the seeds is {statistics.correlation(fitted, fixed):.2f}."
    )
    return " ".join(found)


def seeds(found: list[dict]) -> int:
    return len({row["seed"] for row in found})


def trained_numbers() -> str:
    """A model trained anew beside the bundled one."""
    name = "unipc_2"
    anew, bundled = (distances(csv)[name] for csv in ("nfe_vs_fid_digits_trained", "nfe_vs_fid_digits"))
    budgets = [n for n in anew if n in bundled]
    return (
        f"Fréchet distances by `{name}` at {slashed(budgets)} evaluations: {slashed(anew[n].mean for n in budgets)} "
        f"trained anew, {slashed(bundled[n].mean for n in budgets)} for the bundled model."
    )


def diffusers_numbers() -> str:
    """What the network of diffusers gives besides samples by a budget."""
    *found, bits = rows("diffusers_unet_adaptive")
    errors = (f"{row['value']:.2g} in {row['evaluations']} ({row['tolerance']:g})" for row in found)
    return (
        f"`adams` has an error of {', '.join(errors)} evaluations of the batch (tolerance). `bits_per_dim` of training "
        f"images: {bits['value']:.2f} ± {bits['spread']:.2f}, in {bits['evaluations']} evaluations with 4 probes."
    )


def adaptive_curves() -> dict[str, list[Entry]]:
    return adaptive.curves(entries("adaptive"))


def headline_table() -> str:
    found = entries("peers", MIXTURE)
    best = {label: best_of(found, *sides) for label, sides in HEADLINE.items()}
    lines = [[label, *(cell(row.get(n)) for n in HEADLINE_BUDGETS)] for label, row in best.items()]
    return markdown(["error after so many network evaluations", *HEADLINE_BUDGETS], lines)


def headline_numbers() -> str:
    curves, method = adaptive_curves(), choosing.best_adaptive()
    need = {name: adaptive.needed(curve, HEADLINE_ERROR) for name, curve in curves.items()}
    other = min((name for name in curves if curves[name][0].side == "peers"), key=need.__getitem__)
    found = rows("likelihood")
    theirs = min((row for row in found if not row["method"].startswith("sdekit")), key=lambda row: row["mean"])
    mine = [row for row in found if row["method"] == "sdekit"]
    better = [row for row in mine if row["mean"] < theirs["mean"]]  # the first that is, else the last
    ours = min(better, key=lambda row: row["evaluations"], default=mine[-1])
    drawn = [row["ratio"] for row in posterior.mean_rows(rows("posterior")) if row["method"] == posterior.HEADLINE]
    return (
        f"With steps chosen by the solver, `{method}` comes to an error of {HEADLINE_ERROR:g} in {need[method]:.0f} "
        f"evaluations a sample; the best of the others needs {need[other]:.0f}. Log-likelihoods are {ours['mean']:.2g} "
        f"nats off after {ours['evaluations']:.0f} evaluations; the least error of other recipes is "
        f"{theirs['mean']:.2g}, after {theirs['evaluations']:.0f}. Draws given y = A x_0 + noise, by an exact score, "
        f"are {min(drawn):.2f} to {max(drawn):.2f} times as far off as others that are exact."
    )


def posterior_numbers() -> str:
    """posterior_sample beside what has no particles and azula's, over the tasks on digits."""
    means = posterior.mean_rows(rows("posterior"))
    lines = dict.fromkeys((r["task"], r["std"]) for r in means)

    def span(values: list[float]) -> str:
        return f"{min(values):.2f} to {max(values):.2f}"

    def best(chosen: Callable[[str], bool]) -> tuple[list[float], list[float]]:
        own = [[r for r in means if (r["task"], r["std"]) == line and chosen(r["method"])] for line in lines]
        least = [min(rows, key=lambda r: (math.isnan(r["ratio"]), r["ratio"])) for rows in own]
        return [r["ratio"] for r in least], [r["modes"] for r in least]

    ratios, modes = best(lambda name: name == posterior.HEADLINE)
    plain, off = best(lambda name: name in posterior.APPROXIMATE)
    found = (
        f"Given y = A x_0 + noise, draws of `{posterior.HEADLINE.replace(', ', '` with ')} lie {span(ratios)} times as "
        f"far from exact posterior draws as those do from each other, over {len(lines)} tasks on a mixture of digits; "
        f"mode weights are off by at most {max(modes):.2f}. The best score without particles, for each task, has "
        f"{span(plain)} times and at most {max(off):.2f}"
    )
    if any(r["method"].startswith("azula") for r in means):
        theirs, off = best(lambda name: name.startswith("azula"))
        found += f"; the best of azula's {span(theirs)} times and at most {max(off):.2f}"
    return f"{found}."


BLOCKS: dict[str, Callable[[], str]] = {
    "table:headline": headline_table,
    "numbers:headline": headline_numbers,
    "table:nfe_vs_fid_digits": digits_table,
    "numbers:nfe_vs_fid_digits": digits_numbers,
    "table:peers": peers_table,
    "table:same_name": same_name,
    "table:adaptive": lambda: adaptive.table(adaptive_curves()),
    "table:likelihood": lambda: likelihood.table(rows("likelihood")),
    "table:bits_per_dim": lambda: bits_per_dim.table(rows("bits_per_dim")),
    "table:training": lambda: training.table(rows("training")),
    "numbers:trained": trained_numbers,
    "table:peers_overhead": lambda: overhead.table(rows("peers_overhead"), peer_loops.COLUMNS),
    "table:overhead_calls": lambda: overhead_calls.calls_table(rows("overhead_calls")),
    "table:network_overhead": lambda: network_overhead.table(rows("network_overhead")),
    "table:nfe_vs_error": lambda: nfe_vs_error.summary(rows("nfe_vs_error")),
    "table:diffusers_unet": lambda: diffusers_unet.table(rows("diffusers_unet"), rows("diffusers_unet_time")),
    "numbers:diffusers_unet": diffusers_numbers,
    "table:poisson": lambda: poisson.table(rows("poisson")),
    "table:noisy_rows": lambda: noisy_rows.table(rows("noisy_rows")),
    "table:sensitivity": lambda: nfe_vs_error.sensitivity_table(rows("sensitivity")),
    "table:posterior": lambda: posterior.table(rows("posterior")),
    "table:posterior_lattice": lambda: posterior.table(rows("posterior_lattice")),
    "table:posterior_coverage": lambda: posterior.coverage_table(rows("posterior_coverage")),
    "table:posterior_particles": lambda: posterior.particles_table(rows("posterior_particles")),
    "numbers:posterior": posterior_numbers,
    "table:trust": lambda: trust.table(rows("trust")),
    "numbers:trust": lambda: trust.summary(rows("trust")),
    "table:compare": lambda: compare_digits.table(rows("compare")),
    "table:choosing_networks": choosing.networks,
    "table:choosing_samples": choosing.samples,
    "numbers:choosing_floor": choosing.floor,
    "numbers:choosing_one_row": choosing.one_row,
    "table:choosing_other_aims": choosing.other_aims,
}


def block(kind_and_name: str) -> str:
    """A block's text: a table as it is, numbers as lines of the pages' width."""
    text = BLOCKS[kind_and_name]()
    return text if kind_and_name.startswith("table:") else textwrap.fill(text, 118, break_on_hyphens=False)


def rewritten(text: str) -> str:
    """A page with its blocks made anew. Raises KeyError for a block that nobody writes."""
    return BLOCK.sub(lambda found: found[1] + block(re.search(r"\w+:\w+", found[1])[0]), text)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say which pages differ from the results")
    check, differ = parser.parse_args(arguments).check, False
    for name in PAGES:
        path = ROOT / name
        old = path.read_text(encoding="utf-8")
        new = rewritten(old)
        if new == old:
            continue
        differ = True
        print(f"{name} {'differs from the results' if check else 'written'}")
        if not check:
            path.write_text(new, encoding="utf-8")
    if check and differ:
        sys.exit(1)


if __name__ == "__main__":
    main()
