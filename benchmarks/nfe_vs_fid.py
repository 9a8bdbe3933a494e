"""How good are the samples after N network evaluations?

    python benchmarks/nfe_vs_fid.py            # the bundled digits, about three minutes on two cores
    python benchmarks/nfe_vs_fid.py --full     # more samples and columns, the README's table: about half an hour

Every sampler starts from the same noise per seed; the distance is taken to the whole real data set. The floor is
real images against other real images; the bundled model saw all of them, so a good sampler may come out below it.
"""

import argparse
import csv
import statistics
import time
from pathlib import Path

import image_data
import torch
from image_data import Problem
from nfe_vs_fid_figure import draw
from torch import Tensor
from tqdm import tqdm

from sdekit import SAMPLERS, ode_sample, sample
from sdekit.metrics import frechet_distance

FEW = ("dpmpp_2m", "ddim", "heun")  # no noise: made for few evaluations
MANY = ("ancestral", "euler_maruyama", "pc")  # noise in every step
COLUMNS = {"quick": ((5, 8, 10, 20), (20, 50)), "full": ((5, 6, 8, 10, 15, 20, 50), (50, 100))}
SHOWN = (5, 10, 20)  # rows of samples in the figure


class Counted:
    """A score that counts its evaluations."""

    def __init__(self, score: image_data.NetworkScore) -> None:
        self.score, self.device, self.calls = score, score.device, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, like x."""
        self.calls += 1
        return self.score(x, t)


def plan(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(sampler, budget) pairs; 0 stands for an adaptive method, which decides itself."""
    few, many = COLUMNS["full" if options.full else "quick"]
    runs = [(name, nfe) for name in FEW for nfe in few] + [(name, nfe) for name in MANY for nfe in many]
    return [*runs, ("rk45", 0)]


def draw_samples(problem: Problem, name: str, nfe: int, x_T: Tensor, seed: int) -> tuple[Tensor, int]:
    """Samples of one sampler from the noise x_T, and the evaluations that they took."""
    score = Counted(problem.score)
    if name == "rk45":
        return ode_sample(problem.sde, score, x_T.shape, x_T=x_T, seed=seed, rtol=1e-3, atol=1e-3), score.calls
    assert name in SAMPLERS
    return sample(problem.sde, score, x_T.shape, name, nfe=nfe, x_T=x_T, seed=seed), score.calls


