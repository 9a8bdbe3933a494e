"""``sdekit sample`` and ``sdekit nll``."""

import argparse
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from sdekit import _checks
from sdekit.cli.models import conditioned, event_of
from sdekit.likelihood.bits import bits_per_dim
from sdekit.likelihood.flow import log_likelihood
from sdekit.likelihood.quantization import Quantization
from sdekit.sampling.calibration import Calibration, load_calibration
from sdekit.sampling.fixed import sample
from sdekit.training.checkpoint import load_checkpoint
from sdekit.training.config import Config
from sdekit.training.data import is_image_folder, load_data
from sdekit.training.distributed import Ranks
from sdekit.training.pictures import save_grid


def sample_flags(parser: argparse.ArgumentParser) -> None:
    """What is drawn, how, and where to."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--number", type=int, default=64, help="how many")
    parser.add_argument("--sampler", default="unipc_2", help="a sampler's name, or a calibration's .json")
    parser.add_argument("--nfe", type=int, default=20, help="network evaluations a sample, at most")
    parser.add_argument("--label", type=int, help="of a model that knows labels")
    parser.add_argument("--guidance", type=float, help="towards --label: 1 is the label's model, more is more of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64, help="samples drawn together")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="name of the .npz and .png, without suffix")


def run_sample(options: argparse.Namespace) -> None:
    """Draw samples of a checkpoint: a picture and an .npz with x, the same however many processes share the work."""
    sde, score = load_checkpoint(options.checkpoint, options.device)
    event, ranks = event_of(score, options.checkpoint), Ranks.here()
    model = conditioned(score, options)
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


def nll_flags(parser: argparse.ArgumentParser) -> None:
    """Of which data, and how exactly."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", help="as in sdekit train (default: what the checkpoint was trained on)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out the images that cannot be read")
    parser.add_argument("--skip", type=int, default=0, help="the first item's number; those before are left out")
    parser.add_argument("--number", type=int, default=128, help="how many items")
    parser.add_argument("--probes", type=int, default=4, help="Hutchinson's, 0 for the exact divergence")
    parser.add_argument("--tol", type=float, default=1e-3, help="rtol and atol")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)


def run_nll(options: argparse.Namespace) -> None:
    """Minus log-likelihood of data under a checkpoint's flow: bits per dimension of discrete data, else nats."""
    sde, score = load_checkpoint(options.checkpoint, options.device)
    event = event_of(score, options.checkpoint)
    config = Config.read(options.checkpoint) if options.data is None else Config(data=options.data)
    size, channels = (event[-1], event[0]) if is_image_folder(config.data) and len(event) == 3 else (None, None)
    whole = load_data(
        config.data, size=size, channels=channels, skip_bad=config.skip_bad or options.skip_bad
    )  # items as in training
    data = whole.part(options.skip, options.number)
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
        items = f"items {options.skip} ... {options.skip + len(value) - 1} of {config.data}{data.left_out}"
        print(f"{float(value.mean()):.4f} +- {spread:.4f} {unit}; {items}; budget {float(error.mean()):.4f}")
