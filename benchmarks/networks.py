"""The bench of trained networks: small ones of the kinds that people use, for nfe_vs_error.py.

    python benchmarks/networks.py            # train what is missing in benchmarks/networks; minutes each on two cores
    python benchmarks/networks.py --only eps_linear --out DIR --steps 100

All are U-Nets of 0.17M weights on scikit-learn's digits (8 x 8, in [-1, 1]), trained by ``sdekit train``'s own trainer
from seed 0, and kept in float16. What differs is what they predict, and of which process:

eps_linear         eps, VPSDE(): DDPM's linear betas, alpha(T) = .0066
eps_scaled_linear  eps, the betas of Stable Diffusion 1 and 2, alpha(T) = .068
v_zero_snr         v, CosineVP(): alpha(T) = 0
flow_shift         flow, RectifiedFlow(shift=3): alpha(T) = 0
x0_edm             x_0 by EDM's preconditioning, weighting and times, HeatODE() to sigma = 80
eps_conditional    eps, VPSDE(), told the digit; a sample's label here is its number modulo ten

and, for poisson.py alone:

x0_poisson         as x0_edm, PoissonFlow(128)
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sdekit import SDE, VPSDE, BetaTable, CosineVP, HeatODE, PoissonFlow, RectifiedFlow
from sdekit.models.network import NetworkScore
from sdekit.training.checkpoint import load_checkpoint, save_checkpoint
from sdekit.training.digits import load_digits
from sdekit.training.networks import Preconditioned, build
from sdekit.training.objectives import denoising
from sdekit.training.trainer import train

FOLDER = Path(__file__).parent / "networks"
EVENT = (1, 8, 8)
STEPS = 4000


def scaled_linear(first: float = 0.00085, last: float = 0.012, n: int = 1000) -> torch.Tensor:
    """Stable Diffusion's betas, linear in the square root."""
    return torch.linspace(first**0.5, last**0.5, n, dtype=torch.float64).square()


@dataclass(frozen=True)
class Kind:
    """What a network of the bench predicts, of which process, and how it is trained."""

    predicts: str
    process: Callable[[], SDE]
    conditional: bool = False
    sigma_data: float | None = None
    weighting: str = "simple"
    settings: dict[str, Any] = field(default_factory=dict)


BENCH = {
    "eps_linear": Kind("eps", VPSDE),
    "eps_scaled_linear": Kind("eps", lambda: BetaTable(scaled_linear())),
    "v_zero_snr": Kind("v", CosineVP),
    "flow_shift": Kind("flow", lambda: RectifiedFlow(shift=3.0)),
    "x0_edm": Kind("x0", HeatODE, sigma_data=0.5, weighting="edm", settings={"times": "lognormal"}),
    "eps_conditional": Kind("eps", VPSDE, conditional=True),
}


OTHERS = {"x0_poisson": replace(BENCH["x0_edm"], process=lambda: PoissonFlow(128))}


def make(name: str, path: Path, steps: int = STEPS) -> None:
    """Train one and write it."""
    kind = {**BENCH, **OTHERS}[name]
    images, labels = load_digits()
    sde, classes = kind.process(), {"classes": 10} if kind.conditional else {}
    network = build("UNet", seed=0, channels_in=1, width=16, multipliers=(1, 2), blocks=1, **classes)
    if kind.sigma_data is not None:
        network = Preconditioned(network, sde, kind.sigma_data)
    trained = train(
        network, sde, images, labels=labels if kind.conditional else None, predicts=kind.predicts,
        objective=denoising(kind.weighting), steps=steps, batch=64, lr=2e-3, ema=0.999, seed=0, progress=True,
        **kind.settings,
    )  # fmt: skip
    save_checkpoint(
        path, trained.network, sde, kind.predicts, event=EVENT, data_range=(-1.0, 1.0), levels=17, dtype=torch.float16
    )
    print(f"{name}: loss {float(trained.losses[-200:].mean()):.4f} over the last 200 steps", flush=True)


@cache
def load(name: str, samples: int) -> tuple[SDE, NetworkScore]:
    """(process, model) of the bench; a conditional one with the labels of so many samples."""
    sde, score = load_checkpoint(FOLDER / f"{name}.safetensors")
    conditional = name in BENCH and BENCH[name].conditional
    return sde, score.given(torch.arange(samples) % 10) if conditional else score


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*BENCH, *OTHERS], default=[*BENCH, *OTHERS], metavar="NAME")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        path = options.out / f"{name}.safetensors"
        if path.is_file():
            print(f"{name}: there already; delete {path} to train it anew")
            continue
        start = time.perf_counter()
        make(name, path, options.steps)
        print(f"{name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