def floor(features: Tensor, count: int, seeds: int) -> list[float]:
    """Real against real: ``count`` images (half of all at most) against all others, by random splits."""
    generator = torch.Generator().manual_seed(0)
    count = min(count, len(features) // 2)
    splits = [torch.randperm(len(features), generator=generator) for _ in range(max(seeds, 5))]
    return [frechet_distance(features[order[:count]], features[order[count:]]) for order in splits]


def measure(problem: Problem, options: argparse.Namespace) -> tuple[list[dict], dict[tuple[str, int], Tensor]]:
    """One row per sampler, budget and seed; and a few samples of each sampler for the figure."""
    rows: list[dict] = []
    shown: dict[tuple[str, int], Tensor] = {}
    runs = plan(options)
    real = problem.extractor(problem.images)
    event = problem.images.shape[1:]
    work = tqdm(total=options.seeds * sum(nfe or 60 for _, nfe in runs), unit="evaluation", smoothing=0)
    for seed in range(options.seeds):
        x_T = problem.sde.prior_sample((options.samples, *event), seed=seed)
        for name, nfe in runs:
            work.set_description(f"seed {seed}, {name} {nfe or ''}")
            images, calls = draw_samples(problem, name, nfe, x_T, seed)
            finite = bool(torch.isfinite(images).all())
            distance = frechet_distance(problem.extractor(images), real) if finite else float("nan")
            rows.append({"sampler": name, "budget": nfe, "nfe": calls, "seed": seed, "distance": distance})
            if seed == 0:
                shown[name, nfe] = images[:8].clone()
            work.update(nfe or 60)
    work.close()
    return rows, shown


def summarise(rows: list[dict]) -> dict[str, dict[int, tuple[float, float]]]:
    """sampler -> budget (for rk45 the mean evaluations) -> (mean, standard deviation over the seeds)."""
    table: dict[str, dict[int, tuple[float, float]]] = {}
    for name, budget in dict.fromkeys((row["sampler"], row["budget"]) for row in rows):
        chosen = [row for row in rows if (row["sampler"], row["budget"]) == (name, budget)]
        values = [row["distance"] for row in chosen]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        column = budget or round(statistics.mean(row["nfe"] for row in chosen))
        table.setdefault(name, {})[column] = (statistics.mean(values), spread)
    return table


def show(table: dict[str, dict[int, tuple[float, float]]], floors: list[float]) -> None:
    columns = sorted({nfe for row in table.values() for nfe in row})
    print("evaluations".ljust(16) + "".join(str(nfe).rjust(16) for nfe in columns))
    for name, row in table.items():
        cells = [f"{row[nfe][0]:.3g} ± {row[nfe][1]:.2g}" if nfe in row else "" for nfe in columns]
        print(name.ljust(16) + "".join(cell.rjust(16) for cell in cells))
    print(f"real against real (disjoint): {statistics.mean(floors):.3f} ± {statistics.stdev(floors):.3f}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="all columns, and as many samples as the protocol asks")
    parser.add_argument("--samples", type=int, help="images per sampler, budget and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files, gzip or plain")
    parser.add_argument("--checkpoint", type=Path, help="a score of that data set, by sdekit.training.checkpoint")
    parser.add_argument("--train-steps", type=int, default=1000, help="training steps where no checkpoint is given")
    parser.add_argument("--inception-weights", type=Path, help="pytorch-fid's weight file: the number is the FID then")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.dataset == "fashion-mnist" and options.data is None:
        parser.error("--dataset fashion-mnist needs --data, the folder with train-images-idx3-ubyte[.gz]")
    for name in ("checkpoint", "inception_weights"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name.replace('_', '-')}: no file {path}")
    if options.seeds < 1 or (options.samples is not None and options.samples < 64):
        parser.error("--seeds must be at least 1 and --samples at least 64, or the covariances mean nothing")
    if options.samples is None:
        options.samples = {True: {"digits": 1000, "fashion-mnist": 5000}, False: {"digits": 300, "fashion-mnist": 256}}[
            options.full
        ][options.dataset]
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.dataset == "digits":
        problem = image_data.digits()
        if options.checkpoint is not None:
            problem.sde, problem.score = image_data.load_checkpoint(options.checkpoint)
    else:
        problem = image_data.fashion_mnist(options.data, options.checkpoint, options.train_steps, options.out)
    if options.inception_weights is not None:
        problem = image_data.with_inception(problem, options.inception_weights)
    print(
        f"metric: {problem.metric}; {options.samples} samples per entry against {len(problem.images)} real images; "
        f"seeds 0 ... {options.seeds - 1}, mean ± standard deviation; the same x_T per seed for every sampler; "
        f"{type(problem.sde).__name__}, the library's grids, final denoising counted; torch {torch.__version__}"
    )
    start = time.perf_counter()
    floors = floor(problem.extractor(problem.images), options.samples, options.seeds)
    rows, shown = measure(problem, options)
    table = summarise(rows)
    show(table, floors)
    name = "nfe_vs_fid" if options.dataset == "digits" else f"nfe_vs_fid_{options.dataset}"
    with open(options.out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "samples", "metric"])
        writer.writeheader()
        half = min(options.samples, len(problem.images) // 2)
        splits = [{"sampler": "real", "seed": i, "distance": d, "samples": half} for i, d in enumerate(floors)]
        writer.writerows({"samples": options.samples, "metric": problem.metric} | row for row in [*rows, *splits])
    # The best at 10 evaluations is the one to show at few.
    best = min((n for n in FEW if n in table), key=lambda n: table[n][10][0])
    pictures = {"real": problem.images[:8]} | {f"{nfe} evaluations": shown[best, nfe] for nfe in SHOWN}
    draw(options.out / f"{name}.png", table, floors, problem.metric, options, best, pictures)
    print(f"{time.perf_counter() - start:.0f} s; {options.out / name}.csv and .png")


if __name__ == "__main__":
    main()
