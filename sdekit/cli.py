"""The command line: ``sdekit train``, ``sdekit sample``, ``sdekit nll``."""

import argparse
import inspect
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from sdekit import _checks
from sdekit.likelihood.bits import bits_per_dim
from sdekit.likelihood.flow import log_likelihood
from sdekit.likelihood.quantization import Quantization
from sdekit.models.guidance import classifier_free
from sdekit.models.network import NetworkScore, as_score
from sdekit.processes.kinds import BLIND, zero_signal
from sdekit.sampling.calibration import Calibration, load_calibration
from sdekit.sampling.fixed import sample
from sdekit.training.checkpoint import PROCESSES, build_network, load_checkpoint, save_checkpoint
from sdekit.training.config import Config, add_flags, from_flags
from sdekit.training.data import Data, is_image_folder, load_data
from sdekit.training.distributed import Ranks, join, leave
from sdekit.training.networks import NETWORKS
from sdekit.training.objectives import OBJECTIVES, Objective, denoising, edm, variational
from sdekit.training.pictures import save_grid
from sdekit.training.trainer import train


def main(arguments: list[str] | None = None) -> None:
    """Run a command; bad input ends it with one line that names the argument."""
    parser = argparse.ArgumentParser(
        prog="sdekit", description="Scores for diffusion models: train, sample, likelihood."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, flags, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=run.__doc__)
        flags(command)
        command.add_argument("--device", help="cuda, cpu, ... (default: cuda where there is one)")
    options = parser.parse_args(arguments)
    try:
        options.device = join(options.device)
        COMMANDS[options.command][0](options)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"sdekit {options.command}: {error}")
    finally:
        leave()


def run_train(options: argparse.Namespace) -> None:
    """Train a score and keep it in --out: score.safetensors, the run's state, metrics.csv and pictures of samples."""
    config, out, ranks = from_flags(options), options.out, Ranks.here()
    data = load_data(config.data, size=config.size, channels=config.channels)
    data = data if config.overfit is None else data.part(0, config.overfit)
    make, known = _checks.lookup(PROCESSES, config.process, "process")
    for name in config.process_args:
        _checks.lookup(dict.fromkeys(known), name, f"argument of {config.process}")
    sde = make(**config.process_args)
    if config.predicts in BLIND and float(sde.alpha(sde.T)) == 0:
        raise ValueError(zero_signal(sde, config.predicts))
    network = build_network(_network(config, data), sde, seed=config.seed)
    if ranks.first:
        weights = sum(w.numel() for w in network.parameters())
        print(f"{len(data.items)} items {data.event}, {weights:,} weights")  # type: ignore[arg-type]

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
        about={name: value for name, value in shared.items() if name not in ("every", "workers")},
        callback=save,
        progress=True,
        **{name: value for name, value in shared.items() if name in _PASSED_ON},
    )
    if ranks.first:
        print(f"kept {out / 'score.safetensors'}; next: sdekit sample {out / 'score.safetensors'}")


