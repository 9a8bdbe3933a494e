"""GaussianMixture: data with an exact score, density and marginals under any process. The oracle."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdekit import _checks
from sdekit.models.derived import Under
from sdekit.noise.keyed import Noise
from sdekit.processes.law import require_white
from sdekit.processes.sde import SDE
from sdekit.system import Time, as_time


class GaussianMixture:
    """sum_k w_k N(m_k, C_k) over D numbers, in any event shape of D entries ((B,) for D = 1).

    ``means`` (K, D), ``covs`` (K, D, D), ``weights`` (K,), equal unless given. Computation is in float64;
    what is returned has x's dtype and device. Raises ValueError for shapes that do not fit, covariances
    that are not symmetric positive definite, weights that are negative or do not sum to one.
    """

    def __init__(self, means: Any, covs: Any, weights: Any = None) -> None:
        m, c = _numbers(means), _numbers(covs)
        if m.ndim != 2 or c.shape != (*m.shape, m.shape[-1]) or m.numel() == 0:
            raise ValueError(f"means must be (K, D) and covs (K, D, D), got {tuple(m.shape)} and {tuple(c.shape)}")
        w = torch.full(m.shape[:1], 1 / len(m), dtype=torch.float64) if weights is None else _numbers(weights)
        if not all(torch.isfinite(a).all() for a in (m, c, w)):
            raise ValueError("means, covs and weights must be finite")
        if w.shape != m.shape[:1] or (w < 0).any() or abs(float(w.sum()) - 1) > 1e-6:
            raise ValueError(f"weights must be {len(m)} numbers >= 0 that sum to 1, got {w.tolist()}")
        if not torch.allclose(c, c.mT, rtol=1e-8, atol=1e-12):
            raise ValueError("covs must be symmetric; use (C + C.mT) / 2")
        ev, u = torch.linalg.eigh(c)
        if (ev <= 0).any():
            k = int(ev.min(1).values.argmin())
            raise ValueError(f"covs must be positive definite: covs[{k}] has the eigenvalue {float(ev[k].min()):g}")
        self._set(m, ev, u, w)

    def _set(self, means: Tensor, ev: Tensor, u: Tensor, weights: Tensor) -> None:
        self.means, self.eigenvalues, self.eigenvectors, self.weights = means, ev, u, weights
        # All components' eigenvectors side by side, (D, K D), so that one product turns x into every one's frame.
        self._frames = u.transpose(0, 1).flatten(1)
        self._turned = (means.unsqueeze(1) @ u).squeeze(1)

    def __repr__(self) -> str:
        k, d = self.means.shape
        return f"GaussianMixture({k} in {d} dimensions)"

    @property
    def covs(self) -> Tensor:
        """Covariances (K, D, D)."""
        return (self.eigenvectors * self.eigenvalues[:, None, :]) @ self.eigenvectors.mT

    def at(self, sde: SDE, t: Time) -> "GaussianMixture":
        """The marginal p_t under a process: means alpha m_k, covariances alpha^2 C_k + sigma^2 K (I). t is one time."""
        if sde.root is not None:
            return self._mapped(sde.whiten).at(sde.white, t)._mapped(sde.colour)
        if not sde.diffuses:
            require_white(sde, "the marginal of a mixture")
        a, s = (torch.as_tensor(y, dtype=torch.float64) for y in (sde.alpha(t), sde.sigma(t)))
        if a.ndim:
            raise ValueError(f"t must be one time, got shape {tuple(a.shape)}; score and log_prob take one per sample")
        marginal = GaussianMixture.__new__(GaussianMixture)
        if not sde.common(self.means[:1]):
            raise ValueError(f"{type(sde).__name__} has a y for each sample, and a marginal is of one: give it one y")
        means = a * self.means if sde.centred else sde.place(a * self.means, t)
        marginal._set(means, a**2 * self.eigenvalues + s**2, self.eigenvectors, self.weights)
        return marginal

    def _mapped(self, by: Callable[[Tensor], Tensor]) -> "GaussianMixture":
        """The law of a linear map of x, invertible."""
        a = _matrix(by, self.means.shape[1])
        covs = a @ self.covs @ a.mT
        return GaussianMixture(self.means @ a.mT, (covs + covs.mT) / 2, self.weights)

    def sample(self, n: int, *, seed: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """n draws, (n, D)."""
        n = _checks.count(n, "n")
        d = self.means.shape[1]
        z = Noise(torch.empty(n, d + 1, dtype=torch.float64), seed, purpose="data").normal()
        u = 0.5 * (1 + torch.erf(z[:, 0] / math.sqrt(2)))  # uniform, to choose the component
        k = torch.searchsorted(self.weights.cumsum(0), u).clamp_max(len(self.weights) - 1)
        x = self.means[k] + torch.einsum("bdj,bj->bd", self.eigenvectors[k], self.eigenvalues[k].sqrt() * z[:, 1:])
        return x.to(_checks.floating(dtype) or torch.get_default_dtype())

    def posterior(self, A: Tensor | Callable[[Tensor], Tensor], y: Any, std: Any) -> "GaussianMixture":
        """p(x_0 | y) for one observation y (d_y,) = A x_0 + std eps: a mixture again, whose score is the exact
        conditional score at every t.

        With S_k = A C_k A' + std^2 and K_k = C_k A' S_k^-1 its components are
        N(m_k + K_k (y - A m_k), (I - K_k A) C_k), of weights proportional to w_k N(y; A m_k, S_k)  (Bishop 2006,
        eq. 2.113-2.117). ``A``: a matrix (d_y, D), or a linear callable of (B, D). ``std``: a number or (d_y,), >= 0;
        what is known without noise has no variance left: then x can be sampled, and has a score where sigma(t) > 0,
        and no density. Raises ValueError for shapes that do not fit, an A that is not linear, std < 0, and an S_k that
        is singular: without noise the rows of A must be independent.
        """
        d = self.means.shape[1]
        a = _matrix(A, d) if callable(A) else _numbers(A)
        if a.ndim != 2 or a.shape[1] != d or not torch.isfinite(a).all():
            raise ValueError(f"A must be a finite matrix (d_y, {d}), or a callable of (B, {d}), got {tuple(a.shape)}")
        seen, r = _numbers(y), _numbers(std)
        if seen.shape != a.shape[:1] or not torch.isfinite(seen).all():
            raise ValueError(f"y must be one observation, {len(a)} finite numbers, got shape {tuple(seen.shape)}")
        if r.ndim > 1 or (r.ndim == 1 and r.shape != seen.shape) or not (torch.isfinite(r) & (r >= 0)).all():
            raise ValueError(f"std must be a finite number >= 0, or {len(a)} of them, got {r.tolist()}")
        noise = torch.diag(r.expand(len(a)) ** 2)
        ca = self.covs @ a.mT
        s = a @ ca + noise
        factor, failed = torch.linalg.cholesky_ex(s)
        scale = s.diagonal(dim1=1, dim2=2).amax(1)
        if failed.any() or (factor.diagonal(dim1=1, dim2=2).square().amin(1) <= 1e-13 * scale).any():
            raise ValueError(
                "A C A' + std^2 is singular: without noise the rows of A must be independent; give std > 0"
            )
        off = seen - self.means @ a.mT
        k = torch.cholesky_solve(ca.mT, factor).mT
        left = torch.eye(d, dtype=torch.float64) - k @ a
        ev, u = torch.linalg.eigh(left @ self.covs @ left.mT + k @ noise @ k.mT)  # positive whatever K's rounding
        z = torch.linalg.solve_triangular(factor, off[..., None], upper=False)[..., 0]
        log_w = self.weights.log() - 0.5 * z.square().sum(1) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
        given = GaussianMixture.__new__(GaussianMixture)
        means = self.means + torch.einsum("kdj,kj->kd", k, off)
        rounding = 1e-14 * ev.amax(1, keepdim=True)
        given._set(
            means, torch.where(ev > rounding, ev, 0.01 * rounding if (r > 0).all() else 0.0), u, log_w.softmax(0)
        )
        return given

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density in nats at x (B, *event), (B,) in x's dtype. ValueError where something is known exactly."""
        if (self.eigenvalues == 0).any():
            raise ValueError("there is no density: some of x is known without noise (std = 0 in posterior)")
        log_r, _, _ = self._parts(x, torch.ones(()).double(), torch.zeros(()).double())
        return log_r.logsumexp(1).to(x)

    def score(self, sde: SDE) -> "MixtureScore":
        """grad log p_t as a score (x, t) -> like x; t is 0-d or (B,). As a model it predicts v, which it knows at
        alpha = 0 too.
        """
        return MixtureScore(self, sde)

    def _mean(self, x: Tensor, a: Tensor, s: Tensor, m: Any, n: Any) -> Tensor:
        """m E[x_0|x] - n grad log p(x), (B, D), float64; each of the two is exact at both ends of the noise levels.

        m and n are numbers, or like a and s: () or (B,).
        """
        log_r, z, v = self._parts(x, a, s)
        r = log_r.softmax(1)
        a, m, n = (y.reshape(-1, 1, 1).to(z) if isinstance(y, Tensor) else y for y in (a, m, n))
        gain = (m * a * self.eigenvalues.to(z) + n) / v * r.unsqueeze(2)  # of x - a m_k, in k's own frame
        out = (gain * z).flatten(1) @ self._frames.to(z).mT
        if isinstance(m, Tensor) or m != 0:
            out = out + (m * r.unsqueeze(2)).squeeze(2) @ self.means.to(z)
        return out

    def _parts(self, x: Tensor, a: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log w_k N_k(x) (B, K); x - a m_k in k's eigenvectors (B, K, D); its variances, (B or 1, K, D)."""
        _checks.floating(x.dtype, "x")
        flat = x.reshape(x.shape[0], -1).double()
        k, d = self.means.shape
        if flat.shape[1] != d:
            raise ValueError(f"x must have shape (B, *event) with {d} entries per sample, got {tuple(x.shape)}")
        turned, ev, frames, w, a, s = (
            y.to(flat.device)
            for y in (self._turned, self.eigenvalues, self._frames, self.weights, a, s)
        )  # fmt: skip
        a, s = a.reshape(-1, 1, 1), s.reshape(-1, 1, 1)
        v = a**2 * ev + s**2
        z = (flat @ frames).unflatten(1, (k, d)) - a * turned
        log_n = -0.5 * (z**2 / v + v.log()).sum(-1) - 0.5 * d * math.log(2 * math.pi)
        return w.log() + log_n, z, v


class MixtureScore:
    """The exact model of a :class:`GaussianMixture` under a process; made by its ``score``."""

    predicts = "v"

    def __init__(self, mixture: GaussianMixture, sde: SDE) -> None:
        _checks.instance(sde)
        if sde.root is not None:
            mixture = mixture._mapped(sde.whiten)
        elif not sde.diffuses:
            require_white(sde, "the score of a mixture")
        self.mixture, self.sde = mixture, sde

    def __repr__(self) -> str:
        return f"{self.mixture!r}.score({self.sde!r})"

    def __call__(self, x: Tensor, t: Time) -> Tensor:
        """grad log p_t, like x; K grad log p_t of a process with correlated noise."""
        time = as_time(t, self.sde.T).cpu()
        out = self.mixture._mean(self._white(x, time), self.sde.alpha(time), self.sde.sigma(time), 0.0, -1.0)
        return self.sde.colour(out.reshape(x.shape)).to(x)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """alpha eps - sigma x_0, like x."""
        if ready is None:
            time = time.cpu()
            ready = self.sde.alpha(time), self.sde.sigma(time)
        a, s = ready
        out = self.mixture._mean(self._white(x, time), a, s, -s, a * s)
        return self.sde.colour(out.reshape(x.shape)).to(x)

    def _white(self, x: Tensor, time: Tensor) -> Tensor:
        """x without the process's own mean, and where the noise is white: the mixture here is of that."""
        x = self.sde.centre(x, time)
        return x if self.sde.root is None else self.sde.whiten(x.double())

    def prepare(self, times: Sequence[float], x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """alpha and sigma at the times, by one call."""
        every = torch.tensor(times, dtype=torch.float64)
        return list(zip(self.sde.alpha(every).unbind(), self.sde.sigma(every).unbind(), strict=True))

    def under(self, sde: SDE) -> Under:
        """The same model under another process, by the map of noise levels (:class:`Under`)."""
        return Under(self, sde)


def _matrix(A: Callable[[Tensor], Tensor], d: int) -> Tensor:
    """The matrix (d_y, d) of a linear function of (B, d)."""
    unit = torch.eye(d, dtype=torch.float64)
    probe = torch.arange(1.0, d + 1, dtype=torch.float64).sin()
    columns = [_numbers(A(x)).reshape(len(x), -1) for x in (unit, torch.stack([probe, 0 * probe]))]
    off = (columns[1] - torch.stack([probe @ columns[0], 0 * columns[0][0]])).abs().amax()
    if off > 1e-4 * columns[0].abs().sum(0).amax():  # A may compute in float32
        raise ValueError(f"A must be linear: A(x) and what its values at unit vectors make of x differ by {off:g}")
    return columns[0].mT


def _numbers(a: Any) -> Tensor:
    return a.detach().to("cpu", torch.float64) if isinstance(a, Tensor) else torch.from_numpy(np.array(a, float))
