"""One safetensors file per trained score: the weights, and JSON that says how to rebuild everything else."""

import json
import os
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from sdekit import _checks
from sdekit.models.network import as_score
from sdekit.processes.gaussian import VESDE, VPSDE, CosineVP, HeatODE, RectifiedFlow, SubVPSDE
from sdekit.processes.kinds import KINDS
from sdekit.processes.poisson import PoissonFlow
from sdekit.processes.sde import SDE
from sdekit.processes.tables import BetaTable, SigmaTable
from sdekit.training.networks import BUILT, Classifier, Preconditioned, build

FORMAT = "sdekit-score-1"
LOSSES = "losses"  # the name of a run's, among the tensors of its state
LOG_PROB = "log_prob"  # what a classifier predicts, which is no kind that a score is made of

# What can be saved: a process by the arguments that make it.
PROCESSES: dict[str, tuple[type[SDE], tuple[str, ...]]] = {
    "VPSDE": (VPSDE, ("beta_min", "beta_max")),
    "SubVPSDE": (SubVPSDE, ("beta_min", "beta_max")),
    "VESDE": (VESDE, ("sigma_min", "sigma_max")),
    "HeatODE": (HeatODE, ("T",)),
    "PoissonFlow": (PoissonFlow, ("D", "T")),
    "RectifiedFlow": (RectifiedFlow, ("shift",)),
    "CosineVP": (CosineVP, ("s",)),
    "BetaTable": (BetaTable, ("betas",)),
    "SigmaTable": (SigmaTable, ("sigmas",)),
}


def save_checkpoint(
    path: str | os.PathLike[str],
    network: nn.Module,
    sde: SDE,
    predicts: str,
    *,
    event: Sequence[int] | None = None,
    data_range: tuple[float, float] | None = None,
    levels: int | None = None,
    config: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a trained network and its process to one safetensors file, whole or not at all.

    ``network``: a UNet or an MLP of :mod:`sdekit.training.networks`, a :class:`Preconditioned` one, or a Classifier,
    which predicts "log_prob"; ``sde``: a named process, as its constructor made it; ``event``, ``data_range``,
    ``levels``: the data's shape without the batch, their bounds and number of levels
    (:class:`sdekit.likelihood.quantization.Quantization`), for whoever loads it; ``config``: how it was trained, as
    JSON, for whoever reads the file; ``dtype``: of the weights on disk (float16 halves the file).

    Raises ValueError for a network or process that cannot be rebuilt from its name and arguments.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
    _checks.lookup({**KINDS, LOG_PROB: None}, predicts, "prediction")
    if (type(network) is Classifier) != (predicts == LOG_PROB):
        raise ValueError(f"a Classifier predicts {LOG_PROB!r}, and nothing else does; got {predicts!r}")
    about = {
        "process": describe_process(sde),
        "predicts": predicts,
        "network": describe_network(network),
        "event": None if event is None else [int(n) for n in event],
        "data_range": None if data_range is None else [float(v) for v in data_range],
        "levels": None if levels is None else int(levels),
        "config": config,
    }
    write_tensors(path, network.state_dict(), FORMAT, about, dtype)


def load_checkpoint(path: str | os.PathLike[str], device: torch.device | str | None = None) -> tuple[SDE, Any]:
    """(sde, score) of a file of :func:`save_checkpoint`; the weights come back in float32, in evaluation mode.

    Of a classifier (sde, log_prob): the network itself, for ``classifier_guidance(score, log_prob, given=(labels,))``.
    ``device``: where the weights go, the CPU unless given. ``score.event``, ``score.data_range`` and ``score.levels``
    are the data's as saved, or None. Raises FileNotFoundError for a missing file, and ValueError for one
    that is truncated, of another format, or names an unknown process, prediction or network.
    """
    about, weights = read_tensors(path, FORMAT)
    try:
        sde = build_process(about["process"])
        network = build_network(about["network"], sde)
        network.load_state_dict(weights)
        network = network.eval().requires_grad_(False).to(device or "cpu")
        made: Any = network if about["predicts"] == LOG_PROB else as_score(network, sde, predicts=about["predicts"])
        made.event = about["event"] and tuple(about["event"])
        made.data_range = about["data_range"] and tuple(about["data_range"])
        made.levels = about.get("levels")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)} describes no score that can be rebuilt: {error}") from error
    return sde, made


