"""How good are the samples after N network evaluations?

    python benchmarks/nfe_vs_fid.py            # the bundled digits, a few minutes on two cores
    python benchmarks/nfe_vs_fid.py --full     # every sampler, three times the images, PC at 2,000: an hour and a half

Every sampler starts from the same noise per seed. "clipped" is static thresholding of x_0, at every evaluation.
"calibrated" is fitted to the model by sdekit.calibrate on other noises, without clipping; the fits for the bundled
model lie in benchmarks/results/calibrations and are made anew where they are missing or with --recalibrate.

The real images are split into two random halves per seed: samples, clamped to the images' range, are compared with one
half; the floor compares as many images of the other half with it. The distance is biased upwards by few images, equally
so for all rows, which hides the ratio of two good ones: --full takes as many as there are. The bundled model saw both
halves, so a good sampler comes out below the floor.
"""

import argparse
import csv
import math
import statistics
import time
from pathlib import Path
from typing import Any

import image_data
import torch
from image_data import Problem
from nfe_vs_fid_figure import Entry, Table, draw
from torch import Tensor
from tqdm import tqdm

from sdekit import (
    SAMPLERS,
    SDE,
    Calibration,
    SolverError,
    calibrate,
    load_calibration,
    ode_sample,
    sample,
    static_threshold,
)
from sdekit.evaluation.metrics import frechet_distance
from sdekit.processes.counted import as_model

CALIBRATIONS = Path(__file__).parent / "results" / "calibrations"
FIT = {"noises": 512, "iterations": 300, "batch": 64}  # a few minutes each; twice calibrate's own iterations and batch
_GUESS = 100  # evaluations of an adaptive method, for the progress bar
SHOWN = (5, 6, 10)  # rows of samples in the figure
QUICK = {  # budgets -> samplers
    (5, 6, 10, 20): ("dpmpp_2m", "ipndm", "flow_3m", "ddim", "heun"),
    (5, 10): ("dpmpp_2m, clipped", "flow_3m, clipped"),
    (5, 6, 8, 10): ("calibrated",),
    (20, 50): ("sa_solver", "ancestral", "pc"),
}
_FLOW = tuple(name for name, row in SAMPLERS.items() if not row.stochastic and name not in ("euler", "rk4"))
_NOISY = tuple(name for name, row in SAMPLERS.items() if row.stochastic and name != "pc")
FULL = {
    (5, 6, 10, 20): _FLOW,
    (5, 10): tuple(f"{name}, clipped" for name in _FLOW),
    (5, 6, 8, 10): ("calibrated", "calibrated, clipped"),
    (50,): _NOISY,
    (50, 2000): ("pc",),
}


ADAPTIVE = {"rk45": 1e-3, "adams": 1e-2}  # method -> tolerance; they choose their evaluations themselves


class Counted:
    """A model that counts its evaluations, and says what it said."""

    def __init__(self, score: Any, sde: SDE) -> None:
        self.score, self.device, self.calls = score, score.device, 0
        self.model = as_model(score, sde)
        self.sde, self.predicts, self.prepare = self.model.sde, self.model.predicts, self.model.prepare

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The score, like x."""
        self.calls += 1
        return self.score(x, t)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What the network says, like x."""
        self.calls += 1
        return self.model.output(x, time, ready)


def plan(options: argparse.Namespace) -> list[tuple[str, int]]:
    """(sampler, budget) pairs; 0 stands for an adaptive method, which decides itself."""
    chosen = FULL if options.full else QUICK
    runs = [(name, nfe) for budgets, names in chosen.items() for name in names for nfe in budgets]
    runs += [(name, 0) for name in ADAPTIVE]
    return [(name, nfe) for name, nfe in runs if not options.only or name in options.only]


def calibrations(problem: Problem, options: argparse.Namespace, rows: list[dict]) -> dict[int, Calibration]:
    """The fits of every budget that the plan asks for, or that rows of an earlier run are of."""
    found, asked = {}, plan(options) + [(row["sampler"], row["budget"]) for row in rows]
    for nfe in sorted({nfe for name, nfe in asked if name.startswith("calibrated")}):
        made = options.out / "calibrations" / f"{options.dataset}_{nfe}.json"
        kept = CALIBRATIONS / made.name
        if options.checkpoint is None and options.dataset == "digits" and kept.is_file() and not options.recalibrate:
            found[nfe] = load_calibration(kept)
            continue
        found[nfe] = calibrate(
            problem.sde, problem.score, (1, *problem.images.shape[1:]), nfe=nfe, seed=1000, progress=True, **FIT
        )
        made.parent.mkdir(parents=True, exist_ok=True)
        found[nfe].save(made)
        print(f"calibrated for {nfe}: RMS to the flow {found[nfe].start_error:.3g} -> {found[nfe].error:.3g}; {made}")
    return found


