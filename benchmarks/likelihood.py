"""How many evaluations does a log-likelihood need for an error, per data point?

    pip install -e ".[benchmarks]"
    python benchmarks/likelihood.py            # a table and a figure, about three minutes on one thread

Protocol: digits64 (ten full-covariance Gaussians fitted to the 8x8 digits), VPSDE, 64 draws of the data (seed 0),
exact score and exact divergence, float64; error is |log p - exact log p of the data| in nats, mean over the points.
"evaluations" are the mean over points of those that a point took part in; a method that steps for the whole batch has
the batch's. rtol = atol = the tolerance.

"sdekit": log_likelihood's ``corrected``, the corrections' evaluations counted; "sdekit, exact ends": ``log_prob`` with
p_T for the prior against p at t_min, which is the solver's error alone. "score-SDE recipe": SciPy's RK45 over the whole
batch in VP's t from 1e-5, as in the code of Song et al. 2021, by their formulae; "torchdiffeq dopri5": the same
equation by that solver; "flow_matching dopri5" (if installed: the extra "peers"): its ODESolver.compute_likelihood of
the same flow. These three stop at what they leave out: truncation at t_min, and the prior's mismatch at T.
"""

import argparse
import csv
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from scipy.integrate import solve_ivp
from torch import Tensor
from torchdiffeq import odeint

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdekit import VPSDE, GaussianMixture, log_likelihood
from tests import oracle

FLOW_MATCHING = importlib.util.find_spec("flow_matching") is not None
TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def peer_rhs(sde: VPSDE, data: GaussianMixture, calls: list[int]) -> Callable[[float, Tensor], Tensor]:
    """(x, log p) columns of the whole batch: the recipe's drift and divergence, one pass and its products."""

    def rhs(t: float, y: Tensor) -> Tensor:
        calls[0] += 1
        x = y[:, :-1].detach().requires_grad_()
        beta = sde.beta_min + t * (sde.beta_max - sde.beta_min)
        time = torch.tensor(t, dtype=torch.float64)
        with torch.enable_grad():
            score = data.score(sde)(x, time)
            drift = -0.5 * beta * (x + score)
        unit = torch.eye(x.shape[1], dtype=x.dtype)[:, None].expand(-1, len(x), -1)
        (products,) = torch.autograd.grad(drift, x, unit, is_grads_batched=True)
        return torch.cat([drift.detach(), (products * unit).sum((0, 2))[:, None]], 1)

    return rhs


def recipe(name: str, sde: VPSDE, data: GaussianMixture, x: Tensor, tol: float) -> tuple[Tensor, float]:
    """log p by one solve of the whole batch, and its evaluations."""
    calls = [0]
    rhs = peer_rhs(sde, data, calls)
    y = torch.cat([x, x.new_zeros(len(x), 1)], 1)
    if name == "score-SDE recipe":
        flat = solve_ivp(
            lambda t, v: rhs(t, torch.from_numpy(v).reshape(y.shape)).reshape(-1).numpy(),
            (1e-5, sde.T), y.reshape(-1).numpy(), rtol=tol, atol=tol, method="RK45",
        ).y[:, -1]  # fmt: skip
        end = torch.from_numpy(flat).reshape(y.shape)
    else:
        times = torch.tensor([1e-5, sde.T], dtype=torch.float64)
        # it steps past the end and interpolates: there the process is that of T
        end = odeint(lambda t, v: rhs(min(float(t), sde.T), v), y, times, rtol=tol, atol=tol, method="dopri5")[-1]
    return sde.prior_log_prob(end[:, :-1]) + end[:, -1], float(calls[0])


