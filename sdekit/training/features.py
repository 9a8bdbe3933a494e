"""A small image classifier, whose last hidden layer is the feature space of a Fréchet distance."""

import os
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdekit import _checks
from sdekit.training.checkpoint import read_tensors, write_tensors
from sdekit.training.networks import seeded

FORMAT = "sdekit-features-1"


class Classifier(nn.Module):
    """Two 3x3 convolutions, a hidden layer of ``features`` and a linear read-out of ``classes``.

    Images (N, channels_in, H, W) with H = W = ``size`` in [-1, 1]; ``forward`` gives logits (N, classes).
    """

    def __init__(self, channels_in: int = 1, size: int = 8, classes: int = 10, width: int = 24, features: int = 48):
        super().__init__()
        self.arguments = {
            "channels_in": channels_in, "size": size, "classes": classes, "width": width, "features": features,
        }  # fmt: skip
        for name, value in self.arguments.items():
            _checks.count(value, name)
        self.convolutions = nn.ModuleList([
            nn.Conv2d(channels_in, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, padding=1),
        ])  # fmt: skip
        side = max(1, min(4, size // 2))  # what the second pooling leaves, whatever the size
        self.hidden = nn.Linear(2 * width * side**2, features)
        self.last = nn.Linear(features, classes)
        self.side = side
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        """The hidden layer, (N, features), scaled to a mean variance of 1 over the images it was fitted to."""
        h = functional.max_pool2d(functional.silu(self.convolutions[0](images)), 2)
        h = functional.adaptive_avg_pool2d(functional.silu(self.convolutions[1](h)), self.side)
        return self.scale * functional.silu(self.hidden(h.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """The logits, (N, classes)."""
        return self.last(self.features(images))


class Fitted(NamedTuple):
    """``train_accuracy`` and ``test_accuracy`` are fractions."""

    network: Classifier
    train_accuracy: float
    test_accuracy: float


def train_classifier(
    images: Tensor, labels: Tensor, *, held_out: float = 0.2, epochs: int = 40, batch: int = 128, lr: float = 3e-3,
    width: int = 24, features: int = 48, seed: int = 0,
) -> Fitted:  # fmt: skip
    """Fit a classifier to images (N, C, H, W) and labels (N,) by cross-entropy (Adam, cosine lr).

    A random ``held_out`` fraction is kept out of training, to report accuracy on. ``seed`` fixes the weights,
    the split and the order; the global RNG is not touched. Raises ValueError where images and labels differ in number.
    """
    if len(images) != len(labels):
        raise ValueError(f"labels must be one per image: got {len(labels)} for {len(images)} images")
    generator = torch.Generator().manual_seed(_checks.count(seed, "seed", minimum=0))
    order = torch.randperm(len(images), generator=generator)
    test, kept = order[: int(held_out * len(order))], order[int(held_out * len(order)) :]
    arguments = {
        "channels_in": images.shape[1], "size": images.shape[2], "classes": int(labels.max()) + 1, "width": width,
        "features": features,
    }  # fmt: skip
    network = seeded(Classifier, seed, arguments)
    assert isinstance(network, Classifier)
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(kept) // batch))
    for _ in range(_checks.count(epochs, "epochs")):
        for chosen in kept[torch.randperm(len(kept), generator=generator)].split(batch):
            loss = functional.cross_entropy(network(images[chosen]), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval().requires_grad_(False)
    accuracies = [_accuracy(network, images[i], labels[i]) for i in (kept, test)]
    with torch.no_grad():
        scale = torch.cat([network.features(part) for part in images.split(1024)]).var(0).mean().rsqrt()
        network.scale.copy_(scale)
        network.last.weight /= scale  # the logits stay what they were
    return Fitted(network, *accuracies)


def save_features(path: str | os.PathLike[str], fitted: Fitted, dtype: torch.dtype = torch.float32) -> None:
    """Write a classifier to one safetensors file."""
    network, train, test = fitted
    about = {"arguments": network.arguments, "train_accuracy": train, "test_accuracy": test}
    write_tensors(path, network.state_dict(), FORMAT, about, dtype)


def load_features(path: str | os.PathLike[str]) -> Classifier:
    """The classifier of a file of :func:`save_features`; FileNotFoundError or ValueError for a bad file."""
    about, weights = read_tensors(path, FORMAT)
    try:
        network = seeded(Classifier, 0, about["arguments"])
        network.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{os.fspath(path)} does not describe a classifier: {error}") from error
    assert isinstance(network, Classifier)
    return network.eval().requires_grad_(False)


def _accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    if len(images) == 0:
        return float("nan")
    with torch.no_grad():
        hits = [network(x).argmax(1) == y for x, y in zip(images.split(512), labels.split(512), strict=True)]
    return float(torch.cat(hits).float().mean())
