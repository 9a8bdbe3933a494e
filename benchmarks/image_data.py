"""Data sets, scores and feature spaces for the image benchmarks."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdekit import SDE, VPSDE
from sdekit.evaluation.metrics import Extractor, batched, inception_extractor, load_feature_extractor
from sdekit.models.network import NetworkScore
from sdekit.pretrained import load_pretrained
from sdekit.training.checkpoint import load_checkpoint, save_checkpoint
from sdekit.training.data import load_data
from sdekit.training.digits import load_digits
from sdekit.training.features import load_features, save_features, train_classifier
from sdekit.training.networks import build
from sdekit.training.trainer import train


@dataclass
class Problem:
    """Real images (N, C, H, W) in [-1, 1], a score that was trained on them, and the feature space to compare in."""

    images: Tensor
    sde: SDE
    score: NetworkScore
    extractor: Extractor
    metric: str


def digits(checkpoint: Path | None) -> Problem:
    sde, score = load_pretrained("digits") if checkpoint is None else load_score(checkpoint, (1, 8, 8))
    extractor = load_feature_extractor("digits")
    return Problem(load_digits()[0], sde, score, extractor, "Fréchet distance (digits features)")


def fashion_mnist(data: Path, checkpoint: Path | None, train_steps: int, out: Path) -> Problem:
    """Fashion-MNIST from IDX files; what is not given is trained here, kept under ``out``, and said."""
    try:
        loaded = load_data(str(data if data.is_dir() else data.parent))  # the folder of the IDX files, or a file in it
    except (ValueError, OSError) as error:
        raise SystemExit(f"--data: {error}") from None
    images, labels = loaded.items, loaded.labels
    if checkpoint is None:
        checkpoint = out / f"fashion-mnist-{train_steps}-steps.safetensors"
        if checkpoint.is_file():
            print(f"score: {checkpoint}, trained by an earlier run for {train_steps} steps")
        else:
            print(f"score: no --checkpoint given; a small U-Net is trained for {train_steps} steps (a weak model)")
            network = build("UNet", channels_in=1, width=32, multipliers=(1, 2, 2))
            network = train(network, VPSDE(), images, steps=train_steps, batch=64, lr=1e-3, progress=True).network
            save_checkpoint(checkpoint, network, VPSDE(), "v", event=(1, 28, 28), data_range=(-1.0, 1.0))
    sde, score = load_score(checkpoint, (1, 28, 28))
    cache = out / "fashion-mnist-features.safetensors"
    if not cache.is_file():
        print("features: a small classifier is trained on the data set's labels, once")
        fitted = train_classifier(images[:20000], labels[:20000], epochs=4, width=16)
        print(f"features: {fitted.test_accuracy:.1%} of the held-out images right; kept as {cache}")
        save_features(cache, fitted)
    extractor = batched(load_features(cache).features)
    return Problem(images[:10000], sde, score, extractor, "Fréchet distance (fashion-mnist classifier features)")


def load_score(checkpoint: Path, event: tuple[int, ...]) -> tuple[SDE, NetworkScore]:
    """The score of a file, which must be for images of shape ``event`` if it says what it is for."""
    sde, score = load_checkpoint(checkpoint)
    if score.event not in (None, event):
        raise SystemExit(f"--checkpoint {checkpoint} is for images of shape {score.event}, not {event}")
    return sde, score


def with_inception(problem: Problem, weights: Path) -> Problem:
    """The same problem, measured in InceptionV3's features: the FID."""
    extractor = inception_extractor(weights)

    def features(images: Tensor) -> Tensor:
        levels = ((images + 1) * 127.5).round() / 127.5 - 1  # the FID is that of 8-bit images
        return extractor(levels.expand(-1, 3, -1, -1))  # grey, three times

    problem.extractor = features
    problem.metric = "FID (InceptionV3, pytorch-fid weights)"
    return problem
