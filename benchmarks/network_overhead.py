"""Is sampling with a small real network faster than diffusers' own loop?

    pip install -e ".[peers]"
    python benchmarks/network_overhead.py            # a few minutes on two threads
    python benchmarks/network_overhead.py --quick    # does it run? three pairs at batch 1

Protocol: diffusers' UNet2DModel of 32 and 64 channels at 16 x 16, random weights and x_T by seed 0, float32, two
threads, 20 evaluations. Theirs is the loop of DDIMPipeline with a scheduler as it comes (1,000 betas), but for DDIM's
clipping, which ours has not; ours is ``sample`` with the sampler of that name on the scheduler's betas, through
``as_score``, and the final denoising is one of its 20. Times are from the call to the result. A pair is one run of
each, and who begins takes turns; the ratio is the median over pairs of ours to theirs, with its quartiles, after a pair
that is left out. On a machine that does anything else it tells little; what does is the part of the time that is spent
beside the network, in CPU time of the thread that calls it.
gpu.py has the same loops on a GPU.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from overhead_measure import Row, Run, write
from tables import markdown
from torch import Tensor, nn

from sdekit import BetaTable, as_score, sample
from sdekit.training.networks import seeded

NFE = 20
THREADS = 2
BATCHES = (1, 16)
# Of diffusers' UNet2DModel: a small one, and that of google/ddpm-cifar10-32.
MODELS: dict[str, dict[str, Any]] = {
    "small": {
        "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "ddpm-cifar10-32": {
        "sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
    },
}  # fmt: skip
SCHEDULERS = {"ddim": ("DDIMScheduler", {"clip_sample": False}), "dpmpp_2m": ("DPMSolverMultistepScheduler", {})}


def unet(kind: str, seed: int) -> nn.Module:
    """One of MODELS, with random weights."""
    import diffusers

    return seeded(diffusers.UNet2DModel, seed, {"in_channels": 3, "out_channels": 3, **MODELS[kind]}).eval()


def our_loop(model: nn.Module, scheduler: Any, name: str, x_T: Tensor) -> Callable[[], Tensor]:
    """Our sampler on the scheduler's own process; its network counts times from 0 to 999."""
    sde, n = BetaTable(scheduler.betas), len(scheduler.betas)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return model(x, t, return_dict=False)[0]

    score = as_score(network, sde, "eps", time=lambda t: n * t - 1)
    return partial(sample, sde, score, x_T.shape, name, nfe=NFE, x_T=x_T)


def their_loop(model: nn.Module, scheduler: Any, x_T: Tensor) -> Callable[[], Tensor]:
    """The loop of diffusers' DDIMPipeline."""

    @torch.no_grad()
    def loop() -> Tensor:
        scheduler.set_timesteps(NFE)
        x = x_T
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
        return x

    return loop


def both(model: nn.Module, name: str, x_T: Tensor) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Our loop and theirs, of a row of SCHEDULERS."""
    import diffusers

    kind, settings = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind)(**settings)
    return our_loop(model, scheduler, name, x_T), their_loop(model, scheduler, x_T)


def evaluations(model: nn.Module, run: Run) -> int:
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(1))
    run()
    hook.remove()
    return len(seen)


class Watch:
    """Measures runs of a network."""

    def __init__(self, model: nn.Module) -> None:
        self.marks: list[float] = []
        model.register_forward_pre_hook(lambda *_: self.marks.append(time.thread_time()))
        model.register_forward_hook(lambda *_: self.marks.append(time.thread_time()))

    def __call__(self, run: Run) -> tuple[float, float]:
        """Seconds from the call to the result, and of those of this thread's work that are not the network's.

        Raises RuntimeError where it is called more or less often than NFE times.
        """
        self.marks.clear()
        start, begin = time.perf_counter(), time.thread_time()
        run()
        end, whole = time.thread_time(), time.perf_counter() - start
        if len(self.marks) != 2 * NFE:
            raise RuntimeError(f"{len(self.marks) // 2} evaluations, not {NFE}")
        return whole, end - begin - sum(b - a for a, b in zip(self.marks[::2], self.marks[1::2], strict=True))


def pairs(watch: Callable[[Run], Any], ours: Run, theirs: Run, n: int) -> list[tuple[Any, Any]]:
    """What is measured of each in n pairs, after one that is left out; who begins takes turns."""
    found = []
    for k in range(n + 1):
        if k % 2:
            a, b = watch(ours), watch(theirs)
        else:
            b, a = watch(theirs), watch(ours)
        found.append((a, b))
    return found[1:]


def measure(n: int, batches: tuple[int, ...] = BATCHES) -> list[Row]:
    """A row for each batch and sampler."""
    model, rows = unet("small", 0), []
    size, watch = model.config.sample_size, Watch(model)
    for batch in batches:
        x_T = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))
        for name in SCHEDULERS:
            found = pairs(watch, *both(model, name, x_T), n)
            low, ratio, high = statistics.quantiles([a / b for (a, _), (b, _) in found], n=4, method="inclusive")
            ours, theirs = ([1e3 * statistics.median(pair[i][j] for pair in found) for j in (0, 1)] for i in (0, 1))
            rows.append({
                "sampler": name, "batch": batch, "evaluations": NFE, "pairs": n, "ratio": round(ratio, 4),
                "lower quartile": round(low, 4), "upper quartile": round(high, 4), "ms": round(ours[0], 1),
                "diffusers ms": round(theirs[0], 1), "beside ms": round(ours[1], 2),
                "diffusers beside ms": round(theirs[1], 2),
            })  # fmt: skip
    return rows


def table(rows: list[Row]) -> str:
    """Markdown, also of the CSV's rows."""
    lines = []
    for row in rows:
        low, ratio, high = (f"{float(row[key]):.3f}" for key in ("lower quartile", "ratio", "upper quartile"))
        whole = [f"{float(row[key]):.0f}" for key in ("ms", "diffusers ms")]
        beside = [f"{float(row[key]):.2f}" for key in ("beside ms", "diffusers beside ms")]
        lines.append([row["sampler"], row["batch"], ratio, f"{low}, {high}", " / ".join(whole), " / ".join(beside)])
    return markdown(["sampler", "batch", "sdekit / diffusers", "quartiles", "ms", "ms beside the network"], lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three pairs at batch 1")
    parser.add_argument("--pairs", type=int, help="default 31")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    rows = measure(options.pairs or (3 if options.quick else 31), BATCHES[:1] if options.quick else BATCHES)
    print(f"torch {torch.__version__}, {THREADS} threads\n\n{table(rows)}")
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "network_overhead.csv", rows)


if __name__ == "__main__":
    main()
