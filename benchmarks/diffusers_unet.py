"""A trained diffusers U-Net as its user has it: diffusers' schedulers, ours and a calibration, from the same noises.

    pip install -e ".[peers]"
    python benchmarks/diffusers_unet.py            # the table: six minutes on a thread
    python benchmarks/diffusers_unet.py --quick    # does it run? two rows a side, 8 images, no calibration
    python benchmarks/diffusers_unet.py --train    # train the network anew into benchmarks/networks, four minutes

The network is a ``UNet2DModel`` of 0.25M weights on scikit-learn's digits (8 x 8, in [-1, 1]) that predicts eps under
the betas of diffusers' ``DDPMScheduler`` and was told its times 0 ... 999. sdekit's trainer trained it from seed 0,
``save_pretrained`` kept it and the scheduler (float16), and here ``from_pretrained`` reads them, as of any pipeline.

Protocol: 64 noises (seed 0), float32, one thread. diffusers' schedulers are the rows of diffusers_rows.py, made of the
scheduler's training settings, each on its own grid in the loop of diffusers' pipelines; ours run on what
``from_diffusers`` returns, on their default grids, the final denoising counted. Evaluations are counted at the network.
The error is the root mean square over pixels of the difference to where the network's own probability flow takes the
same noise (unipc_2 in 1,000 steps), its mean over images. Calibrations are fitted to 512 other noises (seed 1). Time:
the median of this thread's seconds for an image at 10 evaluations over that of the loop with ``DDIMScheduler``, by
turns, for one image at a time and for 64 at once.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers_rows
import torch
from nfe_vs_error import DEFAULT, OURS, REFERENCE, SAMPLES, best_of, difference
from overhead_measure import keep_memory, seconds, write
from tables import markdown
from torch import Tensor, nn

from sdekit import BetaTable, Calibration, bits_per_dim, calibrate, ode_sample, sample
from sdekit.training.digits import load_digits
from sdekit.training.trainer import train

FOLDER = Path(__file__).parent / "networks" / "diffusers_unet"
EVENT = (1, 8, 8)
STEPS = 4000
COLUMNS = (5, 6, 8, 10, 15, 20)
CALIBRATED = (5, 6, 8, 10)
TIMED = 10
TIMED_ROWS = (DEFAULT, "dpmpp_2m", "ddim", "flow_unipc_3")
SHOWN = 8
SIDES = ("sdekit", "diffusers", "calibrated")
Row = dict[str, Any]
# what a scheduler's config says of the training; the rest is how its pipeline samples
TRAINING = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8, "attention_head_dim": 8,
}  # fmt: skip


class Told(nn.Module):
    """The U-Net at t of BetaTable, whose i-th time i/N is index i - 1 of diffusers' table."""

    def __init__(self, unet: nn.Module, n: int) -> None:
        super().__init__()
        self.unet, self.n = unet, n

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Eps, like x."""
        return self.unet(x, (self.n * t - 1).round()).sample


def make(folder: Path, steps: int = STEPS) -> float:
    """Train the network and write it as diffusers does; the loss over the last 200 steps."""
    from diffusers import DDPMScheduler, UNet2DModel

    scheduler = DDPMScheduler(clip_sample=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(**UNET)
    trained = train(
        Told(unet, len(scheduler.betas)), BetaTable(scheduler.betas), load_digits()[0], predicts="eps", times="table",
        steps=steps, batch=64, lr=2e-3, ema=0.999, seed=0, progress=True,
    )  # fmt: skip
    trained.network.unet.half().save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return float(trained.losses[-200:].mean())


class Bench:
    """The network, the noises, and where its own flow takes them; ``calls``: of the network, so far."""

    def __init__(self, folder: Path, samples: int, reference: int = REFERENCE) -> None:
        from diffusers import DDPMScheduler, UNet2DModel

        from sdekit.adapters.diffusers import from_diffusers

        self.unet = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).eval()
        self.config = DDPMScheduler.from_pretrained(folder / "scheduler").config
        self.sde, self.score = from_diffusers(self.unet, self.config)
        self.calls = 0
        self.unet.register_forward_pre_hook(self._count)
        self.x_T = self.sde.prior_sample((samples, *EVENT), seed=0)
        self.exact = self.ours("unipc_2", steps=reference)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def ours(self, sampler: str | Calibration, x_T: Tensor | None = None, **budget: Any) -> Tensor:
        """Samples by a row of ours, or a calibration."""
        x_T = self.x_T if x_T is None else x_T
        return sample(self.sde, self.score, x_T.shape, sampler, x_T=x_T, **budget)

    @torch.no_grad()
    def theirs(self, name: str, nfe: int, x_T: Tensor | None = None) -> Tensor:
        """Samples by a scheduler in a pipeline's loop, in as many steps as ``nfe`` evaluations are enough for."""
        import diffusers

        kind, settings = diffusers_rows.DISCRETE[name]
        trained = {key: self.config[key] for key in TRAINING}
        scheduler, steps = getattr(diffusers, kind)(**trained, **settings), nfe
        scheduler.set_timesteps(steps)
        while len(scheduler.timesteps) > nfe:  # Heun's steps take two, and PNDM's first
            steps -= 1
            scheduler.set_timesteps(steps)
        x = (self.x_T if x_T is None else x_T) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = self.unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(out, t, x, return_dict=False)[0]
        return x

    def fit(self, nfe: int, noises: int = 512) -> Calibration:
        """The calibration for a budget."""
        return calibrate(self.sde, self.score, (1, *EVENT), nfe=nfe, noises=noises, seed=1)