def run_sample(options: argparse.Namespace) -> None:
    """Draw samples of a checkpoint: a picture and an .npz with x, the same however many processes share the work."""
    sde, score = load_checkpoint(options.checkpoint, options.device)
    event, ranks = _event(score, options.checkpoint), Ranks.here()
    model = _conditioned(score, options)
    number, batch = _checks.count(options.number, "--number"), _checks.count(options.batch, "--batch")
    named = options.sampler.endswith(".json")
    sampler: str | Calibration = load_calibration(options.sampler) if named else options.sampler
    # A network's last bits depend on the size of its batch: the same ids are drawn together, whoever draws them.
    parts = [range(i, min(i + batch, number)) for i in range(0, number, batch)]
    mine = []
    with torch.no_grad():
        for ids in parts[ranks.rank :: ranks.world]:
            x = sample(
                sde, model, (len(ids), *event), sampler, nfe=None if named else options.nfe, seed=options.seed,
                ids=ids, device=options.device,
            )  # fmt: skip
            mine.append(x.cpu())
    all_parts: list[Any] = [mine]
    if ranks.world > 1:
        all_parts = [None] * ranks.world
        distributed.all_gather_object(all_parts, mine)
    if not ranks.first:
        return
    x = torch.cat([all_parts[k % ranks.world][k // ranks.world] for k in range(len(parts))])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    wrote = [options.out.with_name(f"{options.out.name}.npz")]
    np.savez(wrote[0], x=x.numpy())
    if len(event) == 3:
        wrote.append(options.out.with_name(f"{options.out.name}.png"))
        save_grid(wrote[1], x[:256], score.data_range)
    print(f"{len(x)} samples in {' and '.join(map(str, wrote))}")


def _conditioned(score: NetworkScore, options: argparse.Namespace) -> Any:
    """The model of --label, at the scale --guidance. ValueError where the checkpoint's network does not know of these.

    A network that has never been without its labels still has the first weights, zeros, of the label for none.
    """
    network, label, scale = score.network, options.label, options.guidance
    assert isinstance(network, nn.Module)
    classes: int = getattr(network, "classes", 0)
    if label is not None and not 0 <= label < classes:
        hint = "" if classes else "; sdekit train --conditional makes a model that knows labels"
        raise ValueError(f"--label must be one of {options.checkpoint}'s {classes} classes, got {label}{hint}")
    if label is None and scale is not None:
        raise ValueError("--guidance is towards a label: give --label too")
    if classes and (label is None or scale is not None):
        none = next(w for name, w in network.named_parameters() if name.endswith("time.vectors.weight"))[classes]
        if not none.any():
            way = "give --label" if label is None else "leave --guidance out"
            raise ValueError(
                f"{options.checkpoint} was never trained without labels: {way}, or train one with --label-drop 0.1"
            )
    if label is None:
        return score
    return score.given(label) if scale is None else classifier_free(score, label, classes, scale)


def run_nll(options: argparse.Namespace) -> None:
    """Minus log-likelihood of data under a checkpoint's flow: bits per dimension of discrete data, else nats."""
    sde, score = load_checkpoint(options.checkpoint, options.device)
    event = _event(score, options.checkpoint)
    config = Config.read(options.checkpoint) if options.data is None else Config(data=options.data)
    size, channels = (event[-1], event[0]) if is_image_folder(config.data) and len(event) == 3 else (None, None)
    data = load_data(config.data, size=size, channels=channels).part(options.skip, options.number)
    if (data.event, data.levels, data.data_range) != (event, score.levels, score.data_range):
        raise ValueError(
            f"{config.data} holds items {data.event} of {data.levels} levels in {data.data_range}, and "
            f"{options.checkpoint} is of {event}, {score.levels} and {score.data_range}"
        )
    common: dict[str, Any] = {"seed": options.seed, "rtol": options.tol, "atol": options.tol}
    common |= {"divergence": "hutchinson", "probes": options.probes} if options.probes else {"divergence": "exact"}
    kind = None if score.levels is None or score.data_range is None else Quantization.of(score.levels, score.data_range)
    if kind is not None:  # below a third of a bin there is no detail, and what a network makes of it costs bits
        lam = min(-math.log(kind.bin / 3), float(sde.half_log_snr(sde.t_min)))
        sde.t_min = float(sde.inverse_half_log_snr(lam))
    values: list[Tensor] = []
    errors: list[Tensor] = []
    ids = range(len(data.items))  # type: ignore[arg-type]
    for start in range(0, len(ids), _checks.count(options.batch, "--batch")):
        mine = ids[start : start + options.batch]
        x = data.items[mine.start : mine.stop].to(options.device)
        if kind is None:
            found = log_likelihood(sde, score, x, ids=mine, **common)
            values.append(-found.corrected)
            errors.append(found.solver_error + found.truncation_error + found.prior_error)
        else:
            levels = ((x.double() - kind.low) / kind.bin).round().long()
            bits = bits_per_dim(
                sde, score, levels, levels=kind.levels, data_range=(kind.low, kind.high), dtype=x.dtype, ids=mine,
                dequantization="truncated_normal", **common,
            )  # fmt: skip
            values.append(bits.bits)
            errors.append(bits.error)
    value, error = torch.cat(values).double(), torch.cat(errors).double()
    unit = "nats" if kind is None else f"bits/dim, {kind.levels} levels, an upper bound by dequantisation"
    spread = 1.96 * float(value.std()) / math.sqrt(len(value)) if len(value) > 1 else math.nan
    if Ranks.here().first:
        items = f"items {options.skip} ... {options.skip + len(value) - 1} of {config.data}"
        print(f"{float(value.mean()):.4f} +- {spread:.4f} {unit}; {items}; budget {float(error.mean()):.4f}")


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


def _event(score: NetworkScore, path: Path) -> tuple[int, ...]:
    if not hasattr(score, "given"):
        raise ValueError(f"{path} holds a classifier, which guides a score and is none: name a score's checkpoint")
    if score.event is None:
        raise ValueError(f"{path} does not say the shape of its data; save it with event=")
    return score.event


def _train_flags(parser: argparse.ArgumentParser) -> None:
    add_flags(parser)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")


def _sample_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--number", type=int, default=64, help="how many")
    parser.add_argument("--sampler", default="unipc_2", help="a sampler's name, or a calibration's .json")
    parser.add_argument("--nfe", type=int, default=20, help="network evaluations a sample, at most")
    parser.add_argument("--label", type=int, help="of a model that knows labels")
    parser.add_argument("--guidance", type=float, help="towards --label: 1 is the label's model, more is more of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64, help="samples drawn together")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="name of the .npz and .png, without suffix")


def _nll_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", help="as in sdekit train (default: what the checkpoint was trained on)")
    parser.add_argument("--skip", type=int, default=0, help="the first item's number; those before are left out")
    parser.add_argument("--number", type=int, default=128, help="how many items")
    parser.add_argument("--probes", type=int, default=4, help="Hutchinson's, 0 for the exact divergence")
    parser.add_argument("--tol", type=float, default=1e-3, help="rtol and atol")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)


# The options that train takes under the same name.
_PASSED_ON = set(inspect.signature(train).parameters) - {"network", "data", "objective"}

COMMANDS: dict[str, tuple[Any, Any, str]] = {
    "train": (run_train, _train_flags, "train a score"),
    "sample": (run_sample, _sample_flags, "draw samples of a checkpoint"),
    "nll": (run_nll, _nll_flags, "likelihood of data under a checkpoint"),
}
