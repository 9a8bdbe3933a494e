"""The two assets of the package, made from scikit-learn's digits: ``python -m sdekit.training.digits``.

``digits.safetensors``: a U-Net for the 1797 images 8x8, process VPSDE(), predicts v. Predicting eps would put
1/alpha = 152 in front of the network's error in x_0 = (x - sigma eps)/alpha at T; v has it bounded.
``digits_features.safetensors``: a classifier, whose hidden layer serves
``sdekit.evaluation.metrics.load_feature_extractor``.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from sdekit.processes.gaussian import VPSDE
from sdekit.processes.sde import SDE
from sdekit.training.checkpoint import save_checkpoint
from sdekit.training.features import save_features, train_classifier
from sdekit.training.networks import build
from sdekit.training.trainer import Trained, train

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def load_digits() -> tuple[Tensor, Tensor]:
    """The 1797 digits as images (1797, 1, 8, 8) in [-1, 1], float32, and labels (1797,), int64."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'sdekit[train]'") from error
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1  # grey values are 0 ... 16
    return images, torch.tensor(digits.target, dtype=torch.int64)


def train_digits(sde: SDE, images: Tensor, *, steps: int = 4000, seed: int = 0) -> Trained:
    """A U-Net of 0.7M weights that predicts v for images (N, 1, 8, 8), as the bundled one was trained."""
    network = build("UNet", seed=seed, channels_in=1, width=32, multipliers=(1, 2), blocks=1)
    return train(
        network, sde, images, predicts="v", steps=steps, batch=64, lr=2e-3, ema=0.999, seed=seed, progress=True
    )


def main(arguments: list[str] | None = None) -> None:
    """Train both networks and write both files."""
    parser = argparse.ArgumentParser(prog="python -m sdekit.training.digits", description=__doc__)
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder for the two files (default: the package's)")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of the diffusion model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits()

    start = time.perf_counter()
    fitted = train_classifier(images, labels, seed=options.seed)
    save_features(options.out / "digits_features.safetensors", fitted)
    print(
        f"classifier: {fitted.train_accuracy:.2%} of the training and {fitted.test_accuracy:.2%} of the held-out "
        f"images right, {time.perf_counter() - start:.0f} s"
    )

    start = time.perf_counter()
    sde = VPSDE()
    trained = train_digits(sde, images, steps=options.steps, seed=options.seed)
    path = options.out / "digits.safetensors"
    save_checkpoint(
        path, trained.network, sde, "v", event=(1, 8, 8), data_range=(-1.0, 1.0), levels=17, dtype=torch.float16
    )
    size = sum(w.numel() for w in trained.network.parameters())
    print(
        f"diffusion model: {size:,} weights, loss {float(trained.losses[-200:].mean()):.4f} over the last 200 steps, "
        f"{time.perf_counter() - start:.0f} s, {path} of {path.stat().st_size / 1e6:.2f} MB"
    )


if __name__ == "__main__":
    main()