def measure(bench: Bench, ours: list[str], theirs: list[str], fits: dict[int, Calibration]) -> list[Row]:
    """One row for each side, sampler and budget: its error, and the evaluations that it took."""
    runs: list[tuple[str, str, Callable[[int], Tensor]]] = [
        *(("sdekit", name, lambda nfe, name=name: bench.ours(name, nfe=nfe)) for name in ours),
        *(("diffusers", name, partial(bench.theirs, name)) for name in theirs),
        ("calibrated", "calibrated", lambda nfe: bench.ours(fits[nfe])),
    ]
    found: list[Row] = []
    for side, name, run in runs:
        for nfe in COLUMNS if side != "calibrated" else fits:
            before = bench.calls
            error = difference(run(nfe), bench.exact)
            taken = bench.calls - before
            assert taken <= nfe, f"{name} took {taken} evaluations of {nfe}"
            found.append({"side": side, "sampler": name, "nfe": nfe, "evaluations": taken, "error": error})
    return found


def costs(bench: Bench, ours: list[str], theirs: list[str], fits: dict[int, Calibration], turns: int) -> list[Row]:
    """Seconds for an image at 10 evaluations, as a ratio to diffusers' DDIM in the same turn."""
    runs: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
        *(("diffusers", name, lambda x_T, name=name: bench.theirs(name, TIMED, x_T)) for name in theirs),
        *(("sdekit", name, lambda x_T, name=name: bench.ours(name, x_T, nfe=TIMED)) for name in ours),
        *(("calibrated", "calibrated", lambda x_T, fit=fit: bench.ours(fit, x_T)) for fit in [fits.get(TIMED)] if fit),
    ]
    found: list[Row] = []
    for batch in (1, len(bench.x_T)):
        x_T = bench.x_T[:batch]
        spent: list[list[float]] = [[] for _ in runs]
        for turn in range(turns + 1):
            for row, (_, _, run) in zip(spent, runs, strict=True):
                taken = seconds(partial(run, x_T))
                if turn:  # the first is to warm up
                    row.append(taken / batch)
        base = spent[[name for _, name, _ in runs].index("DDIM")]
        for (side, name, _), row in zip(runs, spent, strict=True):
            ratio = statistics.median(one / by for one, by in zip(row, base, strict=True))
            found.append(
                {"side": side, "sampler": name, "batch": batch, "seconds": statistics.median(row), "ratio": ratio}
            )
    return found


def errors(found: list[Row], side: str, name: str) -> dict[int, float]:
    """A sampler's, by budget."""
    return {row["nfe"]: row["error"] for row in found if (row["side"], row["sampler"]) == (side, name)}


def table(found: list[Row], spent: list[Row]) -> str:
    """Markdown: every sampler's error at every budget, and what it costs."""
    ratios = {(row["side"], row["sampler"], row["batch"]): row["ratio"] for row in spent}
    batches = sorted({row["batch"] for row in spent})
    lines = []
    for side, name in dict.fromkeys((row["side"], row["sampler"]) for row in found):
        at = errors(found, side, name)
        cells = [f"{at[nfe]:.3g}" if nfe in at else "" for nfe in COLUMNS]
        cost = [f"{ratios[side, name, b]:.2f}" if (side, name, b) in ratios else "" for b in batches]
        label = {"diffusers": f"diffusers {name}"}.get(side, f"**{name}**" if name == DEFAULT else name)
        lines.append([label, *cells, *cost])
    best = best_of(found, "diffusers")
    lines.append(["best of diffusers", *(f"{best[n][0]:.3g} ({best[n][1]})" for n in COLUMNS), *("" for _ in batches)])
    times = [f"time, {b} image{'s' * (b > 1)}" for b in batches]
    return markdown(["error at evaluations", *map(str, COLUMNS), *times], lines)


