"""One training run in one dataclass: the flags of ``sdekit train``, JSON, and what a checkpoint keeps."""

import argparse
import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdekit import _checks
from sdekit.training.checkpoint import FORMAT, read_tensors

# What ``sdekit train --help`` says of each.
HELP = {
    "data": "'digits', a folder of images or of IDX files, or a .npz or .npy file",
    "size": "side of the images of a folder",
    "channels": "1 or 3, of the images of a folder",
    "skip_bad": "decode the images of a folder once at the start, and leave out those that cannot be read",
    "overfit": "train on the first so many items only, to see that all is well",
    "process": "the process",
    "process_args": "its arguments, as beta_max=10",
    "network": "UNet for images, MLP for vectors, unless given",
    "network_args": "its arguments, as width=64 multipliers=[1,2,2]",
    "sigma_data": "EDM's preconditioning for data of this standard deviation",
    "init": "weights to begin with: a checkpoint, or a run's folder",
    "conditional": "tell the network the labels",
    "predicts": "what the network predicts: eps, v, x0, flow or score",
    "objective": "what is minimised",
    "weighting": "of denoising: simple, likelihood, min_snr or edm",
    "times": "how t is drawn: uniform, lognormal or table",
    "steps": "training steps",
    "batch": "items a step, in all processes together",
    "lr": "learning rate of AdamW",
    "warmup": "steps over which it rises",
    "schedule": "cosine or constant",
    "weight_decay": "of AdamW",
    "clip": "the gradient's norm at most",
    "ema": "of the averaged weights",
    "label_drop": "fraction of labels left out, for classifier-free guidance",
    "seed": "of everything",
    "bf16": "autocast to bfloat16",
    "compile": "torch.compile the network",
    "workers": "processes that decode images",
    "every": "steps between saved states and sample grids",
}


@dataclass(frozen=True)
class Config:
    """What ``sdekit train`` trains, on what, and how; see :func:`sdekit.training.trainer.train`."""

    data: str = "digits"
    size: int | None = None
    channels: int | None = None
    skip_bad: bool = False
    overfit: int | None = None
    process: str = "VPSDE"
    process_args: dict[str, Any] = field(default_factory=dict)
    network: str | None = None
    network_args: dict[str, Any] = field(default_factory=dict)
    sigma_data: float | None = None
    init: str | None = None
    conditional: bool = False
    predicts: str = "v"
    objective: str = "denoising"
    weighting: str = "simple"
    times: str = "uniform"
    steps: int = 4000
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 100
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.999
    label_drop: float = 0.1
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    workers: int = 0
    every: int = 1000

    def json(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, values: dict[str, Any], where: str) -> "Config":
        """From JSON. Raises ValueError for an unknown name, TypeError for a value of another type."""
        hints = typing.get_type_hints(cls)
        for name, value in values.items():
            kind = _checks.lookup(hints, name, f"option in {where}")
            allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (typing.get_origin(kind) or kind,)
            if float in allowed and type(value) is int:
                continue
            if type(value) not in allowed:
                raise TypeError(f"{name} in {where} must be {' or '.join(k.__name__ for k in allowed)}, got {value!r}")
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> "Config":
        """From a JSON file, or from a checkpoint; ValueError or TypeError says what is wrong with it."""
        if path.suffix == ".safetensors":
            values = read_tensors(path, FORMAT)[0].get("config")
            if values is None:
                raise ValueError(f"{path} does not say how it was trained: it has no config")
        else:
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is no JSON: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path} must hold a JSON object, got {values!r:.60}")
        return cls.of(values, str(path))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of :class:`Config`, and --config for a JSON file that they override."""
    parser.add_argument("--config", type=Path, help="a JSON file of these options, or a checkpoint; flags override it")
    for option in dataclasses.fields(Config):
        flag = "--" + option.name.replace("_", "-")
        default = option.default if option.default is not dataclasses.MISSING else {}
        text = f"{HELP[option.name]} (default: {default})" if default not in (None, {}) else HELP[option.name]
        kind = typing.get_type_hints(Config)[option.name]
        common: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS, "dest": option.name}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        elif default == {} and option.default is dataclasses.MISSING:
            parser.add_argument(flag, nargs="+", type=_pair, metavar="NAME=VALUE", **common)
        else:
            one = next(k for k in (typing.get_args(kind) or (kind,)) if k is not type(None))
            parser.add_argument(flag, type=one, metavar=one.__name__.upper(), **common)


def from_flags(options: argparse.Namespace) -> Config:
    """The config of parsed flags."""
    values = {} if options.config is None else Config.read(options.config).json()
    for option in dataclasses.fields(Config):
        if hasattr(options, option.name):
            given = getattr(options, option.name)
            values[option.name] = dict(given) if isinstance(given, list) else given
    return Config.of(values, "the flags")


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