def flow_matching_row(sde: VPSDE, data: GaussianMixture, x: Tensor, tol: float) -> tuple[Tensor, float]:
    """log p by flow_matching's ODESolver, the flow in its time: 1 at the data, t = 1e-5, and 0 at T."""
    from flow_matching.solver import ODESolver

    calls, span = [0], sde.T - 1e-5
    flow = sde.probability_flow(data.score(sde))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        # it steps past the end and interpolates: there the process is that of T
        return -span * flow.drift(x, (sde.T - span * t.double()).clamp(1e-5, sde.T))

    _, log_p = ODESolver(velocity).compute_likelihood(
        x, sde.prior_log_prob, None, method="dopri5", rtol=tol, atol=tol, exact_divergence=True,
        time_grid=torch.tensor([1.0, 0.0], dtype=torch.float64),
    )  # fmt: skip
    return log_p.detach(), float(calls[0])


def measure(points: int) -> list[dict]:
    """One row per method and tolerance."""
    g, sde = oracle.digits64(), VPSDE()
    data = GaussianMixture(g.m, g.covs, g.w)
    x = data.sample(points, seed=0, dtype=torch.float64)
    exact, start = data.log_prob(x), data.at(sde, sde.t_min).log_prob(x)
    rows = []

    def add(name: str, tol: float, nfe: float, off: Tensor) -> None:
        off = off.abs()
        rows.append(
            {"method": name, "tolerance": tol, "evaluations": nfe, "mean": off.mean().item(), "max": off.max().item()}
        )

    for tol in TOLERANCES:
        out = log_likelihood(sde, data.score(sde), x, rtol=tol, atol=tol)
        nfe = out.nfe_per_sample.double().mean().item()
        add("sdekit", tol, nfe, out.corrected - exact)
        mismatch = data.at(sde, sde.T).log_prob(out.latent) - sde.prior_log_prob(out.latent)
        add("sdekit, exact ends", tol, nfe, out.log_prob + mismatch - start)
        for name in ("score-SDE recipe", "torchdiffeq dopri5"):
            if tol >= 1e-5 and tol <= 1e-2:
                log_p, calls = recipe(name, sde, data, x, tol)
                add(name, tol, calls, log_p - exact)
        if FLOW_MATCHING and tol >= 1e-5 and tol <= 1e-2:
            log_p, calls = flow_matching_row(sde, data, x, tol)
            add("flow_matching dopri5", tol, calls, log_p - exact)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown: evaluations and mean error, a column per tolerance."""
    names = dict.fromkeys(row["method"] for row in rows)
    lines = [
        "| tolerance | " + " | ".join(f"{tol:g}" for tol in TOLERANCES) + " |",
        "|---" * (len(TOLERANCES) + 1) + "|",
    ]
    for name in names:
        cells = {r["tolerance"]: f"{r['mean']:.2g} at {r['evaluations']:.0f}" for r in rows if r["method"] == name}
        lines.append(f"| {name} | " + " | ".join(cells.get(tol, "") for tol in TOLERANCES) + " |")
    return "\n".join(lines)


def draw(path: Path, rows: list[dict]) -> None:
    """Mean error against evaluations."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    looks = {"sdekit": ("#d55e00", "o", "-"), "sdekit, exact ends": ("#d55e00", "o", ":"),
             "score-SDE recipe": ("#555555", "s", "-"),
             "torchdiffeq dopri5": ("#999999", "^", "-"), "flow_matching dopri5": ("#bbbbbb", "v", "--")}  # fmt: skip
    for name, (colour, marker, line) in looks.items():
        if not (chosen := [r for r in rows if r["method"] == name]):
            continue
        axes.plot([r["evaluations"] for r in chosen], [r["mean"] for r in chosen], color=colour, marker=marker, ls=line,
                  label=name, mfc="white" if line == ":" else colour)  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="network evaluations per point", ylabel="mean |error| of log p, nats",
             title="digits64, VP: log-likelihood, exact divergence")  # fmt: skip
    ticks = (20, 30, 50, 100, 200)
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.grid(True, color="#eeeeee")
    axes.legend(frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = measure(options.points)
    print(f"digits64, {options.points} points, torch {torch.__version__}\n\n{table(rows)}")
    with open(options.out / "likelihood.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    draw(options.out / "likelihood.png", rows)


if __name__ == "__main__":
    main()
