"""Bits per dimension of real images that the model has not seen: through the flow, and by the variational bounds.

    pip install -e ".[benchmarks]"
    python benchmarks/bits_per_dim.py          # trains two models, then a table; about half an hour on one thread

Protocol: scikit-learn's 1,797 digits, 8x8, greys 0 ... 16, split at random (seed 0) into 1,438 to train on and
359 held out. One model for VP and one for sub-VP, each trained on the former for 4,000 steps with the settings of the
bundled model (which has seen all images) and kept under --out. All bounds start at the same time, where
sigma/alpha is a third of a bin: there is no detail below, and what a network makes of less noise only costs bits.

"flow": bits_per_dim with truncated-normal dequantisation, Hutchinson's divergence with 4 probes, tolerance 1e-3.
"continuous bound", "chain of N": variational_bound in continuous time, and in N steps. Bits per dimension are means
over the images, +- 1.96 standard errors of the mean (images, dequantisation, probes and noise all vary in it);
"budget": the mean of what solver and prior may be off by. They bound -log2 P(x)/64 of two models with one network: the
flow's density, and the chain that ends in its decoder; of an exact score the chain's is above the continuous bound, and
that above the flow's value. log2(17) = 4.09 is a model that knows nothing.
"""

import argparse
import csv
import math
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sdekit import SDE, VPSDE, SubVPSDE, bits_per_dim, variational_bound
from sdekit.models.network import NetworkScore
from sdekit.training.checkpoint import load_checkpoint, save_checkpoint
from sdekit.training.digits import load_digits, train_digits

LEVELS, HELD_OUT = 17, 359
PROCESSES: dict[str, type[SDE]] = {"VP": VPSDE, "sub-VP": SubVPSDE}


def split(images: Tensor) -> tuple[Tensor, Tensor]:
    """(to train on, held out)."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[HELD_OUT:]], images[order[:HELD_OUT]]


def trained(name: str, images: Tensor, steps: int, out: Path) -> tuple[SDE, NetworkScore]:
    """The model of an earlier run, or a new one."""
    path = out / f"digits-split-{name}-{steps}-steps.safetensors"
    if not path.is_file():
        sde = PROCESSES[name]()
        network = train_digits(sde, images, steps=steps).network
        save_checkpoint(path, network, sde, "v", event=(1, 8, 8), data_range=(-1.0, 1.0))
    return load_checkpoint(path)


def bounds(sde: SDE, score: NetworkScore, x: Tensor, chain: int) -> dict[str, tuple[Tensor, float, int]]:
    """Of each bound: bits per dimension of every image, the budget, the evaluations."""
    flow = bits_per_dim(
        sde, score, x, levels=LEVELS, dequantization="truncated_normal", divergence="hutchinson", probes=4, seed=0
    )
    found = {"flow": (flow.bits, float(flow.error.mean()), flow.nfe)}
    for label, steps, samples in (("continuous bound", None, 64), (f"chain of {chain}", chain, 1)):
        bound = variational_bound(sde, score, x, levels=LEVELS, steps=steps, samples=samples, seed=0)
        found[label] = (bound.bits_per_dim, 0.0, bound.nfe)
    return found


def measure(name: str, sde: SDE, score: NetworkScore, sets: dict[str, Tensor], chain: int) -> list[dict]:
    """One row per bound, with both sets in it."""
    rows: dict[str, dict] = {}
    for which, images in sets.items():
        x = ((images + 1) * 8).round().long()  # the levels 0 ... 16
        parts = [bounds(sde, score, part, chain) for part in x.split(128)]
        for label in parts[0]:
            bits = torch.cat([part[label][0] for part in parts]).double()
            row = rows.setdefault(label, {"process": name, "bound": label})
            row[which] = float(bits.mean())
            row[f"{which} +-"] = 1.96 * float(bits.std()) / math.sqrt(len(bits))
            row["budget"] = statistics.mean(part[label][1] for part in parts)
            row["evaluations"] = max(part[label][2] for part in parts)
    return list(rows.values())


def table(rows: list[dict]) -> str:
    """Markdown: a row per process and bound."""
    lines = ["| process | bound | held out | trained on | budget | evaluations |", "|---|---|---|---|---|---|"]
    for row in rows:
        cells = [f"{float(row[which]):.3f} ± {float(row[f'{which} +-']):.3f}" for which in ("held out", "trained on")]
        budget = f"{float(row['budget']):.4f}" if row["bound"] == "flow" else ""
        lines.append(
            f"| {row['process']} | {row['bound']} | {cells[0]} | {cells[1]} | {budget} | {row['evaluations']} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=HELD_OUT, help="how many of each set")
    parser.add_argument("--steps", type=int, default=4000, help="training steps")
    parser.add_argument("--chain", type=int, default=100, help="steps of the discrete chain")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    kept, held = split(load_digits()[0])
    sets = {"held out": held[: options.images], "trained on": kept[: options.images]}
    rows = []
    for name in PROCESSES:
        sde, score = trained(name, kept, options.steps, options.out)
        sde.t_min = float(sde.inverse_half_log_snr(-math.log(2 / (LEVELS - 1) / 3)))
        rows += measure(name, sde, score, sets, options.chain)
        print(f"{name}: all bounds start at t = {sde.t_min:.4g}", flush=True)
    print(f"\n{options.images} images of each set, torch {torch.__version__}\n\n{table(rows)}")
    with open(options.out / "bits_per_dim.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
