"""Poisson flow beside diffusion: the same network trained on the same digits under three processes.

    python benchmarks/poisson.py            # a few minutes on one thread
    python benchmarks/poisson.py --quick    # does it run? one seed, 128 samples, two budgets

Protocol: U-Nets of 0.17M weights of networks.py, 4,000 steps each: VPSDE() predicting eps; HeatODE() and
PoissonFlow(128) (PFGM++) predicting x_0 by EDM's preconditioning, weighting and times, which so differ in the kernel
alone. Each draws from its own prior, by the default sampler unipc_2 on the library's grids, the final denoising
counted. 898 samples, clamped to [-1, 1], against half of scikit-learn's 1,797 digits, in the features of a small
classifier; the floor is the other half. Seeds 0, 1, 2: mean and standard deviation. The networks saw both halves.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import image_data
import matplotlib.pyplot as plt
import networks
import torch
from nfe_vs_fid import halves
from overhead_measure import write
from tables import markdown
from torch import Tensor

from sdekit import sample
from sdekit.evaluation.metrics import frechet_distance

ROWS = {
    "eps_linear": "VPSDE(), eps",
    "x0_edm": "HeatODE(), x_0 (EDM)",
    "x0_poisson": "PoissonFlow(128), x_0 (PFGM++)",
}
BUDGETS, SEEDS, SAMPLES = (5, 8, 10, 20, 50), 3, 898
SHOWN = (5, 10, 50)


def measure(budgets: tuple[int, ...], seeds: int, samples: int) -> tuple[list[dict[str, Any]], dict[str, list[Tensor]]]:
    """One row for each network, budget and seed, and the floor's; and pictures of SHOWN budgets, by network."""
    problem = image_data.digits(None)
    found: list[dict[str, Any]] = []
    pictures: dict[str, list[Tensor]] = {name: [] for name in ROWS}
    for seed in range(seeds):
        reference, others = halves(problem, seed)
        floor = frechet_distance(others[:samples], reference)
        found.append({"network": "real images", "nfe": 0, "seed": seed, "distance": floor})
        for name in ROWS:
            sde, score = networks.load(name, samples)
            for nfe in budgets:
                x = sample(sde, score, (samples, *networks.EVENT), nfe=nfe, seed=seed).clamp(-1, 1)
                distance = frechet_distance(problem.extractor(x), reference)
                found.append({"network": name, "nfe": nfe, "seed": seed, "distance": distance})
                if seed == 0 and nfe in SHOWN:
                    pictures[name].append(x[:10, 0])
                print(f"seed {seed}, {name} at {nfe}: {distance:.3f}", flush=True)
    return found, pictures


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: a row for each network, a column for each budget."""
    budgets = sorted({row["nfe"] for row in found if row["nfe"]})

    def cell(name: str, nfe: int) -> str:
        values = [row["distance"] for row in found if (row["network"], row["nfe"]) == (name, nfe)]
        return f"{statistics.mean(values):.3g}" + (f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else "")

    rows = [[label, *(cell(name, nfe) for nfe in budgets)] for name, label in ROWS.items()]
    return markdown(
        ["evaluations", *map(str, budgets)],
        [*rows, ["real images (floor)", cell("real images", 0), *[""] * (len(budgets) - 1)]],
    )


def draw(path: Path, pictures: dict[str, list[Tensor]]) -> None:
    """Ten samples of each network at each of SHOWN budgets, from seed 0."""
    figure, axes = plt.subplots(len(ROWS), 1, figsize=(7, 6.6), layout="constrained")
    for axis, (name, label) in zip(axes, ROWS.items(), strict=True):
        tiles = torch.nn.functional.pad(torch.stack(pictures[name]), (1, 1, 1, 1), value=-1.0)
        axis.imshow(tiles.transpose(1, 2).reshape(len(tiles) * 10, 100), cmap="gray_r", vmin=-1, vmax=1)
        axis.set(title=label, xticks=[], yticks=[10 * k + 5 for k in range(len(tiles))],
                 yticklabels=[f"{nfe} evaluations" for nfe in SHOWN[: len(tiles)]])  # fmt: skip
        axis.tick_params(length=0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 128 samples, 5 and 10 evaluations")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    found, pictures = measure((5, 10), 1, 128) if options.quick else measure(BUDGETS, SEEDS, SAMPLES)
    print(f"\n{table(found)}")
    write(options.out / "poisson.csv", found)
    draw(options.out / "poisson.png", pictures)


if __name__ == "__main__":
    main()
