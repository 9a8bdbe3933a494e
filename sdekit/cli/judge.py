"""``sdekit check``, ``sdekit compare`` and ``sdekit calibrate``."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.cli.models import conditioned, event_of, load_model, require_score
from sdekit.evaluation.check import check_process, check_score
from sdekit.evaluation.compare import BUDGETS, compare
from sdekit.evaluation.metrics import EXTRACTORS, Extractor, inception_extractor, load_feature_extractor
from sdekit.evaluation.report import Saved, save
from sdekit.sampling.calibrate import calibrate
from sdekit.sampling.calibration import load_calibration
from sdekit.training.config import Config
from sdekit.training.data import is_image_folder, load_data

_MOST = 4096  # items that are looked at
MODEL = "a checkpoint of sdekit train, or a folder of diffusers (a pipeline, or unet/ and scheduler/)"


def check_flags(parser: argparse.ArgumentParser) -> None:
    """Of which data, how long, and where to."""
    parser.add_argument("checkpoint", type=Path, help=MODEL)
    parser.add_argument("--data", help="as in sdekit train (default: what the checkpoint was trained on)")
    parser.add_argument("--skip-bad", action="store_true", help="leave out the images that cannot be read")
    parser.add_argument("--samples", type=int, default=128, help="of the data, that the model is asked of")
    parser.add_argument("--batch", type=int, default=64, help="of a network call")
    parser.add_argument("--no-search", action="store_true", help="do not look for what else the network may be")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, action="append", default=[], help="a report, .html or .json; may be repeated"
    )


def run_check(options: argparse.Namespace) -> bool:
    """Whether a checkpoint's process is sound and its network a score of the data; where not, what it seems to be.

    The status is 1 where a line fails.
    """
    _endings(options.out, ".html", ".json")
    sde, score = load_model(options.checkpoint, options.device)
    require_score(score, options.checkpoint)
    if options.data is None and options.checkpoint.is_dir():
        raise ValueError("a folder of diffusers does not say what it was trained on: give --data")
    config = Config.read(options.checkpoint) if options.data is None else Config(data=options.data)
    event = score.event
    size, channels = (
        (event[-1], event[0]) if is_image_folder(config.data) and event and len(event) == 3 else (None, None)
    )
    data = load_data(config.data, size=size, channels=channels, skip_bad=config.skip_bad or options.skip_bad)
    if event is not None and data.event != event:
        raise ValueError(f"{config.data} holds items {data.event}, and {options.checkpoint} is of {event}")
    # Some of all of them: the first may be of a class alone.
    whole = torch.randperm(len(data.items), generator=torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    some = whole[:_MOST]
    if getattr(score.network, "classes", 0) and data.labels is not None:
        score = score.given(data.labels[some])
    items = data.items[some] if isinstance(data.items, Tensor) else torch.stack([data.items[i] for i in some.tolist()])
    items = items.to(options.device)
    reports = [
        check_process(sde, data=items[:1000].cpu()),
        check_score(
            sde, score, items, samples=options.samples, batch=options.batch, seed=options.seed,
            search=not options.no_search,
        ),
    ]  # fmt: skip
    print("\n\n".join(map(str, reports)))
    _save(reports, options.out)
    return all(report.ok for report in reports)


def compare_flags(parser: argparse.ArgumentParser) -> None:
    """How long, in which budgets, beside what, and where to."""
    parser.add_argument("checkpoint", type=Path, help=MODEL)
    parser.add_argument("--nfe", type=int, nargs="+", default=list(BUDGETS), help="budgets of network evaluations")
    parser.add_argument("--number", type=int, default=256, help="noises, at most")
    parser.add_argument("--seconds", type=float, default=120.0, help="about how long")
    parser.add_argument("--calibration", type=Path, action="append", default=[], help="a .json to compare, too")
    parser.add_argument(
        "--features", help=f"Fréchet distance in {', '.join(EXTRACTORS)} or an Inception's weights file"
    )
    parser.add_argument("--label", type=int, help="of a model that knows labels")
    parser.add_argument("--guidance", type=float, help="towards --label")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, action="append", default=[], help="a report, .html or .json; may be repeated"
    )
    parser.add_argument("--figure", type=Path, help="error against evaluations, .png or .svg")


def run_compare(options: argparse.Namespace) -> None:
    """Which sampler to take for a checkpoint, for how many evaluations, by the error to its own flow. Needs no data."""
    _endings(options.out, ".html", ".json")
    _endings([options.figure] if options.figure else [], ".png", ".svg")
    sde, score = load_model(options.checkpoint, options.device)
    shape = (_checks.count(options.number, "--number", minimum=2), *event_of(score, options.checkpoint))
    found = compare(
        sde, conditioned(score, options), shape, nfe=options.nfe, features=_features(options),
        samplers={path.name: load_calibration(path) for path in options.calibration}, seconds=options.seconds,
        seed=options.seed, device=options.device,
    )  # fmt: skip
    print(found)
    _save([found], options.out)
    if options.figure is not None:
        found.figure(options.figure)


def calibrate_flags(parser: argparse.ArgumentParser) -> None:
    """For how many evaluations, from what, and where to."""
    parser.add_argument("checkpoint", type=Path, help=MODEL)
    parser.add_argument("--nfe", type=int, required=True, help="network evaluations a sample")
    parser.add_argument("--out", type=Path, required=True, help="the calibration's .json")
    parser.add_argument("--noises", type=int, default=512, help="that it is fitted to")
    parser.add_argument("--iterations", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--label", type=int, help="of a model that knows labels")
    parser.add_argument("--guidance", type=float, help="towards --label")
    parser.add_argument("--seed", type=int, default=0)


def run_calibrate(options: argparse.Namespace) -> None:
    """Fit a sampler's times and weights to a checkpoint; compare it with all rows on other noises; keep it in --out."""
    _endings([options.out], ".json")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sde, score = load_model(options.checkpoint, options.device)
    model, event = conditioned(score, options), event_of(score, options.checkpoint)
    fitted = calibrate(
        sde, model, (options.batch, *event), nfe=options.nfe, noises=options.noises, iterations=options.iterations,
        batch=options.batch, seed=options.seed, device=options.device, progress=True,
    )  # fmt: skip
    fitted.save(options.out)
    name = options.out.name
    found = compare(
        sde, model, (64, *event), nfe=(options.nfe,), samplers={name: fitted}, seconds=60.0, seed=options.seed + 1,
        device=options.device,
    )  # fmt: skip
    print(f"{found}\n\nkept {options.out}", end="")
    errors = {e.sampler: e.error for e in found.entries if e.nfe is not None and math.isfinite(e.error)}
    mine = errors.pop(name, None)
    if mine is not None and errors:  # there was time
        best = min(errors, key=lambda row: errors[row])
        ratio = mine / max(errors[best], 1e-300)
        print(f": error {mine:.3g} in {options.nfe} evaluations, {ratio:.2f} of the best fixed row's, {best} with "
              f"{errors[best]:.3g}", end="")  # fmt: skip
    print()


def _features(options: argparse.Namespace) -> Extractor | None:
    if options.features is None:
        return None
    if options.features in EXTRACTORS:
        return load_feature_extractor(options.features)
    return inception_extractor(options.features, options.device)


def _endings(paths: Sequence[Path], *endings: str) -> None:
    """Raise ValueError for a path of another ending, before the work and not after it."""
    for path in paths:
        if path.suffix not in endings:
            raise ValueError(f"a file to write must end in {' or '.join(endings)}, got {path.name!r}")


def _save(reports: Sequence[Saved], paths: list[Path]) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(reports, path)
        print(f"kept {path}")
