"""How good are the samplers that draw noise, at 50 evaluations of trained networks?

    python benchmarks/noisy_rows.py            # six networks, ten minutes on a thread
    python benchmarks/noisy_rows.py --quick    # does it run? one network, two rows

Protocol: the networks of networks.py; 400 images, clamped to [-1, 1], for each of seeds 0, 1 and 2, float32, default
grids, the final denoising counted. The Fréchet distance is to all 1,797 real images in the features of a small
classifier, mean and standard deviation over seeds. The limit is what the reverse SDE itself comes to, ancestral
sampling in 800 evaluations: a row within its spread has nothing to gain from more steps. "refused": the row has no
first step where alpha(T) = 0, and says so.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import image_data
import networks
import torch
from overhead_measure import write
from tables import markdown

from sdekit import SAMPLERS, sample
from sdekit.evaluation.metrics import frechet_distance

SAMPLES, SEEDS, NFE = 400, 3, 50
LIMIT = ("ancestral", 800)
OURS = [name for name, row in SAMPLERS.items() if row.stochastic]


def measure(names: list[str], rows: list[str], samples: int, seeds: int, limit: int) -> list[dict[str, Any]]:
    """One row for each network and sampler, the limit first."""
    real = image_data.digits(None)
    reference, found = real.extractor(real.images), []
    for network in names:
        sde, score = networks.load(network, samples)
        for label, sampler, nfe in [("limit", LIMIT[0], limit), *((name, name, NFE) for name in rows)]:
            distances = []
            for seed in range(seeds):
                try:
                    x = sample(sde, score, (samples, *networks.EVENT), sampler, nfe=nfe, seed=seed)
                except ValueError as error:
                    if "alpha = 0" not in str(error):
                        raise
                    break
                distances.append(frechet_distance(real.extractor(x.clamp(-1, 1)), reference))
            mean, spread = (f(distances) if len(distances) > 1 else "" for f in (statistics.mean, statistics.stdev))
            found.append({"network": network, "sampler": label, "nfe": nfe, "distance": mean, "spread": spread})
        print(f"{network}: done", flush=True)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Markdown, a column for each network. Also of the CSV's rows."""
    names = list(dict.fromkeys(row["network"] for row in found))
    cells = {
        (row["sampler"], row["network"]): "refused"
        if row["distance"] == ""
        else f"{row['distance']:.3g} ± {row['spread']:.1g}"
        for row in found
    }
    lines = [
        [name, *(cells[name, network] for network in names)] for name in dict.fromkeys(r["sampler"] for r in found)
    ]
    return markdown(["distance", *names], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one network, two rows, 64 images")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick:
        found = measure(["v_zero_snr"], ["sa_solver", "euler_maruyama"], 64, 2, 60)
    else:
        found = measure(list(networks.BENCH), OURS, SAMPLES, SEEDS, LIMIT[1])
    print(f"\n{table(found)}")
    write(options.out / "noisy_rows.csv", found)


if __name__ == "__main__":
    main()
