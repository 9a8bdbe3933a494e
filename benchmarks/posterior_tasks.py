"""What the scorecard of posterior samplers asks: mixtures, observations, how far draws are from exact ones."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from sdekit import GaussianMixture, HeatODE
from sdekit.posterior import Observation

FLOOR, DIRECTIONS, D = 1e-3, 200, 64
PITCH, LATTICE_STD = 8.0, 0.25
LATTICES = ((8, 1), (80, 2))  # numbers of x_0 and of y


@dataclass(frozen=True)
class Case:
    """y = A x_0 + std eps of a mixture under x_t = x_0 + t eps; y (d_y,), or (n, d_y), an observation for each sample.

    ``spread``: the standard deviation of a number of x_0, which some methods want to be told.
    """

    data: GaussianMixture
    sde: HeatODE
    score: Any
    a: Tensor
    std: float
    y: Tensor
    spread: float

    @property
    def d(self) -> int:
        """How many numbers x_0 has."""
        return self.a.shape[1]

    @property
    def observation(self) -> Observation:
        """As the library takes it."""
        return Observation(self.y, self.a, self.std)

    def posterior(self) -> GaussianMixture:
        """The exact p(x_0 | y), of one y."""
        return self.data.posterior(self.a, self.y, self.std)

    def log_evidence(self) -> float:
        """The exact log p(y), of one y."""
        means, covs = self.data.means @ self.a.mT, self.a @ self.data.covs @ self.a.mT
        noise = self.std**2 * torch.eye(len(self.a), dtype=torch.float64)
        return float(GaussianMixture(means, covs + noise, self.data.weights).log_prob(self.y[None]))


def observed(case: Case, n: int, seed: int) -> tuple[Case, Tensor]:
    """The case with n observations of draws of its data, and the draws; with n = 0 one observation, (d_y,)."""
    x_0 = case.data.sample(max(n, 1), seed=100 + seed, dtype=torch.float64)
    noise = torch.randn(max(n, 1), len(case.a), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    y = x_0 @ case.a.mT + case.std * noise
    return replace(case, y=y if n else y[0]), x_0


def mixture() -> GaussianMixture:
    """Ten Gaussians, one for each digit; pixels from -1 to 1."""
    x, label = load_digits(return_X_y=True)
    groups = [x[label == k] / 8 - 1 for k in range(10)]
    covs = np.stack([np.cov(g.T) + FLOOR * np.eye(D) for g in groups])
    return GaussianMixture(np.stack([g.mean(0) for g in groups]), covs, [len(g) / len(x) for g in groups])


def operators() -> dict[str, Tensor]:
    """The matrices of the tasks on digits."""
    unit = torch.eye(D, dtype=torch.float64)
    pixels = torch.randperm(D, generator=torch.Generator().manual_seed(3))[:16].sort().values
    means = unit.reshape(D, 4, 2, 4, 2).mean((2, 4)).reshape(D, 16).mT
    return {"upper half": unit[:32], "16 pixels": unit[pixels], "2 x 2 means": means}


def digits(task: str, std: float) -> Case:
    """A task on the mixture of digits, without an observation yet: levels from 80 to .01."""
    data, sde, a = mixture(), HeatODE(T=80.0), operators()[task]
    sde.t_min = 0.01
    return Case(data, sde, data.score(sde), a, std, torch.zeros(len(a), dtype=torch.float64), 0.6)


def lattice(d: int, entries: int, seed: int) -> Case:
    """MCGDiff's 25 Gaussians of unit spread, equal weights, means (8 i, 8 j, 8 i, 8 j, ...), i and j from -2 to 2.

    A has orthonormal rows, of normal numbers. Levels from 1,000, since x_0 is up to 100 from 0, to .05.
    """
    i, j = torch.meshgrid(*2 * [torch.arange(-2.0, 3.0, dtype=torch.float64)], indexing="ij")
    means = PITCH * torch.stack([i.flatten(), j.flatten()], 1).repeat(1, d // 2)
    data = GaussianMixture(means, torch.eye(d, dtype=torch.float64).expand(25, d, d))
    sde = HeatODE(T=1000.0)
    sde.t_min = 0.05
    rows = torch.randn(d, entries, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    a = torch.linalg.qr(rows)[0].mT
    return Case(data, sde, data.score(sde), a, LATTICE_STD, torch.zeros(entries, dtype=torch.float64), PITCH * 2**0.5)


def directions(d: int) -> Tensor:
    """Unit vectors, (d, DIRECTIONS), the same for all."""
    u = torch.randn(d, DIRECTIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return u / u.norm(dim=0)


def sliced(a: Tensor, b: Tensor, power: int = 2) -> float:
    """The sliced Wasserstein distance, of order 1 or 2, of as many samples of each."""
    u = directions(a.shape[1])
    return float(((a @ u).sort(0).values - (b @ u).sort(0).values).abs().pow(power).mean() ** (1 / power))


def shares(posterior: GaussianMixture, x: Tensor) -> Tensor:
    """How likely each x is each component's, (n, K)."""
    parts = []
    for k in range(len(posterior.weights)):
        one = GaussianMixture(posterior.means[k : k + 1], posterior.covs[k : k + 1])
        parts.append(posterior.weights[k].log() + one.log_prob(x))
    return torch.stack(parts, 1).softmax(1)


def mode_error(posterior: GaussianMixture, x: Tensor) -> float:
    """The total variation between the components' shares in x and their weights."""
    return float((shares(posterior, x).mean(0) - posterior.weights).abs().sum()) / 2