def write_tensors(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    form: str,
    about: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Tensors, floating ones in ``dtype`` or their own, and JSON to one safetensors file: beside it, then over it.

    Raises ValueError for one that is not finite, but for a run's losses, of which some steps may have had none.
    """
    path, held = Path(path), {}
    for name, tensor in tensors.items():
        kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype  # whole numbers stay
        # copies, since tied weights share memory, which the format does not know
        held[name] = tensor.detach().to("cpu", kept, copy=True).contiguous()
        if name != LOSSES and not torch.isfinite(held[name]).all():
            raise ValueError(f"weight {name} is not finite in {kept}; train again, or save with dtype=torch.float32")
    said = json.dumps(about)
    content = to_bytes(held, metadata={"format": form, "about": said, "crc32": _crc32(said, held)})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)  # on the disk before the name is: a crash leaves the old file or the new one
        os.chmod(temporary, 0o644)  # mkstemp's is for its owner alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_tensors(path: str | os.PathLike[str], form: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(about, tensors) of a file of :func:`write_tensors` with the format ``form``; half precision comes in float32."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no checkpoint at {os.fspath(path)}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)} is truncated or no safetensors file: {error}") from error
    # Older files have none.
    if "crc32" in metadata and metadata["crc32"] != _crc32(metadata.get("about", ""), stored):
        raise ValueError(f"{os.fspath(path)} is damaged: it does not hold what was written")
    tensors = {name: _wide(tensor) for name, tensor in stored.items()}
    if metadata.get("format") != form:
        raise ValueError(f"{os.fspath(path)} has the format {metadata.get('format')!r}, not {form!r}")
    try:
        about = json.loads(metadata["about"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} has no readable description: {error}") from error
    if not isinstance(about, dict):
        raise ValueError(f"{os.fspath(path)} has no readable description: a JSON object is needed, got {about!r:.60}")
    return about, tensors


def _crc32(said: str, tensors: dict[str, Tensor]) -> str:
    """A number that changes with any bit of them."""
    value = zlib.crc32(said.encode())
    for name in sorted(tensors):
        value = zlib.crc32(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode(), value)
        value = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, value)
    return f"{value:08x}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def describe_network(network: nn.Module) -> dict[str, Any]:
    """A network by its name and arguments; ValueError for one that is not known by name."""
    if isinstance(network, Preconditioned):
        return {**describe_network(network.network), "sigma_data": network.sigma_data}
    names = {kind: name for name, kind in BUILT.items()}
    if type(network) not in names:
        raise ValueError(f"network must be one of {', '.join(BUILT)} to be saved by name, got {type(network).__name__}")
    return {"name": names[type(network)], "arguments": network.arguments}


def build_network(described: dict[str, Any], sde: SDE, *, seed: int = 0) -> nn.Module:
    """The network that :func:`describe_network` described, with first weights fixed by ``seed``."""
    network = build(described["name"], seed=seed, **described["arguments"])
    sigma_data = described.get("sigma_data")
    return network if sigma_data is None else Preconditioned(network, sde, sigma_data)


def describe_process(sde: SDE) -> dict[str, Any]:
    """A process by its name and arguments; ValueError for one that is not known by name, or was changed."""
    name = type(sde).__name__
    if name not in PROCESSES or type(sde) is not PROCESSES[name][0]:
        raise ValueError(f"sde must be one of {', '.join(PROCESSES)} to be saved by name, got {name}")
    described = {"name": name, "arguments": {key: _plain(getattr(sde, key)) for key in PROCESSES[name][1]}}
    rebuilt = build_process(described)
    probe = torch.linspace(sde.t_min, sde.T, 17, dtype=torch.float64)
    same = (rebuilt.T, rebuilt.t_min) == (sde.T, sde.t_min) and torch.equal(rebuilt.sigma(probe), sde.sigma(probe))
    if not same:
        raise ValueError(
            f"{name} with a sigma, T or t_min of its own cannot be saved: numbers can be stored, functions cannot; "
            "save the weights and make the process where you load them"
        )
    return described


def build_process(described: dict[str, Any]) -> SDE:
    """The process that :func:`describe_process` described."""
    make, known = _checks.lookup(PROCESSES, described["name"], "process")
    arguments = described["arguments"]
    if sorted(arguments) != sorted(known):
        raise ValueError(f"{described['name']} takes {', '.join(known)}, got {', '.join(arguments)}")
    return make(**arguments)


def _plain(value: Any) -> Any:
    """A number or a tensor of them as JSON has it."""
    return value.tolist() if isinstance(value, Tensor) else float(value)