def adaptive(bench: Bench) -> list[Row]:
    """Adams' errors and bits per dimension, which a scheduler has no word for: what, by how many evaluations."""
    found = []
    for tolerance in (1e-2, 1e-3, 1e-4):
        before = bench.calls
        x = ode_sample(bench.sde, bench.score, bench.x_T.shape, rtol=tolerance, atol=tolerance, x_T=bench.x_T)
        error, taken = difference(x, bench.exact), bench.calls - before
        found.append({"method": "adams", "tolerance": tolerance, "evaluations": taken, "value": error, "spread": 0.0})
    images = load_digits()[0]
    images = ((images[:: len(images) // len(bench.x_T)][: len(bench.x_T)] + 1) * 8).round().long()
    bits = bits_per_dim(
        bench.sde, bench.score, images, levels=17, dequantization="truncated_normal", divergence="hutchinson",
        probes=4, seed=0,
    )  # fmt: skip
    value, spread = float(bits.bits.mean()), float(bits.bits.std() / len(images) ** 0.5)
    return [*found, {"method": "bits", "tolerance": 0.0, "evaluations": bits.nfe, "value": value, "spread": spread}]


def draw(path: Path, found: list[Row], bench: Bench, fits: dict[int, Calibration]) -> None:
    """Errors over evaluations, and what the samplers make of the same noises in the fewest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (panel, pictures) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1.1, 1))
    for name in dict.fromkeys(row["sampler"] for row in found if row["side"] == "diffusers"):
        at = errors(found, "diffusers", name)
        panel.loglog(list(at), list(at.values()), color="tab:red", lw=0.7, alpha=0.3, zorder=1)
    best = {side: {nfe: error for nfe, (error, _) in best_of(found, side).items()} for side in SIDES}
    for label, colour, at in (
        ("diffusers: best scheduler of each budget", "tab:red", best["diffusers"]),
        (f"sdekit: {DEFAULT}, the default", "tab:blue", errors(found, "sdekit", DEFAULT)),
        ("sdekit: best row of each budget", "tab:green", best["sdekit"]),
        ("sdekit: calibrated", "black", best["calibrated"]),
    ):
        if at:
            panel.loglog(list(at), list(at.values()), color=colour, marker="o", ms=4, label=label)
    panel.set_xticks(COLUMNS, map(str, COLUMNS))
    low, high = panel.get_ylim()[0], 3 * max(best["diffusers"].values())  # Heun's error at 5 is 350 times the best's
    marks = [m * 10.0**k for k in range(-4, 1) for m in (1, 2, 5) if low < m * 10.0**k < high]
    panel.set_yticks(marks, [f"{mark:g}" for mark in marks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.set(ylim=(low, high), xlabel="network evaluations", ylabel="RMS error to the network's own flow")
    figure.legend(*panel.get_legend_handles_labels(), loc="lower right", ncols=2, fontsize=9, frameon=False)

    few, first = COLUMNS[0], bench.x_T[:SHOWN]
    name = best_of(found, "diffusers")[few][1]
    rows = {
        "the network's\nown flow": bench.exact[:SHOWN],
        f"diffusers'\nbest, {name}": bench.theirs(name, few, first),
        f"sdekit's default,\n{DEFAULT}": bench.ours(DEFAULT, first, nfe=few),
    } | ({"sdekit,\ncalibrated": bench.ours(fits[few], first)} if few in fits else {})
    tiles = torch.stack([torch.nn.functional.pad(x[:, 0], (1, 1, 1, 1), value=1.0) for x in rows.values()])
    side = tiles.shape[-1]
    wall = tiles.permute(0, 2, 1, 3).reshape(len(rows) * side, -1)
    pictures.imshow(wall.clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
    pictures.set_yticks([side * (i + 0.5) - 0.5 for i in range(len(rows))], list(rows))
    pictures.set_xticks([])
    pictures.set_anchor("N")
    pictures.set_title(f"{few} evaluations, the same {SHOWN} noises", fontsize=10)
    pictures.spines[:].set_visible(False)
    pictures.tick_params(length=0)
    figure.suptitle("A diffusers UNet2DModel on 8 x 8 digits", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="train the network and stop")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the network is")
    parser.add_argument("--quick", action="store_true", help="two rows a side, 8 images, no calibration")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    if options.train:
        print(f"loss {make(options.folder):.4f} over the last 200 steps")
        return
    torch.set_num_threads(1)
    keep_memory()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick:
        bench, ours, theirs = Bench(options.folder, 8, 100), [DEFAULT, "ddim"], ["DDIM", "DPM++ 2M"]
        fits: dict[int, Calibration] = {}
    else:
        bench, ours, theirs = Bench(options.folder, SAMPLES), OURS, list(diffusers_rows.DISCRETE)
        fits = {nfe: bench.fit(nfe) for nfe in CALIBRATED}
    found = measure(bench, ours, theirs, fits)
    spent = costs(bench, [name for name in TIMED_ROWS if name in ours], theirs, fits, 1 if options.quick else 9)
    more = adaptive(bench)
    print("", table(found, spent), *more, sep="\n")
    for name, rows in (("", found), ("_time", spent), ("_adaptive", more)):
        write(options.out / f"diffusers_unet{name}.csv", rows)
    draw(options.out / "diffusers_unet.png", found, bench, fits)


if __name__ == "__main__":
    main()
