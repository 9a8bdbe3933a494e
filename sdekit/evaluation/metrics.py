"""How far apart two sets of images are: the Fréchet distance, and what extracts the features it is taken in."""

import os
from collections.abc import Callable
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.training.features import load_features

Extractor = Callable[[Tensor], Tensor]

EXTRACTORS = {"digits": "digits_features.safetensors"}


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), the squared 2-Wasserstein distance of fitted Gaussians.

    ``features_a`` (N, F), ``features_b`` (M, F), of any real dtype; computed in float64 with the unbiased
    covariances. The trace of the root is that of (C_a^(1/2) C_b C_a^(1/2))^(1/2), which is symmetric, so rank-deficient
    covariances (N <= F) are no trouble. Called FID where the features are InceptionV3's. The estimate is biased upwards
    by few samples: compare only numbers of equal sample counts.

    Raises ValueError unless both are matrices of the same F with at least two finite rows.  Heusel et al. 2017, eq. 6.
    """
    a, b = (_features(x, name) for x, name in ((features_a, "features_a"), (features_b, "features_b")))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features_a and features_b must have the same width, got {a.shape[1]} and {b.shape[1]}")
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp_min(0).sqrt()  # V sqrt(d): its Gram form has the spectrum of the symmetric one
    cross = torch.linalg.eigvalsh(root.T @ cov_b @ root).clamp_min(0).sqrt().sum()  # below 0 only by rounding
    distance = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return max(0.0, float(distance))


def sliced_wasserstein(a: Tensor, b: Tensor, directions: int = 256, seed: int = 0) -> float:
    """(E_u W_2(u . a, u . b)^2)^(1/2), u uniform on the sphere: the sliced 2-Wasserstein distance of samples.

    ``a``, ``b`` (N, *event), as many of each; sorted along each of ``directions`` drawn from ``seed``, in float64. Two
    sets of one law are some sqrt(1/N) apart. Raises ValueError for sets of other shapes.  Bonneel et al. 2015.
    """
    a, b = (_checks.state(x, name).flatten(1).to("cpu", torch.float64) for x, name in ((a, "a"), (b, "b")))
    if a.shape != b.shape:
        raise ValueError(f"a and b must be of one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    u = _directions(a.shape[1], directions, seed)
    return float(((a @ u).sort(0).values - (b @ u).sort(0).values).square().mean().sqrt())


@lru_cache(maxsize=1)  # a comparison takes the same hundreds of times
def _directions(d: int, many: int, seed: int) -> Tensor:
    with torch.inference_mode(False):
        u = torch.randn(d, many, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return u / u.norm(dim=0)


def load_feature_extractor(name: str) -> Extractor:
    """images (N, *event) -> features (N, F) of a bundled classifier, float32.

    "digits": images (N, 1, 8, 8) in [-1, 1], F = 48. Raises ValueError for an unknown name.
    """
    file = _checks.lookup(EXTRACTORS, name, "feature extractor")
    with resources.as_file(resources.files("sdekit") / "assets" / file) as path:
        return batched(load_features(path).features)


def inception_extractor(weights_path: str | os.PathLike[str], device: torch.device | str | None = None) -> Extractor:
    """images (N, 3, H, W) in [-1, 1] -> (N, 2048): the InceptionV3 features that the FID is defined on.

    ``weights_path``: pytorch-fid's ``pt_inception-2015-12-05-6726825d.pth``, the original TensorFlow weights.
    Raises FileNotFoundError for a missing file and ValueError for one that is not those weights.
    """
    from sdekit.evaluation.inception import load_inception  # 94 convolutions that nobody else needs

    network = load_inception(weights_path).to(device or "cpu")
    return batched(lambda images: network(images.to(device or "cpu", torch.float32)).cpu(), size=64)


def batched(features: Extractor, size: int = 1024) -> Extractor:
    """``features``, evaluated ``size`` images at a time and without gradients."""

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        return torch.cat([features(part) for part in _checks.state(images, "images").float().split(size)])

    return extract


def _features(x: Tensor, name: str) -> Tensor:
    if not isinstance(x, Tensor):
        x = torch.as_tensor(x)
    if x.ndim != 2 or x.shape[0] < 2 or x.shape[1] < 1:
        raise ValueError(f"{name} must be (N, F) with N >= 2, got shape {tuple(x.shape)}; flatten to one row per image")
    return _checks.state(x.to("cpu", torch.float64), name)
