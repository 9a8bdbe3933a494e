"""Training: a network learns the score of a process's marginals from data."""

import csv
import hashlib
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from tqdm import tqdm

from sdekit import _checks
from sdekit.models.network import as_score
from sdekit.processes.kinds import KINDS
from sdekit.processes.sde import SDE
from sdekit.training.distributed import Ranks
from sdekit.training.draws import TIMES, Draws, Order, batches
from sdekit.training.ema import EMA
from sdekit.training.objectives import Objective, denoising
from sdekit.training.state import load_state, save_state, states

CHECK_EVERY = 50  # steps between looks at the loss: looking waits for the device


class Trained(NamedTuple):
    """``network``: the averaged one; ``losses`` (steps,): float32, on the CPU."""

    network: nn.Module
    losses: Tensor


def train(
    network: nn.Module,
    sde: SDE,
    data: Tensor | Dataset[Any],
    *,
    labels: Tensor | None = None,
    predicts: str = "v",
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
    seed: int = 0,
    device: torch.device | str | None = None,
    bf16: bool = False,
    compile: bool = False,
    workers: int = 0,
    out: Path | str | None = None,
    every: int = 1000,
    resume: bool = False,
    about: dict[str, Any] | None = None,
    callback: Callable[[int, nn.Module], None] | None = None,
    progress: bool = False,
) -> Trained:
    """Train ``network(x_t, t)`` so that, predicting ``predicts``, it is the score of the process; in place.

    ``data``: (N, *event), or a dataset of such items, alone or as (item, label); ``labels`` (N,), int64, of a tensor's.
    With labels the network is called as network(x_t, t, labels), a fraction ``label_drop`` of them replaced by
    ``network.classes``, which stands for none (Ho & Salimans 2022). ``objective``: what is minimised, see
    :mod:`sdekit.training.objectives`; denoising score matching unless given.

    ``times``: how t lies in [t_min, T]: a name of :data:`sdekit.training.draws.TIMES`, or a callable from u (B,) in
    [0, 1) to t. u is one uniform shift of an even grid per batch, which has less variance than independent draws.
    AdamW with gradients clipped to norm ``clip``; ``lr`` rises over ``warmup`` steps and then falls as a cosine to 0 or
    stays ("constant"). ``ema``: see :class:`sdekit.training.ema.EMA`. ``seed`` fixes data order, times, noise and
    dropped labels (the network brings its own first weights, see :func:`sdekit.training.networks.build`); the global
    RNG is not touched, unless the network itself draws from it (dropout).

    ``device``: cuda if there is one, else the CPU; ``bf16``: the network in autocast; ``compile``: ``torch.compile``;
    ``workers``: processes that load a dataset's items. Where a process group is set up (``torchrun``), the batch is
    shared among its processes, whose number changes the result by rounding only.

    ``out``: a folder for the run's state, saved ``every`` so many steps and at the end, and for metrics.csv. A run that
    was stopped, however, goes on from there with ``resume=True`` and the same arguments, and on a CPU ends with the
    same bits (but for what a dataset or a network draws for itself: augmentation, dropout). ``about``: what else must
    be the same then, as JSON. ``callback(step, averaged network)`` is called after each save, in the first process.

    Raises ValueError or TypeError that names the argument, FloatingPointError for a loss that is not finite, and
    FileExistsError where ``out`` holds a run and resume is False.
    """
    _checks.instance(sde, gaussian=predicts != "score")
    _checks.lookup(KINDS, predicts, "prediction")
    steps, batch, every = (_checks.count(n, s) for n, s in ((steps, "steps"), (batch, "batch"), (every, "every")))
    if not 0 <= label_drop < 1:
        raise ValueError(f"label_drop must be a fraction of at least 0 and below 1, got {label_drop!r}")
    warmup, seed = _checks.count(warmup, "warmup", minimum=0), _checks.count(seed, "seed", minimum=0)
    lr, clip = _checks.positive(lr, "lr"), _checks.positive(clip, "clip")
    decay = _checks.lookup({"cosine": _cosine, "constant": lambda fraction: 1.0}, schedule, "schedule")
    to_time = times if callable(times) else _checks.lookup(TIMES, times, "times")(sde)
    objective = objective or denoising()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ranks, run = Ranks.here(), None if out is None else Path(out)
    settings = {
        "predicts": predicts, "steps": steps, "batch": batch, "lr": lr, "warmup": warmup, "schedule": schedule,
        "weight_decay": weight_decay, "clip": clip, "ema": ema, "label_drop": label_drop, "seed": seed, "bf16": bf16,
        "times": times if isinstance(times, str) else "a callable", "process": _fingerprint(sde), **(about or {}),
    }  # fmt: skip

    network.to(device).train()
    weights = list(network.parameters())  # once: to find them takes a per cent of a small network's step
    weight = next((w for w in weights if w.is_floating_point()), None)
    if weight is None:
        raise ValueError(f"network must have weights to train, {type(network).__name__} has none")
    settings["items"] = len(data)  # type: ignore[arg-type]
    if isinstance(data, Tensor):
        data = _checks.state(data, "data")
        some = data[:: max(1, len(data) // 64)].detach().cpu().double()
        settings["data's digest"] = hashlib.blake2b(some.numpy().tobytes(), digest_size=8).hexdigest()
    if labels is not None and not (isinstance(data, Tensor) and len(labels) == len(data)):
        raise ValueError("labels must be one for each item of a data tensor; a dataset brings its own")
    average = EMA(network, ema)
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=weight_decay)
    done, losses = 0, torch.zeros(0)
    if run is not None:
        run.mkdir(parents=True, exist_ok=True)
        if ranks.first:
            for unfinished in run.glob("*.safetensors*.part"):  # what was being written when the run was killed
                unfinished.unlink()
        if resume:
            done, losses = load_state(run, network, average, optimizer, settings)
        elif states(run):
            raise FileExistsError(
                f"{run} holds a run already: resume=True (--resume) goes on with it; or choose another folder"
            )
    module: nn.Module = DistributedDataParallel(network) if ranks.world > 1 else network
    score = as_score(torch.compile(module) if compile else module, sde, predicts=predicts)
    log = Metrics(run if ranks.first else None, done)

    draws = Draws(seed, batch, ranks, device)
    order = Order(len(data), draws, done + 1, steps)  # type: ignore[arg-type]
    loader = batches(data, labels, order, weight.dtype, workers)
    classes = getattr(network, "classes", None)
    if run is not None and done == steps and callback is not None and ranks.first:
        callback(steps, average.network)  # it may have been killed before it did
    recent: list[Tensor] = []
    bar = tqdm(loader, disable=not (progress and ranks.first), desc="training", initial=done, total=steps)
    for step, (x0, kinds) in enumerate(bar, start=done + 1):
        draws.enter(step)
        t = to_time(draws.levels())
        if kinds is not None and label_drop:
            if not classes:
                raise ValueError("label_drop needs network.classes, the label that stands for none; or set it to 0")
            kinds = torch.where(draws.uniform() < label_drop, classes, kinds)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, step / (warmup + 1)) * decay((step - 1) / steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if not sde.common(x0):
                raise ValueError(f"{type(sde).__name__} has a y for each sample, and data are shuffled: give it one y")
            loss = objective(score.given(kinds), x0, t, partial(draws.normal, x0)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        average.update(network)
        recent.append(loss.detach().float())
        saving = run is not None and (step % every == 0 or step == steps)
        if len(recent) == CHECK_EVERY or step == steps or saving:
            found = ranks.mean(torch.stack(recent)).cpu()
            _finite(found, step - len(recent) + 1)
            losses, recent = torch.cat([losses, found]), []
            bar.set_postfix(loss=f"{float(found.mean()):.4f}")
            log.row(step, float(found.mean()), float(norm), batch)
        if saving and ranks.first:
            save_state(run, step, network, average, optimizer, losses, settings)  # type: ignore[arg-type]
            if callback is not None:
                callback(step, average.network)
        if saving:
            ranks.wait()
    network.eval()
    return Trained(average.network, losses)


class Metrics:
    """metrics.csv: a row per look at the loss; those past the step that a run goes on from are dropped."""

    fields = ("step", "loss", "gradient_norm", "samples_per_second")

    def __init__(self, folder: Path | None, done: int) -> None:
        self.path = None if folder is None else folder / "metrics.csv"
        self.step, self.time = done, time.perf_counter()
        if self.path is None:
            return
        kept = []
        if done and self.path.is_file():
            with open(self.path, newline="", encoding="utf-8") as file:
                rows = [row for row in csv.reader(file) if len(row) == len(self.fields) and row[0].isdigit()]
            kept = [row for row in rows if int(row[0]) <= done]
        with open(self.path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([self.fields, *kept])

    def row(self, step: int, loss: float, norm: float, batch: int) -> None:
        """After ``step``: the mean loss since the row before, and the last gradient's norm before clipping."""
        now = time.perf_counter()
        if self.path is not None:
            rate = (step - self.step) * batch / max(now - self.time, 1e-9)
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([step, f"{loss:.6g}", f"{norm:.4g}", f"{rate:.1f}"])
        self.step, self.time = step, now


def _fingerprint(sde: Any) -> list[Any]:
    if not hasattr(sde, "alpha"):  # an ItoSDE: what its numbers are
        mine = sorted((k, v) for k, v in vars(sde).items() if isinstance(v, int | float | str))
        return [type(sde).__name__, sde.noise_type, sde.T, sde.t_min, sde.steps, *map(list, mine)]
    times = torch.linspace(sde.t_min, sde.T, 5, dtype=torch.float64)
    law = [y if isinstance(y, int | float | str) else getattr(y, "__qualname__", type(y).__name__) for y in sde.law()]
    return [type(sde).__name__, *law, *sde.alpha(times).tolist(), *sde.sigma(times).tolist()]


def _cosine(fraction: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * fraction))


def _finite(losses: Tensor, first: int) -> None:
    bad = (~torch.isfinite(losses)).nonzero().flatten()
    if bad.numel():
        at = int(bad[0])
        raise FloatingPointError(
            f"the loss became {float(losses[at])} at step {first + at}; lower lr, clip harder, or raise t_min, and "
            "check that the data are finite"
        )
