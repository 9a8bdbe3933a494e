"""One Brownian path per sample, a function of its seed: at any pair of times, in any order, at every step count."""

import itertools
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdekit.batch import Padding
from sdekit.noise.keyed import Noise

_DEPTH = 40  # halvings of the interval at most: a time is taken to 2^-40 of it


class _Node(NamedTuple):
    """A dyadic interval for each sample: W and its integral at the left end, increment, H (see ``_halve``)."""

    index: Any  # (B,), which interval of its level; -1 before the first
    w: Any  # (B, *event), as the rest
    j: Any
    dw: Any
    area: Any


class BrownianPath(Noise):
    """A noise source whose increments are those of one path W on [start, end] per sample.

    ``increment(t, s)`` = W_s - W_t for any t, s in the interval, forwards or backwards: the same path whatever the
    steps, their number and the order in which they are asked for, so that errors of two step sizes can be compared path
    by path, and a step that is rejected and taken again does not change the law. Times are floats, or one per sample.
    The path is a tree of bridges between dyadic times (Levy's construction; with the space-time integral as in Foster,
    Lyons & Oberhauser 2020): a query costs the draws of those of 40 levels that the last one did not pass, so that
    dyadic times are cheap. A time is rounded to 2^-40 of the interval. Memory: for each level that was reached, 4
    arrays of the state's shape in float64.

    Each node is drawn as :class:`Noise` draws, with its place in the tree for the interval, and added up in float64:
    sample ids[i] has the same path in any batch and on every device, rounded to like's dtype. ``normal()``, for draws
    that belong to no path, is Noise's; euler_maruyama, milstein, heun, rk4, sra1, adaptive_sra1 and torchsde's methods
    follow it.
    Arguments as there, ``mask`` too; ``start`` and ``end`` in either order.
    Raises ValueError for times outside the interval and where start = end.
    """

    def __init__(
        self,
        like: Tensor,
        seed: int | None = None,
        ids: Sequence[int] | None = None,
        *,
        start: float,
        end: float,
        root: Callable[[Tensor], Tensor] | None = None,
        mask: Tensor | Padding | None = None,
    ) -> None:
        super().__init__(like, seed, ids, root=root, mask=mask)
        self._low, self._high = sorted((float(start), float(end)))
        if not math.isfinite(self._high - self._low) or self._low == self._high:
            raise ValueError(f"start and end must be two finite times, got {start:g} and {end:g}")
        self._all = np.arange(like.shape[0])
        places = np.arange(len(self._streams.keys) * self._share)[self._streams.rows]
        self._chunk, self._place = places // self._share, places % self._share
        self._sizes: list[tuple[Any, BrownianPath]] = []  # padded samples of one size: who, and their paths without it
        if self.padding is not None:
            for rows, where in self.padding.groups:
                some = like.new_empty(self.padding.alone(rows, where))
                path = BrownianPath(some, self._seed, [self._ids[i] for i in rows], start=start, end=end)
                self._sizes.append((np.asarray(rows), path))
        span = self._high - self._low
        drawn, zero = self._draw(0, np.zeros_like(self._all), self._all), np.zeros(tuple(like.shape))
        self._tree = [
            _Node(np.zeros_like(self._all), zero, zero, math.sqrt(span) * drawn[0], math.sqrt(span / 12) * drawn[1])
        ]
        self._known: dict[float, tuple[Any, Any]] = {}  # the last query's, which the next one often begins with

    @property
    def finest(self) -> float:
        """The share of the interval below which a step is not resolved."""
        return 2.0**-_DEPTH

    def fraction(self, t: Tensor) -> Tensor:
        """What share of the interval lies below t. Raises ValueError for a time outside."""
        return torch.as_tensor(self._fraction(t)).to(t)

    def time(self, fraction: Tensor) -> Tensor:
        """t of a fraction, never a rounding beyond the ends."""
        return (self._low + (self._high - self._low) * fraction).clamp(self._low, self._high)

    def increment(self, t: float | Tensor, s: float | Tensor, rows: Tensor | None = None) -> Tensor:
        """W_s - W_t, (B, *event); of the samples ``rows`` of the batch alone where given, each at most once."""
        return self.increment_and_integral(t, s, rows)[0]

    def increment_and_integral(
        self, t: float | Tensor, s: float | Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """W_s - W_t and the integral of W_u - W_t du from t to s (negative du for s < t), each (B, *event)."""
        which = self._all if rows is None else rows.cpu().numpy()
        if len(np.unique(which)) < len(which):  # a sample is at one node at a time
            raise ValueError(f"rows must be different samples, got {which.tolist()}")
        if isinstance(t, float) and isinstance(s, float) and rows is None:
            (w_t, j_t), (w_s, j_s) = (self._known.get(time) or self._at(time, which) for time in (t, s))
            self._known = {t: (w_t, j_t), s: (w_s, j_s)}
            h: Any = s - t
        else:
            (w_t, j_t), (w_s, j_s) = self._at(t, which), self._at(s, which)
            h = _expand(_numbers(s) - _numbers(t), w_t)
        return self._like_x(w_s - w_t), self._like_x(j_s - j_t - h * w_t)

    def _like_x(self, y: Any) -> Tensor:
        z = torch.from_numpy(y).to(self.dtype).to(self._device)
        return z if self.root is None else self.root(z)

    def _at(self, t: float | Tensor, rows: Any) -> tuple[Any, Any]:
        """W and its integral from the lower end to t, for those samples."""
        span = self._high - self._low
        # Rounded, so that the times of a dyadic grid are nodes.
        u = np.broadcast_to(np.round(self._fraction(t) * 2.0**_DEPTH) / 2.0**_DEPTH, rows.shape)
        w, j = np.empty((2, len(rows), *self._event))
        todo = np.arange(len(rows))
        for level in itertools.count():  # from the root, so that a node's bits do not depend on the way there
            node, h, at = self._tree[level], span * 0.5**level, rows[todo]
            f = u[todo] * 2.0**level - node.index[at]
            there = (f == 0.0) | (f == 1.0)  # at level 40 at the latest
            if there.any():
                if there.all() and len(todo) == len(rows):
                    return self._end(node, h, f, at)
                w[todo[there]], j[todo[there]] = self._end(node, h, f[there], at[there])
                todo, at, f = todo[~there], at[~there], f[~there]
            if not len(todo):
                return w, j
            self._halve(level, h, at, f >= 0.5)
        raise AssertionError  # the loop does not end

    def _fraction(self, t: float | Tensor) -> Any:
        u = (_numbers(t) - self._low) / (self._high - self._low)
        if not ((u >= -1e-6) & (u <= 1 + 1e-6)).all():  # a float32 time may lie a rounding beyond the ends
            wrong = float(_numbers(t).flat[np.abs(u - 0.5).argmax()])
            raise ValueError(f"the path is known on [{self._low:g}, {self._high:g}], asked for at t = {wrong:g}")
        return np.clip(u, 0.0, 1.0)

    def _end(self, node: _Node, h: float, f: Any, rows: Any) -> tuple[Any, Any]:
        """W and its integral at the left (f = 0) or right end (f = 1) of an interval of length h."""
        some = self._some(rows)
        w, j, dw, area = (y[some] for y in node[1:])
        x = _expand(f, w)
        return w + x * dw, j + x * h * (w + dw / 2 + area)

    def _halve(self, level: int, h: float, rows: Any, right: Any) -> None:
        """The next level's node of those samples: one half of this level's. With H = (1/h) integral of the bridge
        W_u - W_left - (u - left)/h dW:

        dW_1 = dW/2 + 3/2 H + z,  H_1, H_2 = H/4 - z/2 +- n,  z ~ N(0, h/16),  n ~ N(0, h/48).
        """
        if level + 1 == len(self._tree):
            self._tree.append(_Node(np.full_like(self._all, -1), *np.empty((4, len(self._all), *self._event))))
        child, node = self._tree[level + 1], self._tree[level]
        index = 2 * node.index[rows] + right
        new = child.index[rows] != index
        if not new.any():
            return
        rows, right, index = rows[new], right[new], index[new]
        some = self._some(rows)
        w, j, dw, area = (y[some] for y in node[1:])
        z, n = self._draw(level + 1, index >> 1, rows)
        z, n = math.sqrt(h / 16) * z, math.sqrt(h / 48) * n
        half, shared, right = dw / 2 + 1.5 * area + z, area / 4 - z / 2, _expand(right, w)
        child.index[some] = index
        child.w[some] = np.where(right, w + half, w)
        child.j[some] = np.where(right, j + h / 2 * (w + half / 2 + shared + n), j)
        child.dw[some] = np.where(right, dw - half, half)
        child.area[some] = np.where(right, shared - n, shared + n)

    def _some(self, rows: Any) -> Any:
        """Those samples as an index; a slice, which copies nothing, where they are all, in order."""
        return slice(None) if np.array_equal(rows, self._all) else rows

    def _draw(self, level: int, index: Any, rows: Any) -> Any:
        """Two standard normals for every entry of those samples, (2, b, *event): those of one node each."""
        if self._sizes:
            return self._padded_draw(level, index, rows)
        keys, which = np.unique((self._chunk[rows] << _DEPTH + 1) + index, return_inverse=True)
        places = [(key >> _DEPTH + 1, struct.pack("<qq", level, key % 2 ** (_DEPTH + 1))) for key in keys.tolist()]
        drawn = self._normals(places, self._share * 2 * self._event.numel())  # neighbours at one node share a chunk
        blocks = drawn.reshape(len(keys), self._share, 2, *self._event)
        return blocks[which, self._place[rows]].swapaxes(0, 1)

    def _padded_draw(self, level: int, index: Any, rows: Any) -> Any:
        """:meth:`_draw` of samples that are padded: what each would get without, and 0 elsewhere."""
        real = self.padding.real.cpu().numpy()  # type: ignore[union-attr]
        drawn = np.zeros((2, len(rows), *self._event), dtype=np.float32)
        for who, path in self._sizes:
            mine, place = np.nonzero(np.isin(rows, who))[0], np.searchsorted(who, rows)
            if len(mine):
                some = np.zeros((2, len(mine), *self._event), dtype=np.float32)
                some[:, real[rows[mine]]] = path._draw(level, index[mine], place[mine]).reshape(2, -1)
                drawn[:, mine] = some
        return drawn


def _numbers(t: float | Tensor) -> Any:
    """Times as float64 NumPy numbers, () or (b,)."""
    return np.asarray(t.detach().cpu() if isinstance(t, Tensor) else t, dtype=np.float64)


def _expand(c: Any, like: Any) -> Any:
    return np.reshape(c, np.shape(c) + (1,) * (like.ndim - np.ndim(c))) if np.ndim(c) else c
