"""Training: a network learns the score of a process's marginals from data."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from sdekit import _checks
from sdekit.batch import only_real, padded
from sdekit.models.network import NetworkScore, as_score
from sdekit.processes.kinds import KINDS
from sdekit.processes.law import digest
from sdekit.processes.sde import SDE
from sdekit.training.distributed import Ranks
from sdekit.training.draws import TIMES, Draws, Order, doubts
from sdekit.training.ema import EMA
from sdekit.training.items import batches, checked, label_in, padding_in, size_of
from sdekit.training.log import Log, Metrics
from sdekit.training.objectives import Objective, denoising
from sdekit.training.settings import DIGEST, asked_for
from sdekit.training.state import begin, load_state, save_state, states
from sdekit.training.steps import CHECK_EVERY, Look, Steps


class Trained(NamedTuple):
    """``network``: the averaged one; ``losses`` (steps,): float32, on the CPU, NaN or inf where a step's was."""

    network: nn.Module
    losses: Tensor


def train(
    network: nn.Module,
    sde: SDE,
    data: Tensor | Dataset[Any],
    *,
    labels: Tensor | tuple[Tensor, ...] | None = None,
    predicts: str = "v",
    time: Callable[[Tensor], Tensor] | None = None,
    output: str | int | Callable[[Any], Tensor] | None = None,
    objective: Objective | None = None,
    times: str | Callable[[Tensor], Tensor] = "uniform",
    steps: int = 2000,
    batch: int = 128,
    lr: float = 1e-3,
    warmup: int = 100,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    clip: float = 1.0,
    ema: float = 0.999,
    label_drop: float = 0.1,
    mask: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    bf16: bool = False,
    compile: bool = False,
    workers: int = 0,
    out: Path | str | None = None,
    every: int = 1000,
    resume: bool = False,
    change: Sequence[str] = (),
    init: Path | str | None = None,
    about: dict[str, Any] | None = None,
    callback: Callable[[int, nn.Module], None] | None = None,
    progress: bool = False,
) -> Trained:
    """Train ``network(x_t, t)`` so that, predicting ``predicts``, it is the score of the process; in place.

    ``predicts``, ``time``, ``output``: as in :func:`sdekit.as_score`, which is to be given the same afterwards.

    ``data``: (N, *event), or a dataset of items x or (x, *conditions), with a length and items by number; ``labels``
    (N, ...), or a tuple of such: the conditions of a tensor's. The network is called as network(x_t, t, *conditions),
    floating ones in its weights' dtype. The first condition of whole numbers (b,) is a class label: in a fraction
    ``label_drop`` of the items it becomes ``network.classes``, which stands for none (Ho & Salimans 2022). The others
    are never dropped: what is to be learnt without them too, the dataset leaves out at random itself, by giving what
    stands for nothing (zeros, say), or the network does. ``mask``: which of the conditions, from 0, is the mask of
    padded items, as in :func:`sdekit.sample` (True: real): noise and loss are of what is real. ``objective``: what is
    minimised, see :mod:`sdekit.training.objectives`; denoising score matching unless given.

    ``times``: how t lies in [t_min, T]: a name of :data:`sdekit.training.draws.TIMES`, or a callable from u (B,) in
    [0, 1) to t. u is one uniform shift of an even grid per batch, which has less variance than independent draws.
    AdamW with gradients clipped to norm ``clip``; ``lr`` rises over ``warmup`` steps and then falls as a cosine to 0 or
    stays ("constant"). A step whose loss or gradient is not finite is skipped, which is said in the log: weights,
    moments and buffers stay, and the average takes the same weights once more. Frozen weights stay, as do those of
    whole numbers. ``ema``: see :class:`sdekit.training.ema.EMA`. ``init``: the weights to begin with, of a file of
    ``save_checkpoint`` or, averaged, of a run's folder. ``seed`` fixes data order, times, noise and dropped labels (the
    network brings its own first weights, see :func:`sdekit.training.networks.build`); the global RNG is not touched,
    unless the network itself draws from it (dropout).

    ``device``: cuda if there is one, else the CPU; ``bf16``: the network in autocast; ``compile``: ``torch.compile``;
    ``workers``: processes that load a dataset's items. Where a process group is set up (``torchrun``), the batch is
    shared among its processes, whose number changes the result by rounding only.

    ``out``: a folder for the run's state, saved ``every`` so many steps and at the end, metrics.csv, and log.txt, what
    was out of the ordinary (the logger "sdekit" warns of it too). A run that was stopped, however, goes on from there
    with ``resume=True`` and the same arguments, and on a CPU ends with the same bits (but for what a dataset or a
    network draws for itself: augmentation, dropout); ``init`` is then of its beginning. ``change``: which may be others
    from here on, as ["lr", "steps", "data"]; not what makes another model. Where there is no state it begins; one that
    cannot be read is left aside for the one before. ``about``: what else must be the same, as JSON.
    ``callback(step, averaged network)`` is called after each save, in the first process.

    Raises ValueError or TypeError that names the argument, FloatingPointError where no gradient is finite for 50 steps
    (the network then has its last good weights), and FileExistsError where ``out`` holds a run and resume is False.
    """
    if not isinstance(network, nn.Module):
        inside = "; take score.network" if hasattr(network, "network") else ""
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}{inside}")
    if torch.is_inference_mode_enabled():
        raise ValueError("training needs gradients, and inference mode has none: leave torch.inference_mode")
    _checks.instance(sde, gaussian=predicts != "score")
    _checks.lookup(KINDS, predicts, "prediction")
    steps, batch, every = (_checks.count(n, s) for n, s in ((steps, "steps"), (batch, "batch"), (every, "every")))
    if not 0 <= label_drop < 1:
        raise ValueError(f"label_drop must be a fraction of at least 0 and below 1, got {label_drop!r}")
    warmup, seed = _checks.count(warmup, "warmup", minimum=0), _checks.count(seed, "seed", minimum=0)
    mask = None if mask is None else _checks.count(mask, "mask", minimum=0)
    lr, clip = _checks.positive(lr, "lr"), _checks.positive(clip, "clip")
    decay = _checks.lookup({"cosine": _cosine, "constant": lambda fraction: 1.0}, schedule, "schedule")
    to_time = times if callable(times) else _checks.lookup(TIMES, times, "times")(sde)
    named = None if objective is None else getattr(objective, "__qualname__", repr(objective)).partition(".")[0]
    objective = denoising() if objective is None else _objective(objective)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ranks, run = Ranks.here(), None if out is None else Path(out)
    settings = {
        "predicts": predicts, "time": None if time is None else "a callable",
        "output": "a callable" if callable(output) else output, "steps": steps, "batch": batch, "lr": lr,
        "warmup": warmup, "schedule": schedule, "weight_decay": weight_decay, "clip": clip, "ema": ema,
        "label_drop": label_drop, "mask": mask, "seed": seed, "bf16": bf16, "process": _fingerprint(sde),
        "times": times if isinstance(times, str) else "a callable",
        "init": None if init is None else str(Path(init).resolve()),
        "objective": named, **(about or {}),
    }  # fmt: skip
    change, classes = asked_for(change, resume), getattr(network, "classes", None)
    data, given = checked(data, labels, classes, label_drop > 0, mask, sde)
    settings["items"] = n = len(data)  # type: ignore[arg-type]
    if isinstance(data, Tensor):
        settings[DIGEST] = digest(*(part[:: max(1, n // 64)] for part in (data, *given)))
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        if states(run) and not resume:
            raise FileExistsError(
                f"{run} holds a run already: resume=True (--resume) goes on with it; or choose another folder"
            )
        for unfinished in run.glob("*.safetensors*.part") if ranks.first else ():  # a kill cut its writing short
            unfinished.unlink()
    log = Log(run, ranks.first)
    network.to(device).train()
    if init is not None and not (run is not None and states(run)):
        was = begin(network, init)
        log.say(0, f"begins with the weights of {init}" + (f", which predicted {was}" if was != predicts else ""))
    stepper, average = Steps(network, lr, weight_decay, clip), EMA(network, ema)
    done, losses = 0, torch.zeros(0)
    if run is not None and resume:
        done, losses, said = load_state(run, network, average, stepper.optimizer, settings, change)
        for text in said:
            log.say(done, text)
    size = size_of(data, given, mask, sde)
    for doubt in doubts(sde, predicts, None if callable(times) else to_time, *size) if not done or change else ():
        log.say(done, doubt)
    module: nn.Module = DistributedDataParallel(network) if ranks.world > 1 else network
    score = as_score(torch.compile(module) if compile else module, sde, predicts, time=time, output=output)
    if mask is not None:
        score = _Real(score.network, sde, predicts, time, output)
    metrics, look = Metrics(run if ranks.first else None, done), Look(done, steps, log, run)

    draws = Draws(seed, batch, ranks, device)
    order = Order(n, draws, done + 1, steps)
    loader = batches(data, given, order, stepper.dtype, workers, classes, label_drop > 0)
    if run is not None and done == steps and callback is not None and ranks.first:
        callback(steps, average.network)  # it may have been killed before it did
    recent: list[tuple[Tensor, Tensor]] = []
    bar = tqdm(loader, disable=not (progress and ranks.first), desc="training", initial=done, total=steps)
    for step, (x0, conditions) in enumerate(bar, start=done + 1):
        draws.enter(step)
        t = to_time(draws.levels())
        place = label_in(conditions)
        if place is not None and label_drop:
            if not classes:
                raise ValueError("label_drop needs network.classes, the label that stands for none; or set it to 0")
            kinds = torch.where(draws.uniform() < label_drop, classes, conditions[place])
            conditions = (*conditions[:place], kinds, *conditions[place + 1 :])
        stepper.begin(lr * min(1.0, step / (warmup + 1)) * decay((step - 1) / steps))
        padding = padding_in(conditions, mask, x0, sde)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16), padded(padding):
            if not sde.common(x0):
                raise ValueError(f"{type(sde).__name__} has a y for each sample, and data are shuffled: give it one y")
            x0 = only_real(x0)
            loss = objective(score.given(*conditions), x0, t, partial(_normal, draws, x0)).mean()
        norm = stepper.take(loss)
        average.update(network)
        recent.append((loss.detach().float(), norm))
        saving = run is not None and (step % every == 0 or step == steps)
        if len(recent) == CHECK_EVERY or step == steps or saving:
            found, norms = (torch.stack(column) for column in zip(*recent, strict=True))
            found, norms = ranks.mean(found).cpu(), norms.cpu()
            mean = look.at(step, found, norms)
            losses, recent = torch.cat([losses, found]), []
            bar.set_postfix(loss=f"{mean:.4f}")
            metrics.row(step, mean, float(norms[-1]), batch)
        if saving and ranks.first and (look.lost < every or step == steps):  # else nothing is new, and the old is good
            save_state(run, step, network, average, stepper.optimizer, losses, settings)  # type: ignore[arg-type]
            if callback is not None:
                callback(step, average.network)
        if saving:
            ranks.wait()
    network.eval()
    return Trained(average.network, losses)


class _Real(NetworkScore):
    """What a network says of what is real."""

    def output(self, x: Tensor, time: Tensor, ready: Any = None, given: Any = None) -> Tensor:
        """With 0 in the padding."""
        return only_real(super().output(x, time, ready, given))


def _objective(objective: Any) -> Objective:
    try:
        inspect.signature(objective).bind(*[None] * 4)
    except (TypeError, ValueError):
        raise TypeError(
            "objective must be a function (score, x_0, t, normal) -> (B,), as denoising() makes one; a weighting goes "
            f"into it, denoising(edm()), and a name into OBJECTIVES[name](); got {objective!r}"
        ) from None
    return objective


def _normal(draws: Draws, x0: Tensor) -> Tensor:
    return only_real(draws.normal(x0))


def _fingerprint(sde: Any) -> list[Any]:
    if not hasattr(sde, "alpha"):  # an ItoSDE: what its numbers are
        mine = sorted((k, v) for k, v in vars(sde).items() if isinstance(v, int | float | str))
        return [type(sde).__name__, sde.noise_type, sde.T, sde.t_min, sde.steps, *map(list, mine)]
    times = torch.linspace(sde.t_min, sde.T, 5, dtype=torch.float64)
    law = [y if isinstance(y, int | float | str) else getattr(y, "__qualname__", type(y).__name__) for y in sde.law()]
    return [type(sde).__name__, *law, *sde.alpha(times).tolist(), *sde.sigma(times).tolist()]


def _cosine(fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * fraction))