def halves(problem: Problem, seed: int) -> tuple[Tensor, Tensor]:
    """Features of two disjoint random halves of the real images: to compare with, and for the floor."""
    features = problem.extractor(problem.images)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
    return features[order[: len(order) // 2]], features[order[len(order) // 2 :]]


def draw_samples(
    problem: Problem, name: str, nfe: int, x_T: Tensor, seed: int, fits: dict[int, Calibration]
) -> tuple[Tensor, int]:
    """Samples of one sampler from the noise x_T, and the evaluations that they took."""
    score: Any = Counted(problem.score, problem.sde)
    counted, (name, *clipped) = score, name.split(", ")
    if clipped:
        score = static_threshold(problem.sde, score, (-1.0, 1.0))
    if name == "calibrated":
        images = sample(problem.sde, score, x_T.shape, fits[nfe], x_T=x_T)
    elif name in ADAPTIVE:
        tolerance = ADAPTIVE[name]
        images = ode_sample(problem.sde, score, x_T.shape, method=name, x_T=x_T, rtol=tolerance, atol=tolerance)
    else:
        images = sample(problem.sde, score, x_T.shape, name, nfe=nfe, x_T=x_T, seed=seed)
    return images.clamp(-1, 1), counted.calls


def measure(
    problem: Problem, options: argparse.Namespace, rows: list[dict], fits: dict[int, Calibration]
) -> list[dict]:
    """One row per sampler, budget and seed (and the floor's), after those that are there already."""
    rows, have = list(rows), {(row["sampler"], row["budget"], row["seed"]) for row in rows}
    runs = plan(options)
    work = tqdm(total=options.seeds * sum(nfe or _GUESS for _, nfe in runs), unit="evaluation", smoothing=0)
    for seed in range(options.seeds):
        reference, others = halves(problem, seed)
        x_T = problem.sde.prior_sample((options.samples, *problem.images.shape[1:]), seed=seed)
        if ("real", 0, seed) not in have:
            distance = frechet_distance(others[: options.samples], reference)
            rows.append({"sampler": "real", "budget": 0, "nfe": 0, "seed": seed, "distance": distance})
        for name, nfe in runs:
            work.set_description(f"seed {seed}, {name} {nfe or ''}")
            work.update(nfe or _GUESS)
            if (name, nfe, seed) in have:
                continue
            try:
                images, calls = draw_samples(problem, name, nfe, x_T, seed, fits)
                distance = frechet_distance(problem.extractor(images), reference)
            except (FloatingPointError, SolverError) as error:
                work.write(f"{name} at {nfe}: {error}")
                calls, distance = nfe, float("nan")
            rows.append({"sampler": name, "budget": nfe, "nfe": calls, "seed": seed, "distance": distance})
    work.close()
    return rows


def earlier(path: Path, problem: Problem, options: argparse.Namespace) -> list[dict]:
    """The rows of an earlier run of the same protocol, with --resume."""
    if not options.resume or not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = [
            {"sampler": row["sampler"], "budget": int(row["budget"]), "nfe": int(row["nfe"]), "seed": int(row["seed"]),
             "distance": float(row["distance"])}
            for row in csv.DictReader(file)
            if int(row["samples"]) == options.samples and row["metric"] == problem.metric
        ]  # fmt: skip
    return [row for row in rows if row["seed"] < options.seeds]


def summarise(rows: list[dict]) -> Table:
    """sampler -> budget (for an adaptive method and for real images the evaluations) -> its Entry."""
    table: Table = {}
    for name, budget in dict.fromkeys((row["sampler"], row["budget"]) for row in rows):
        chosen = [row for row in rows if (row["sampler"], row["budget"]) == (name, budget)]
        values = [row["distance"] for row in chosen]
        told = len(values) > 1 and all(map(math.isfinite, values))  # one seed tells nothing of it, nor a breakdown
        spread = statistics.stdev(values) if told else math.nan
        nfe = statistics.mean(row["nfe"] for row in chosen)
        table.setdefault(name, {})[budget or round(nfe)] = Entry(statistics.mean(values), spread, nfe)
    return table


def markdown(table: Table) -> str:
    """The table: a column per budget of evaluations."""
    columns = sorted({nfe for name, row in table.items() for nfe in row if name != "real"})
    lines = ["| evaluations, at most | " + " | ".join(map(str, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in table.items():
        if name != "real":
            lines.append(f"| {name} | " + " | ".join(str(row[nfe]) if nfe in row else "" for nfe in columns) + " |")
    return "\n".join([*lines, f"| real images (floor) | {table['real'][0]} |" + " |" * (len(columns) - 1)])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every sampler, and predictor-corrector at 2,000")
    parser.add_argument("--only", nargs="+", metavar="SAMPLER", help="these rows of the plan alone")
    parser.add_argument("--resume", action="store_true", help="keep the entries that the CSV in --out already holds")
    parser.add_argument("--recalibrate", action="store_true", help="fit the calibrated sampler anew")
    parser.add_argument("--samples", type=int, help="images per sampler, budget and seed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dataset", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST's IDX files, gzip or plain")
    parser.add_argument("--checkpoint", type=Path, help="a score of that data set, by sdekit.training.checkpoint")
    parser.add_argument("--train-steps", type=int, default=1000, help="training steps where no checkpoint is given")
    parser.add_argument("--inception-weights", type=Path, help="pytorch-fid's weight file: the number is the FID then")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    if options.dataset == "fashion-mnist" and options.data is None:
        parser.error("--dataset fashion-mnist needs --data, the folder with train-images-idx3-ubyte[.gz]")
    for name in ("checkpoint", "inception_weights"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            parser.error(f"--{name.replace('_', '-')}: no file {path}")
    if options.seeds < 1 or (options.samples is not None and options.samples < 64):
        parser.error("--seeds must be at least 1 and --samples at least 64, or the covariances mean nothing")
    if options.data is not None and options.dataset == "digits":
        parser.error("--data is for --dataset fashion-mnist; the digits come with scikit-learn")
    most = {"digits": 898, "fashion-mnist": 5000}[options.dataset]  # half of the real images
    if options.samples is None:
        options.samples = min(most, 898 if options.full else 300)
    if options.samples > most:
        parser.error(f"--samples must be at most {most}, half of the real images, for a floor of as many")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.dataset == "digits":
        problem = image_data.digits(options.checkpoint)
    else:
        problem = image_data.fashion_mnist(options.data, options.checkpoint, options.train_steps, options.out)
    if options.inception_weights is not None:
        problem = image_data.with_inception(problem, options.inception_weights)
    print(
        f"metric: {problem.metric}; {options.samples} samples per entry, clamped to [-1, 1], against half of the "
        f"{len(problem.images)} real images; floor: {options.samples} of the other half against it; "
        f"seeds 0 ... {options.seeds - 1}, mean ± standard deviation; the same x_T per seed for every sampler; "
        f"{type(problem.sde).__name__}, the library's grids, final denoising counted; torch {torch.__version__}\n"
    )
    start = time.perf_counter()
    name = f"nfe_vs_fid_{options.dataset}" + ("_inception" if options.inception_weights else "")
    rows = earlier(options.out / f"{name}.csv", problem, options)
    fits = calibrations(problem, options, rows)
    rows = measure(problem, options, rows, fits)
    table = summarise(rows)
    print(markdown(table))
    with open(options.out / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "samples", "metric"])
        writer.writeheader()
        writer.writerows({**row, "samples": options.samples, "metric": problem.metric} for row in rows)
    # The best at the fewest evaluations is the one to show.
    few = min((nfe for row in table.values() for nfe in row if nfe), default=0)
    best = min(
        (n for n in table if few in table[n]), key=lambda n: (math.isnan(table[n][few].mean), table[n][few].mean)
    )
    x_T = problem.sde.prior_sample((8, *problem.images.shape[1:]), seed=0)
    pictures = {"real": problem.images[:8]}
    for nfe in (nfe for nfe in SHOWN if nfe in table[best]):
        try:
            pictures[f"{nfe} evaluations"] = draw_samples(problem, best, nfe, x_T, 0, fits)[0]
        except FloatingPointError:
            pictures[f"{nfe} evaluations"] = torch.full_like(x_T, -1.0)
    draw(options.out / f"{name}.png", table, problem.metric, options, best, pictures)
    print(f"\n{time.perf_counter() - start:.0f} s; {options.out / name}.csv and .png")


if __name__ == "__main__":
    main()
