"""The models of trust.py: right ones in parts, and some that are wrong by more than what is said of them."""

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import networks
import torch
from torch import Tensor, nn

from sdekit import (
    SDE,
    VPSDE,
    BetaTable,
    GaussianMixture,
    Noise,
    as_score,
    load_pretrained,
)
from sdekit.processes.kinds import express, kind_of
from sdekit.training.digits import load_digits
from sdekit.training.trainer import train

Case = tuple[SDE, Any, Tensor]
DIM = 8


class Parts(NamedTuple):
    """A right model in parts: the network, its process, prediction, clock and data."""

    network: Callable[..., Tensor]
    sde: SDE
    predicts: str
    clock: Callable[[Tensor], Tensor]
    data: Tensor

    def case(self, **wrong: Any) -> Case:
        """The model, with what is said of it wrong."""
        p = self._replace(**wrong)
        return p.sde, as_score(p.network, p.sde, predicts=p.predicts, time=p.clock), p.data


@cache
def digits() -> tuple[Tensor, Tensor]:
    return load_digits()


@cache
def bundled() -> Parts:
    sde, score = load_pretrained("digits")
    return Parts(score.network, sde, score.predicts, lambda t: t, digits()[0])


@cache
def unet() -> Parts:
    from diffusers import DDPMScheduler, UNet2DModel

    from sdekit.adapters.diffusers import from_diffusers

    folder = networks.FOLDER / "diffusers_unet"
    network = UNet2DModel.from_pretrained(folder / "unet", low_cpu_mem_usage=False).float().eval()
    sde, _ = from_diffusers(network, DDPMScheduler.from_pretrained(folder / "scheduler"))
    return Parts(lambda x, t: network(x, t).sample, sde, "eps", lambda t: 1000 * t - 1, digits()[0])


@cache
def mixture() -> GaussianMixture:
    """Four modes in eight dimensions, of about unit size, each wide in some directions and narrow in others."""
    z = Noise(torch.empty(4, DIM, DIM + 1, dtype=torch.float64), 5).normal()
    roots = z[..., :DIM] * torch.logspace(0, -1.5, DIM, dtype=torch.float64)
    covariances = 0.2 * roots @ roots.mT / DIM + 1e-3 * torch.eye(DIM, dtype=torch.float64)
    return GaussianMixture(0.8 * z[..., DIM] + 0.3, covariances, [0.4, 0.3, 0.2, 0.1])


def exact(sde: SDE, predicts: str, x: Tensor, t: Tensor) -> Tensor:
    """What a perfect network says."""
    score = mixture().score(sde)
    time = t.double()
    a, b = express(kind_of(predicts, sde, time), kind_of("v", sde, time), sde.alpha(time), sde.sigma(time))
    return (a[:, None] * score.output(x.double(), time) + b[:, None] * x.double()).to(x)


@cache
def closed(predicts: str = "eps", sde: SDE | None = None) -> Parts:
    """The mixture's exact score as a network on the clock t."""
    process = sde or VPSDE()
    data = mixture().sample(2000, seed=0).float()
    return Parts(partial(exact, process, predicts), process, predicts, lambda t: t, data)


def rough(parts: Parts, steps: int = 200) -> Case:
    """Trained on for some steps at a high rate, and the last weights taken for the averaged ones."""
    assert isinstance(parts.network, nn.Module)
    network = copy.deepcopy(parts.network).requires_grad_()
    found = train(
        network,
        parts.sde,
        parts.data,
        predicts=parts.predicts,
        steps=steps,
        batch=64,
        lr=4e-3,
        ema=0.0,
        schedule="constant",
        seed=1,
    )
    return parts.case(network=found.network)


def dropped(parts: Parts) -> Case:
    """As a network with dropout does in training mode."""
    drop = nn.Dropout(0.1)
    return parts.case(network=lambda x, t: drop(parts.network(x, t)))


def normed(parts: Parts) -> Case:
    """As a network with batch norm does in training mode."""
    return parts.case(network=lambda x, t: parts.network(x - 0.3 * (x.mean(0, keepdim=True)), t))


def swapped() -> Case:
    """The mixture as pictures of 3 channels, of data whose channels are in the other order."""
    parts = closed()
    pictures = parts.data[:, :6].reshape(-1, 3, 1, 2)
    law = GaussianMixture(mixture().means[:, :6], mixture().covs[:, :6, :6], mixture().weights)
    score = law.score(VPSDE())
    return VPSDE(), as_score(lambda x, t: score(x, t), VPSDE()), pictures[:, [2, 1, 0]]


def labels_of_others() -> Case:
    """A conditional network, whose labels do not go with the data."""
    images, _ = digits()
    sde, score = networks.load("eps_conditional", len(images))
    return sde, score, images


def scaled_linear() -> SDE:
    return BetaTable(networks.scaled_linear())


def shifted(parts: Parts, steps: float) -> Case:
    """Its clock some steps of a thousand late."""
    return parts.case(clock=lambda t: parts.clock((t + steps * parts.sde.T / 1000).clamp(0, parts.sde.T)))


def times(parts: Parts, factor: float) -> Case:
    """What it says, multiplied."""
    return parts.case(network=lambda x, t: factor * parts.network(x, t))
