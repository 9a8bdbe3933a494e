"""Denoising score matching: a network learns what :func:`sdekit.score.prediction_target` says, by regression."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sdekit import _checks
from sdekit.score import PREDICTIONS, prediction_target
from sdekit.sde import SDE
from sdekit.system import expand
from sdekit.training.ema import EMA

CHECK_EVERY = 50  # steps between looks at the loss: looking waits for the device


class Trained(NamedTuple):
    """``network``: the averaged one; ``losses`` (steps,): float32, on the CPU."""

    network: nn.Module
    losses: Tensor


def train(
    network: nn.Module,
    sde: SDE,
    data: Tensor,
    *,
    predicts: str = "v",
    steps: int = 2000,
    batch: int = 128,
    lr: float = 1e-3,
    warmup: int = 100,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    clip: float = 1.0,
    ema: float = 0.999,
    times: str | Callable[[Tensor], Tensor] = "low_discrepancy",
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> Trained:
    """Train ``network(x_t, t)`` on data (N, *event) by denoising score matching; it is trained in place.

    The loss is  E w(t) |network(x_t, t) - target|^2  (mean over the event), x_t = alpha x_0 + sigma eps, with the
    target of ``predicts`` and w = 1; for "score" w = sigma^2, without which t_min would be all of the loss.
    As a weight of |eps error|^2 that is: 1 for "eps" and "score" (Vincent 2011; Ho et al. 2020, L_simple),
    1/SNR for "x0", and for "v" ((alpha^2 + sigma^2)/alpha)^2, SNR + 1 as a weight of |x_0 error|^2 under VP
    (Salimans & Ho 2022); "flow" is Lipman et al. 2023.

    ``times``: how t lies in [t_min, T]: "uniform"; "low_discrepancy", one uniform shift of an even grid per batch,
    which has less variance (Kingma et al. 2021, appendix I.1); or a callable from u (B,) in [0, 1), which is of
    low discrepancy, to t. AdamW with gradients clipped to norm ``clip``; ``lr`` rises over ``warmup`` steps and
    then falls as a cosine to 0 or stays ("constant"). ``ema``: see :class:`sdekit.training.ema.EMA`.
    ``seed`` fixes the data order, times and noise (the network brings its own first weights, see
    :func:`sdekit.training.networks.build`); the global RNG is not touched,
    unless the network itself draws from it (dropout).
    ``device``: cuda if there is one, else the CPU.

    Raises ValueError or TypeError that names the argument, and FloatingPointError for a loss that is not finite.
    """
    _checks.lookup(PREDICTIONS, predicts, "prediction")
    steps, batch = _checks.count(steps, "steps"), _checks.count(batch, "batch")
    warmup, seed = _checks.count(warmup, "warmup", minimum=0), _checks.count(seed, "seed", minimum=0)
    lr, clip = _checks.positive(lr, "lr"), _checks.positive(clip, "clip")
    decay = _checks.lookup({"cosine": _cosine, "constant": lambda fraction: 1.0}, schedule, "schedule")
    even = callable(times) or _checks.lookup({"low_discrepancy": True, "uniform": False}, times, "times")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network.to(device).train()
    weight = next(w for w in network.parameters() if w.is_floating_point())
    data = _checks.state(data, "data").to(device, weight.dtype)
    average = EMA(network, ema)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)) * decay(step / steps)
    )
    generator = torch.Generator(device).manual_seed(seed)
    losses: list[Tensor] = []
    bar = tqdm(range(1, steps + 1), disable=not progress, desc="training")
    for step in bar:
        x0 = data[torch.randint(len(data), (batch,), generator=generator, device=device)]
        u = unit_times(batch, generator, even=even)
        t = times(u) if callable(times) else sde.t_min + (sde.T - sde.t_min) * u
        eps = torch.randn(x0.shape, generator=generator, device=device, dtype=x0.dtype)
        loss = matching_loss(network, sde, predicts, x0, eps, t)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        optimizer.step()
        rate.step()
        average.update(network)
        losses.append(loss.detach().float())
        if step % CHECK_EVERY == 0 or step == steps:
            recent = torch.stack(losses[-CHECK_EVERY:])
            _finite(recent, step - len(recent) + 1)
            bar.set_postfix(loss=f"{float(recent.mean()):.4f}")
    network.eval()
    return Trained(average.network, torch.stack(losses).cpu())


def matching_loss(network: nn.Module, sde: SDE, predicts: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The loss of :func:`train` for the pairs (x_0, eps) (B, *event) at t (B,), float64; a 0-d tensor."""
    alpha, sigma = expand(sde.alpha(t), x0), expand(sde.sigma(t), x0)
    target = prediction_target(predicts, sde, x0, eps, t)
    out = network(alpha * x0 + sigma * eps, t.to(torch.promote_types(x0.dtype, torch.float32)))
    if out.shape != x0.shape:
        raise ValueError(f"the network must return x's shape {tuple(x0.shape)}, got {tuple(out.shape)}")
    error = (out - target).float()
    return (sigma.float() * error if predicts == "score" else error).square().mean()


def unit_times(batch: int, generator: torch.Generator, *, even: bool) -> Tensor:
    """u (batch,) in [0, 1), float64 on the generator's device, each uniform; ``even``: (U + i/batch) mod 1."""
    count = 1 if even else batch
    u = torch.rand(count, generator=generator, device=generator.device, dtype=torch.float64)
    return (u + torch.arange(batch, dtype=u.dtype, device=u.device) / batch) % 1 if even else u


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
