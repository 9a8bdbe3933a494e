"""How far is a sampler from the model's own exact flow after N network evaluations, on trained networks?

    pip install -e ".[peers]"
    python benchmarks/nfe_vs_error.py            # every row, six networks, two closed forms: ten minutes on a thread
    python benchmarks/nfe_vs_error.py --quick    # does it run? two rows, two networks, 16 images

Protocol: the networks of networks.py, 64 noises (seed 0), float32, one thread. All rows of SAMPLERS that draw no noise
start from the same noise on their default grid, the final denoising counted; so do diffusers' schedulers, each as its
pipelines run it (diffusers_rows.py). The error is the root mean square over pixels of the difference to where
the network's own probability flow takes the same noise (unipc_2 in 1,000 steps, which agrees with rk4 in 250 to a
few 1e-4), its mean over images. The closed forms are those of peers.py, 128 noises, against their exact flow.

An error of the network is no error here: a sampler is to be true to what it was given. But it matters how much the
sampler makes of it, which the last table has: the most that an error of one in what the model predicts moves x, in
units of x's own size (sdekit.sampling.sensitivity), where x = alpha x_0 + sigma eps with sigma/alpha = 152 at T.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import diffusers_rows
import networks
import peers
import torch
from overhead_measure import write
from peer_samplers import available
from tables import markdown
from torch import Tensor

from sdekit import SAMPLERS, SDE, VPSDE, sample
from sdekit.sampling.sensitivity import sensitivity

SAMPLES, CLOSED = 64, 128
REFERENCE = 1000  # steps to where the flow leads
COLUMNS = (5, 6, 8, 10, 20)
OURS = [name for name, row in SAMPLERS.items() if not row.stochastic]
DEFAULT = "unipc_2"
SENSITIVE = ("eps", "v")


def difference(x: Tensor, y: Tensor) -> float:
    """Root mean square of an image, mean over images."""
    return float((x - y).double().flatten(1).square().mean(1).sqrt().mean())


class Bench:
    """A network, the noises, and where its own flow takes them."""

    def __init__(self, name: str, samples: int) -> None:
        self.name = name
        self.sde, self.score = networks.load(name, samples)
        self.x_T = self.sde.prior_sample((samples, *networks.EVENT), seed=0)
        self.exact = sample(self.sde, self.score, self.x_T.shape, "unipc_2", steps=REFERENCE, x_T=self.x_T)

    def ours(self, sampler: str, nfe: int) -> float:
        """The error of one of our rows."""
        return difference(sample(self.sde, self.score, self.x_T.shape, sampler, nfe=nfe, x_T=self.x_T), self.exact)

    @torch.no_grad()
    def theirs(self, scheduler: str, nfe: int) -> float:
        """The error of a scheduler; NaN where it breaks down."""
        try:
            return difference(diffusers_rows.run(scheduler, self.sde, self.score, self.x_T, nfe), self.exact)
        except (AssertionError, IndexError, ValueError):  # Karras' levels of an infinite one
            return math.nan


class Closed:
    """A closed form of peers.py."""

    def __init__(self, name: str, samples: int) -> None:
        self.name, self.problem = name, peers.make_problem(name, samples)

    def ours(self, sampler: str, nfe: int) -> float:
        """The error of one of our rows, as peers.py has it."""
        p = self.problem
        return float(
            peers.oracle.error(sample(p.sde, p.score, p.start.shape, sampler, nfe=nfe, x_T=p.start), p.reference)
        )


def measure(problems: list[str], rows: list[str], samples: int) -> list[dict[str, Any]]:
    """One row for each problem, side, sampler and budget."""
    found = []
    for name in problems:
        bench: Any = Bench(name, samples) if name in networks.BENCH else Closed(name, CLOSED)
        runs = [("sdekit", row, bench.ours) for row in rows]
        if name in networks.BENCH and available("diffusers"):
            runs += [("diffusers", row, bench.theirs) for row in diffusers_rows.names(bench.score.predicts)]
        for side, row, run in runs:
            for nfe in COLUMNS:
                found.append({"problem": name, "side": side, "sampler": row, "nfe": nfe, "error": run(row, nfe)})
        print(f"{name}: done", flush=True)
    return found


def table(found: list[dict[str, Any]], problem: str) -> str:
    """Markdown of one problem: every row of ours, the best of theirs and which it is. Also of the CSV's rows."""
    here = [row for row in found if row["problem"] == problem]
    lines = []
    for name in dict.fromkeys(row["sampler"] for row in here if row["side"] == "sdekit"):
        errors = {row["nfe"]: row["error"] for row in here if (row["side"], row["sampler"]) == ("sdekit", name)}
        lines.append([f"**{name}**" if name == DEFAULT else name, *(f"{errors[nfe]:.3g}" for nfe in COLUMNS)])
    if best := best_of(here, "diffusers"):
        lines.append(["best of diffusers", *(f"{best[nfe][0]:.3g} ({best[nfe][1]})" for nfe in COLUMNS)])
    return markdown(["error at evaluations", *map(str, COLUMNS)], lines)


