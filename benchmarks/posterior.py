"""How right are posterior samplers? Against exact posteriors of a mixture of digits.

    python benchmarks/posterior.py            # three tasks, two noises, three y; an hour or two on two threads
    python benchmarks/posterior.py --quick    # does it run? one y, 64 samples, two tasks, a minute

Protocol: ten full-covariance Gaussians fitted to scikit-learn's 8 x 8 digits, their exact score; x_t = x_0 + t eps,
Karras levels from 80 to .01; y = A x_0 + std eps of an x_0 of the mixture. The exact posterior is a mixture again
(GaussianMixture.posterior). w2: sliced 2-Wasserstein distance to exact samples, over 200 directions; floor: that of
other exact samples, as many. modes: total variation between the mean responsibilities of the mixture's ten posterior
components in the samples and their exact weights. ess: the mean of the particles' last effective sample size. seconds:
of a run, with its vector-Jacobian products. Means over the y.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from overhead_measure import write
from sklearn.datasets import load_digits
from tables import markdown
from torch import Tensor

from sdekit import GaussianMixture, HeatODE, sample
from sdekit.posterior import Observation, posterior_sample, posterior_score

FLOOR, DIRECTIONS, D = 1e-3, 200, 64
SCORES = [("mmps", {}), ("tmpd", {}), ("pigdm", {"data_std": 0.6}), ("dps", {}), ("dps", {"gamma": 1.0})]
SAMPLERS = [("ancestral", 100), ("sa_solver", 30), ("dpmpp_2m", 20)]
PARTICLES = [("sa_solver", 60, 16)]


def mixture() -> GaussianMixture:
    """Ten Gaussians, one for each digit; pixels from -1 to 1."""
    x, label = load_digits(return_X_y=True)
    groups = [x[label == k] / 8 - 1 for k in range(10)]
    covs = np.stack([np.cov(g.T) + FLOOR * np.eye(D) for g in groups])
    return GaussianMixture(np.stack([g.mean(0) for g in groups]), covs, [len(g) / len(x) for g in groups])


def operators() -> dict[str, Tensor]:
    """The matrices of the tasks."""
    unit = torch.eye(D, dtype=torch.float64)
    pixels = torch.randperm(D, generator=torch.Generator().manual_seed(3))[:16].sort().values
    means = unit.reshape(D, 4, 2, 4, 2).mean((2, 4)).reshape(D, 16).mT
    return {"upper half": unit[:32], "16 pixels": unit[pixels], "2 x 2 means": means}


def sliced_w2(a: Tensor, b: Tensor) -> float:
    """The sliced 2-Wasserstein distance of as many samples of each."""
    u = torch.randn(D, DIRECTIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u = u / u.norm(dim=0)
    return float(((a @ u).sort(0).values - (b @ u).sort(0).values).square().mean().sqrt())


def mode_error(posterior: GaussianMixture, x: Tensor) -> float:
    """The total variation between the components' shares in x and their weights."""
    parts = []
    for k in range(len(posterior.weights)):
        one = GaussianMixture(posterior.means[k : k + 1], posterior.covs[k : k + 1])
        parts.append(posterior.weights[k].log() + one.log_prob(x))
    shares = torch.stack(parts, 1).softmax(1).mean(0)
    return float((shares - posterior.weights).abs().sum()) / 2


def draws(sde: HeatODE, score: Any, observation: Observation, n: int, quick: bool) -> Iterator[tuple[str, Any]]:
    """(method, a function of the seed that draws n)."""
    for method, options in SCORES:
        for sampler, steps in SAMPLERS[1:2] if quick else SAMPLERS:
            name = method + "".join(f", {k} {v:g}" for k, v in options.items())
            made = posterior_score(sde, score, observation, method, **options)
            yield (
                f"{name}: {sampler} {steps}",
                lambda seed, made=made, sampler=sampler, steps=steps: sample(
                    sde, made, (n, D), sampler, steps=steps, grid="karras", seed=seed, dtype=torch.float64
                ),
            )
    for sampler, steps, particles in [("sa_solver", 30, 8)] if quick else PARTICLES:
        yield (
            f"{particles} particles: {sampler} {steps}",
            lambda seed: posterior_sample(
                sde, score, observation, (n, D), particles=particles, sampler=sampler,  # noqa: B023
                steps=steps, seed=seed, dtype=torch.float64,  # noqa: B023
            ),
        )  # fmt: skip


def measure(tasks: list[str], stds: list[float], observations: int, n: int, quick: bool) -> list[dict[str, Any]]:
    """One row for each task, noise and method: means over the observations."""
    data, sde, found = mixture(), HeatODE(T=80.0), []
    sde.t_min = 0.01
    score = data.score(sde)
    for task in tasks:
        a = operators()[task]
        for std in stds:
            cells: dict[str, list[list[float]]] = {}
            for k in range(observations):
                x_0 = data.sample(1, seed=100 + k, dtype=torch.float64)[0]
                noise = torch.randn(len(a), generator=torch.Generator().manual_seed(k), dtype=torch.float64)
                y = a @ x_0 + std * noise
                posterior = data.posterior(a, y, std)
                exact, other = (posterior.sample(n, seed=seed, dtype=torch.float64) for seed in (1, 2))
                cells.setdefault("floor", []).append([sliced_w2(exact, other), mode_error(posterior, other), 0.0, 0.0])
                for name, draw in draws(sde, score, Observation(y, a, std), n, quick):
                    start = time.perf_counter()
                    try:
                        out = draw(k)
                    except FloatingPointError:
                        cells.setdefault(name, []).append([np.inf, np.inf, 0.0, time.perf_counter() - start])
                        continue
                    seconds = time.perf_counter() - start
                    x, ess = (out, 0.0) if isinstance(out, Tensor) else (out.x, float(out.ess.mean()))
                    cells.setdefault(name, []).append([sliced_w2(exact, x), mode_error(posterior, x), ess, seconds])
            for name, values in cells.items():
                w2, modes, ess, seconds = np.mean(values, 0)
                found.append({"task": task, "std": std, "method": name, "w2": w2, "modes": modes, "ess": ess,
                              "seconds": seconds})  # fmt: skip
                print(f"{task}, {std:g}, {name}: {w2:.3f} / {modes:.2f}, {seconds:.1f} s", flush=True)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown, w2 / modes, a column for each task and noise."""
    columns = list(dict.fromkeys((r["task"], r["std"]) for r in found))
    cells = {
        (r["method"], r["task"], r["std"]): "diverges" if r["w2"] > 100 else f"{r['w2']:.3f} / {r['modes']:.2f}"
        for r in found
    }
    names = dict.fromkeys(r["method"] for r in found)
    return markdown(
        ["w2 / modes", *(f"{task}, {std:g}" for task, std in columns)],
        [[name, *(cells[name, *column] for column in columns)] for name in names],
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one y, 64 samples, 8 particles, 30 steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick:
        found = measure(["16 pixels", "2 x 2 means"], [0.3], 1, 64, True)
    else:
        found = measure(list(operators()), [0.05, 0.3], 3, 256, False)
    print(f"\n{table(found)}")
    write(options.out / "posterior.csv", found)


if __name__ == "__main__":
    main()
