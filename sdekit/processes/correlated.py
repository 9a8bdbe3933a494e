"""Noise with a covariance of its own, under any process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.processes.law import digest, require_white
from sdekit.processes.sde import SDE
from sdekit.system import Time, shown


class CorrelatedSDE(SDE):
    """x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 K): a process whose noise is L z, K = L L'.

    It is the process inside for L^-1 x, so samplers, adaptive methods and the trainer go unchanged with L z for z, and
    the likelihood is that of L^-1 x, less log det L. A model says x_0, or eps = L z of x = alpha x_0 + sigma eps, or a
    mix of these ("v", "flow"); its "score" is -eps/sigma = K grad log p_t. Networks are best trained to say "v" or
    "x0": an error of eps counts by the inverse of K's eigenvalues.

    ``covariance``: K, (D, D), of flattened events. Or ``root``: L, a linear callable (B, *event) -> (B, *event), such
    as a filter, with its ``inverse``, a callable too, and ``log_det``, log |det L|, for the likelihood and exact
    scores. Raises ValueError for a K that is not symmetric and positive definite.
    """

    def __init__(
        self,
        sde: SDE,
        covariance: Any = None,
        *,
        root: Callable[[Tensor], Tensor] | None = None,
        inverse: Callable[[Tensor], Tensor] | None = None,
        log_det: float | None = None,
    ) -> None:
        _checks.instance(sde)
        self._of = f"{sde!r}, covariance" if root is None else f"{sde!r}, root={shown(root)}"
        if (covariance is None) == (root is None):
            raise ValueError("give covariance, the matrix K, or root, a callable L with K = L L'; and not both")
        require_white(sde, "CorrelatedSDE")
        self._inside, self.grid, self.unit_level = sde, sde.grid, sde.unit_level
        self.root, self.inverse, self.log_det = root, inverse, log_det
        self._digest, self._unproven = "", False
        if covariance is not None:
            k = torch.as_tensor(covariance, dtype=torch.float64, device="cpu").detach()
            if k.ndim != 2 or k.shape[0] != k.shape[1] or not torch.isfinite(k).all():
                raise ValueError(f"covariance must be a finite matrix (D, D), got shape {tuple(k.shape)}")
            if float((k - k.mT).abs().max()) > 1e-5 * float(k.abs().max()):
                raise ValueError("covariance must be symmetric; use (K + K.mT) / 2")
            factor, failed = torch.linalg.cholesky_ex((k + k.mT) / 2)
            if failed:
                least = float(torch.linalg.eigvalsh((k + k.mT) / 2)[0])
                raise ValueError(
                    f"covariance must be positive definite: its smallest eigenvalue is {least:g}; add a little to its "
                    "diagonal"
                )
            inverse_factor = torch.linalg.solve_triangular(factor, torch.eye(len(k), dtype=k.dtype), upper=False)
            self.root, self.inverse = _Times(factor), _Times(inverse_factor)
            self._digest = digest(k)
            self.log_det = float(factor.diagonal().log().sum())
        elif not callable(root) or not (inverse is None or callable(inverse)):
            raise TypeError("root and inverse must be callables (B, *event) -> (B, *event)")
        else:
            self.root, self.inverse = _Given(root, "root"), inverse and _Given(inverse, "inverse")
            self._unproven = inverse is not None

    @property
    def T(self) -> float:
        """That of the process inside, which is set with it."""
        return self._inside.T

    @T.setter
    def T(self, value: float) -> None:
        self._inside.T = value

    @property
    def t_min(self) -> float:
        """That of the process inside, which is set with it."""
        return self._inside.t_min

    @t_min.setter
    def t_min(self, value: float) -> None:
        self._inside.t_min = value

    def law(self) -> tuple[Any, ...]:
        """L: its matrix's digest, or the callable."""
        return ("root", self._digest or getattr(self.root, "function", self.root))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._of})"

    def alpha(self, t: Tensor) -> Tensor:
        """That of the process inside."""
        return self._inside.alpha(t)

    def sigma(self, t: Tensor) -> Tensor:
        """That of the process inside: the noise is sigma L z."""
        return self._inside.sigma(t)

    def velocity(self, t: Time) -> tuple[Tensor, Tensor]:
        """That of the process inside."""
        return self._inside.velocity(t)

    @property
    def white(self) -> SDE:
        """The process inside, which is that of L^-1 x."""
        return self._inside

    def whiten(self, x: Tensor) -> Tensor:
        """L^-1 x, like x. Raises ValueError where the process was given a root without its inverse."""
        if self.inverse is None:
            raise ValueError("this needs L^-1: give CorrelatedSDE(..., inverse=) beside root")
        white = self.inverse(x)
        if self._unproven and self.root is not None:
            off = float((self.root(white) - x).norm() / x.norm().clamp_min(torch.finfo(x.dtype).tiny))
            if not off <= 1e3 * torch.finfo(x.dtype).eps ** 0.75:  # filters of a wide range lose digits
                raise ValueError(f"inverse is not root's: root(inverse(x)) and x differ by {100 * off:.3g} % for an x")
            self._unproven = False
        return white

    def log_kernel(self, off: Tensor, t: Time) -> Tensor:
        """log p(x_t|x_0) but for a constant, -|L^-1 off|^2/(2 sigma^2), of off = x_t - alpha x_0, (B, *event); (B,)."""
        return self.white.log_kernel(self.whiten(off), t)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """Log density (nats) of the prior N(0, sigma(T)^2 K) at x of shape (B, *event); shape (B,)."""
        return self.white.prior_log_prob(self.whiten(x)) - self.log_volume()

    def log_volume(self) -> float:
        """log |det L|. Raises ValueError where the process was not given it."""
        if self.log_det is None:
            raise ValueError("this needs log |det L|: give CorrelatedSDE(..., log_det=) beside root")
        return self.log_det


class _Given:
    """A user's linear map, whose results are like x."""

    def __init__(self, function: Callable[[Tensor], Tensor], name: str) -> None:
        self.function, self._name = function, name

    def __call__(self, x: Tensor) -> Tensor:
        y = self.function(x)
        if not isinstance(y, Tensor) or y.shape != x.shape or not y.is_floating_point():
            got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(f"{self._name} must return a floating tensor like x, {tuple(x.shape)}, got {got}")
        return y.to(x.dtype)


class _Times:
    """A matrix times each sample, flattened; a copy of it for each kind of x."""

    def __init__(self, matrix: Tensor) -> None:
        self._matrix, self._known = matrix, {(matrix.dtype, matrix.device): matrix}

    def __call__(self, x: Tensor) -> Tensor:
        flat, kind = x.reshape(len(x), -1), (x.dtype, x.device)
        if flat.shape[1] != len(self._matrix):
            raise ValueError(
                f"covariance is of {len(self._matrix)} numbers, and a sample has {flat.shape[1]}, {tuple(x.shape)}"
            )
        if kind not in self._known:
            self._known[kind] = self._matrix.to(x)
        return (flat @ self._known[kind].mT).reshape(x.shape)
