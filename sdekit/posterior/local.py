"""A model at one x, and what was seen of what it says there: the products that posterior scores are made of."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdekit.posterior.observation import Observation

_VJP_NUMBERS = 2**24  # vector-Jacobian products are batched up to this many numbers at a time
NO_GRADIENT = "score must be differentiable in x, for the covariance of x_0; take no_grad or detach out of it"


class Local:
    """The model at x, and what was seen of it: everything in units of the observation's noise, (B, entries)."""

    def __init__(
        self, observation: Observation, x: Tensor, out: Tensor, x_0: Tensor, numbers: Sequence[Any], graph: bool
    ) -> None:
        self._x, self._graph, self._observation = x, graph, observation
        self.out, self.x_0 = (out, x_0) if graph else (out.detach(), x_0.detach())
        self._mean = x_0
        _, _, _, self._gain, self.spread, self.rate = numbers
        y, self.std = observation.values(self.x_0)
        self.off = (y - observation.of(self.x_0)) / self.std
        self._back = observation.transpose(self.x_0, graph)
        self.ahead: float | None = None  # (sigma/alpha)^2 where a step leads, if one is taken from here

    def seen(self, x: Tensor) -> Tensor:
        """A x, of a linear A, without its constant."""
        return self._observation.change(x) / self.std

    def back(self, u: Tensor) -> Tensor:
        """A' u, like x."""
        return self._back(u / self.std)

    def covary(self, u: Tensor) -> Tensor:
        """V u, u like x."""
        (product,) = torch.autograd.grad(
            self._mean, self._x, u, retain_graph=True, create_graph=self._graph, allow_unused=True
        )
        if product is None:
            raise ValueError(NO_GRADIENT)
        return self._gain * product

    def reached(self, ev: Tensor, u: Tensor) -> Tensor:
        """What a step to ``ahead`` should do of E[x_0|x_t, y] - E[x_0|x_t] along each eigenvector of A V A', (B, n).

        With V = v along one, of level r_t, it is v_s = 1/(1/v + 1/r_s^2 - 1/r_t^2) at the level r_s (of Gaussian data),
        and the step's own noise moves x̂ by the variance k = v_s^2 (1 - r_s^2/r_t^2)/r_s^2. So of N(y; A x̂_s, std^2 +
        A v_s A') under that noise the mean moves by v_s/(std^2 + A (v_s + k) A') where it is v/(std^2 + A v A') in
        E[x_0|x_t, y] - E[x_0|x_t]. Small steps: all of it. Derived here.
        """
        if self.ahead is None:
            return torch.ones_like(ev)
        after = self.ahead
        before = self.spread
        a = self._observation.matrix(self._x) / self.std[:, :, None]
        n = (u * (a @ a.mT @ u)).sum(1).clamp_min(torch.finfo(u.dtype).tiny)  # |A' u|^2
        v = ev / n
        share = 1 / (1 + v * (1 / after - 1 / before))
        v_s = v * share
        return share * (1 + ev) / (1 + n * (v_s + v_s**2 * (1 - after / before) / after))

    def columns(self) -> tuple[Tensor, Tensor]:
        """V A', (B, d, entries), and A V A', (B, entries, entries), of a linear A."""
        a = self._observation.matrix(self._x) / self.std[:, :, None]
        rows = a.expand(len(self._x), *a.shape[-2:]).transpose(0, 1)  # (entries, B, d)
        products = []
        for some in rows.split(max(1, _VJP_NUMBERS // self._x.numel())):
            (product,) = torch.autograd.grad(
                self._mean, self._x, some.reshape(-1, *self._x.shape), is_grads_batched=True, retain_graph=True,
                create_graph=self._graph, allow_unused=True,
            )  # fmt: skip
            if product is None:
                raise ValueError(NO_GRADIENT)
            products.append((self._gain * product).reshape(len(some), len(self._x), -1))
        va = torch.cat(products).permute(1, 2, 0)
        return va, rows.transpose(0, 1) @ va


class _Solve(NamedTuple):
    w: Tensor
    left: Tensor
    p: Tensor
    size: Tensor  # of ``left``, squared


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], b: Tensor, iterations: int, rtol: float | Tensor, least: float = 0.0
) -> Tensor:
    """w with S w = b for each sample, b (B, n), S = ``apply`` symmetric and positive (Hestenes & Stiefel 1952).

    Each sample stops by itself, where its residual is rtol of b, or p' S p <= ``least`` p' p for its next direction p.
    """
    now = _Solve(torch.zeros_like(b), b, b, b.square().sum(1))
    enough = rtol**2 * now.size
    going = now.size > 0
    for _ in range(iterations):
        if not going.any():
            break
        sp = apply(now.p)
        bend = (now.p * sp).sum(1)
        going = going & (bend > least * now.p.square().sum(1))
        step = torch.where(going, now.size / torch.where(going, bend, 1.0), 0.0)[:, None]
        w, left = now.w + step * now.p, now.left - step * sp
        size = left.square().sum(1)
        turn = torch.where(going, size / torch.where(going, now.size, 1.0), 0.0)[:, None]
        now = _Solve(w, left, left + turn * now.p, size)
        going = going & (size > enough)
    return now.w