def best_of(found: list[dict[str, Any]], side: str) -> dict[int, tuple[float, str]]:
    """Of each budget the least error and whose it is."""
    best: dict[int, tuple[float, str]] = {}
    for row in found:
        if row["side"] == side and math.isfinite(row["error"]):
            best[row["nfe"]] = min(best.get(row["nfe"], (math.inf, "")), (row["error"], row["sampler"]))
    return best


def summary(found: list[dict[str, Any]]) -> str:
    """Markdown: a line for each problem, the default's error and the best of diffusers, and the best row of ours."""
    lines = []
    for problem in dict.fromkeys(row["problem"] for row in found):
        here = [row for row in found if row["problem"] == problem]
        ours = {row["nfe"]: row["error"] for row in here if (row["side"], row["sampler"]) == ("sdekit", DEFAULT)}
        theirs, best, line = best_of(here, "diffusers"), best_of(here, "sdekit"), [problem]
        for nfe in COLUMNS:
            peer = f" / {theirs[nfe][0]:.3g}" if nfe in theirs else ""
            line.append(f"{ours[nfe]:.3g}{peer}; {best[nfe][1]} {best[nfe][0]:.3g}")
        lines.append(line)
    return markdown([f"`{DEFAULT}` / best of diffusers; our best row", *map(str, COLUMNS)], lines)


def sensitivities(process: SDE | None = None) -> list[dict[str, Any]]:
    """The most that an error of one moves x, by row, prediction and budget."""
    sde = process or VPSDE()
    return [
        {"sampler": name, "predicts": predicts, "nfe": nfe,
         "worst": sensitivity(sde, name, nfe=nfe, predicts=predicts).worst}
        for name in OURS for predicts in SENSITIVE for nfe in COLUMNS
    ]  # fmt: skip


def sensitivity_table(found: list[dict[str, Any]]) -> str:
    """Markdown of that, also of the CSV's rows."""
    worst = {(row["sampler"], row["predicts"], row["nfe"]): float(row["worst"]) for row in found}
    shown = (5, 10, 20)
    lines = [
        [name, *(f"{worst[name, predicts, nfe]:.2g}" for predicts in SENSITIVE for nfe in shown)]
        for name in dict.fromkeys(row["sampler"] for row in found)
    ]
    return markdown(["sampler", *(f"{predicts}, {nfe}" for predicts in SENSITIVE for nfe in shown)], lines)


def draw(path: Path, found: list[dict[str, Any]]) -> None:
    """A panel for each network: the default, the best of ours and of diffusers, and ddim, over evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    problems = [name for name in networks.BENCH if any(row["problem"] == name for row in found)]
    figure, panels = plt.subplots(2, -(-len(problems) // 2), figsize=(11, 6.4), sharex=True, sharey=True, squeeze=False)
    for panel, problem in zip(panels.flat, problems, strict=False):
        here = [row for row in found if row["problem"] == problem]
        lines = {
            f"sdekit: {DEFAULT}, the default": ("tab:blue", "-", "o", DEFAULT),
            "sdekit: ddim": ("tab:gray", "--", ".", "ddim"),
        }
        for label, (colour, style, marker, name) in lines.items():
            at = {row["nfe"]: row["error"] for row in here if (row["side"], row["sampler"]) == ("sdekit", name)}
            panel.loglog(list(at), list(at.values()), color=colour, ls=style, marker=marker, label=label)
        for side, colour, label in (
            ("sdekit", "tab:green", "sdekit: best row of each budget"),
            ("diffusers", "tab:red", "diffusers: best scheduler of each budget"),
        ):
            best = best_of(here, side)
            panel.loglog(list(best), [error for error, _ in best.values()], color=colour, marker="s", ms=4, label=label)
        panel.set_title(problem.replace("_", " "), fontsize=10)
        panel.set_xticks(COLUMNS, map(str, COLUMNS))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    figure.supxlabel("network evaluations")
    figure.supylabel("RMS error to the network's own flow")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper center", ncols=4, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rows, two networks, 16 images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if not available("diffusers"):
        print('diffusers is not installed, its rows are missing: pip install -e ".[peers]"')
    if options.quick:
        found = measure(["eps_linear", "flow_shift"], ["unipc_2", "ddim"], 16)
    else:
        found = measure([*networks.BENCH, *peers.SIZES], OURS, SAMPLES)
    for problem in dict.fromkeys(row["problem"] for row in found):
        print(f"\n{problem}\n\n{table(found, problem)}")
    sensitive = sensitivities()
    print(f"\n{summary(found)}\n\n{sensitivity_table(sensitive)}")
    write(options.out / "nfe_vs_error.csv", found)
    draw(options.out / "nfe_vs_error.png", found)
    write(options.out / "sensitivity.csv", sensitive)


if __name__ == "__main__":
    main()
