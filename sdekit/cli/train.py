"""``sdekit train``."""

import argparse
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdekit import _checks
from sdekit.likelihood.quantization import Quantization
from sdekit.models.network import as_score
from sdekit.processes.kinds import BLIND, zero_signal
from sdekit.sampling.fixed import sample
from sdekit.training.checkpoint import PROCESSES, build_network, save_checkpoint
from sdekit.training.config import Config, add_flags, from_flags
from sdekit.training.data import Data, load_data
from sdekit.training.distributed import Ranks
from sdekit.training.networks import NETWORKS
from sdekit.training.objectives import OBJECTIVES, Objective, denoising, edm, variational
from sdekit.training.pictures import save_grid
from sdekit.training.state import states
from sdekit.training.trainer import train


def train_flags(parser: argparse.ArgumentParser) -> None:
    """Those of the configuration, and where the run is."""
    add_flags(parser)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, where there is one")
    parser.add_argument(
        "--change", nargs="+", default=[], metavar="NAME", help="options that may differ from the run's"
    )


def run_train(options: argparse.Namespace) -> None:
    """Train a score and keep it in --out: score.safetensors, the run's state, metrics.csv and pictures of samples."""
    config, out, ranks = from_flags(options), options.out, Ranks.here()
    data = load_data(config.data, size=config.size, channels=config.channels, skip_bad=config.skip_bad)
    data = data if config.overfit is None else data.part(0, config.overfit)
    make, known = _checks.lookup(PROCESSES, config.process, "process")
    for name in config.process_args:
        _checks.lookup(dict.fromkeys(known), name, f"argument of {config.process}")
    sde = make(**config.process_args)
    if config.predicts in BLIND and float(sde.alpha(sde.T)) == 0:
        raise ValueError(zero_signal(sde, config.predicts))
    if (kept := out / "score.safetensors").is_file() and not states(out):
        raise FileExistsError(
            f"{kept} is of a run whose states are gone, and would be written over: choose another --out; --init {kept} "
            "begins with its weights"
        )
    network = build_network(_network(config, data), sde, seed=config.seed)
    if ranks.first:
        weights = sum(w.numel() for w in network.parameters())
        levels = "" if data.levels is None else f" of {data.levels:,} levels"
        print(f"{len(data.items)} items {data.event}{levels}{data.left_out}, {weights:,} weights")  # type: ignore[arg-type]

    def save(step: int, averaged: nn.Module) -> None:
        save_checkpoint(
            out / "score.safetensors", averaged, sde, config.predicts, event=data.event, data_range=data.data_range,
            levels=data.levels, config=config.json(),
        )  # fmt: skip
        if len(data.event) == 3:
            score = as_score(averaged, sde, predicts=config.predicts)
            score = score.given(torch.arange(64) % data.classes) if config.conditional else score
            x = sample(sde, score, (64, *data.event), nfe=20, seed=0)
            save_grid(out / f"samples-{step:09d}.png", x, data.data_range)

    shared = config.json()
    train(
        network,
        sde,
        data.items,
        labels=data.labels if config.conditional else None,
        objective=_objective(config, data),
        device=options.device,
        out=out,
        resume=options.resume,
        change=options.change,
        about={name: value for name, value in shared.items() if name not in ("every", "workers")},
        callback=save,
        progress=True,
        **{name: value for name, value in shared.items() if name in _PASSED_ON},
    )
    if ranks.first:
        print(f"kept {out / 'score.safetensors'}; next: sdekit sample {out / 'score.safetensors'}")


def _network(config: Config, data: Data) -> dict[str, Any]:
    """The network's description: its sizes as the data need them, the rest as the config has it."""
    name = config.network or ("UNet" if len(data.event) == 3 else "MLP")
    _checks.lookup(NETWORKS, name, "network")  # those of scores
    sizes = {"UNet": {"channels_in": data.event[0]}, "MLP": {"dim": data.event[0]}}.get(name, {})
    if len(data.event) != {"UNet": 3, "MLP": 1}.get(name, len(data.event)):
        raise ValueError(f"network {name} does not fit items {data.event}: UNet takes (C, H, W), MLP (D,)")
    if config.conditional and not data.classes:
        raise ValueError("conditional needs data with labels, and these have none")
    if config.sigma_data is not None and config.predicts != "x0":
        raise ValueError(f"sigma_data is of a network that predicts x0; set predicts to x0, got {config.predicts}")
    classes = {"classes": data.classes} if config.conditional else {}
    described: dict[str, Any] = {"name": name, "arguments": {**sizes, **classes, **config.network_args}}
    return described if config.sigma_data is None else {**described, "sigma_data": config.sigma_data}


def _objective(config: Config, data: Data) -> Objective:
    """The objective that the config names. Raises ValueError for options that it does not take."""
    make = _checks.lookup(OBJECTIVES, config.objective, "objective")
    if make is not denoising:
        if config.weighting != Config.weighting:
            raise ValueError(f"weighting is of denoising, and the objective is {config.objective}")
        discrete = make is variational and data.levels is not None and data.data_range is not None
        return variational(Quantization.of(data.levels, data.data_range)) if discrete else make()  # type: ignore[arg-type]
    matched = config.weighting == "edm" and config.sigma_data is not None
    return denoising(edm(config.sigma_data) if matched else config.weighting)  # type: ignore[arg-type]


# The options that train takes under the same name.
_PASSED_ON = set(inspect.signature(train).parameters) - {"network", "data", "objective"}
