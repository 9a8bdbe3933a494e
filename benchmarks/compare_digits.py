"""Does compare, which sees no data, name the rows that real images would choose?

    python benchmarks/compare_digits.py            # the bundled digits model: three minutes on two cores
    python benchmarks/compare_digits.py --quick    # does it run? 4 noises, two budgets

Protocol: ``compare`` on the bundled model with 64 noises (seed 0), budgets 5, 6, 10 and 20, 150 seconds. Its best row
at each budget, by the error to the model's own flow, beside the best row of nfe_vs_fid.py's table: by Fréchet distance
to real images, mean over three seeds, whose spread is what tells rows apart there. The CSV keeps compare's entries.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

from overhead_measure import write
from page_data import rows
from tables import markdown

from sdekit import SAMPLERS, compare, load_pretrained

BUDGETS = (5, 6, 10, 20)


def distances() -> dict[int, dict[str, tuple[float, float]]]:
    """budget -> row of SAMPLERS without noise -> Fréchet distance to real images, mean and spread over seeds."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in rows("nfe_vs_fid_digits"):
        if row["sampler"] in SAMPLERS and not SAMPLERS[row["sampler"]].stochastic and row["budget"] in BUDGETS:
            found.setdefault((row["budget"], row["sampler"]), []).append(row["distance"])
    table: dict[int, dict[str, tuple[float, float]]] = {n: {} for n in BUDGETS}
    for (budget, name), values in found.items():
        table[budget][name] = (statistics.mean(values), statistics.stdev(values))
    return table


def best(found: list[dict[str, Any]], budget: int) -> tuple[str, float]:
    """The row of least error at a budget, and its error. Also of the CSV's rows."""
    errors = {row["sampler"]: row["error"] for row in found if row["nfe"] == budget and row["error"] != ""}
    errors = {name: error for name, error in errors.items() if not math.isnan(error)}
    name = min(errors, key=lambda name: errors[name])
    return name, errors[name]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each budget."""
    lines, real = [], distances()
    for n in BUDGETS:
        name, error = best(found, n)
        there = min(real[n], key=lambda row: real[n][row][0])
        cells = (f"{real[n][row][0]:.3f} ± {real[n][row][1]:.3f}" for row in (name, there))
        lines.append([n, f"`{name}` ({error:.2g})", next(cells), f"`{there}`", next(cells)])
    head = ["evaluations", "compare's best row (error)", "its Fréchet distance", "best by real images", "its distance"]
    return markdown(head, lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    sde, score = load_pretrained("digits")
    few = options.quick
    found = compare(sde, score, (4 if few else 64, 1, 8, 8), nfe=BUDGETS[:2] if few else BUDGETS, seconds=150.0, seed=0)
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "compare.csv", [entry._asdict() for entry in found.entries])
    found.save(options.out / "compare.html")
    print(found)
    if not few:
        print(table([entry._asdict() for entry in found.entries]))


if __name__ == "__main__":
    main()
