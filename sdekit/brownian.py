"""One Brownian path per sample, a function of its seed: at any pair of times, in any order, at every step count."""

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdekit.noise import Noise

_DEPTH = 24  # halvings of the interval; two times within one leaf, 2^-24 of it, are not told apart exactly
_TICKS = 2.0**40  # to which part of the interval a time is taken
_SHARE = 256  # numbers that one call of a generator makes, at least; part of what a seed means
_INCREMENT = np.random.PCG64DXSM(0).state["state"]["inc"]


class BrownianPath(Noise):
    """A noise source whose increments are those of one path W on [start, end] per sample.

    ``increment(t, s)`` = W_s - W_t for any t, s in the interval, forwards or backwards: the same path whatever the
    steps, their number and the order in which they are asked for, so that errors of two step sizes can be compared path
    by path, and a step that is rejected and taken again does not change the law. The path is a tree of bridges between
    dyadic times (Levy's construction; with the space-time integral as in Foster, Lyons & Oberhauser 2020): a query
    costs the draws of those of 24 levels that the last one did not pass. Memory: the tensors of one branch, 4 a level.

    Every node is drawn by NumPy's PCG64DXSM in float64 on the CPU, from a state that is a hash of (seed, sample, node):
    sample ids[i] has the same path in any batch and on every device, rounded to like's dtype. ``normal()``, for draws
    that belong to no interval, is :class:`Noise`'s: of the rules euler_maruyama, heun, rk4 and sra1 follow the path.
    Arguments as there; ``start`` and ``end`` in either order.
    Raises ValueError for times outside the interval and where start = end.
    """

    def __init__(
        self, like: Tensor, seed: int | None = None, ids: Sequence[int] | None = None, *, start: float, end: float
    ) -> None:
        super().__init__(like, seed, ids)
        self._low, self._high = sorted((float(start), float(end)))
        if not math.isfinite(self._high - self._low) or self._low == self._high:
            raise ValueError(f"start and end must be two finite times, got {start:g} and {end:g}")
        self._event, self._dtype, self._device = like.shape[1:], like.dtype, like.device
        self._bits = np.random.PCG64DXSM(0)
        self._generator = np.random.Generator(self._bits)
        self._share = max(1, _SHARE // max(1, self._event.numel()))
        chunks = dict.fromkeys(i // self._share for i in self._ids)  # neighbouring ids are drawn by one call
        first = {chunk: k * self._share for k, chunk in enumerate(chunks)}
        self._chunks, self._rows = list(chunks), [first[i // self._share] + i % self._share for i in self._ids]
        span = self._high - self._low
        root = self._draw(0, 0)
        zero = torch.zeros_like(root[0])
        # Nodes of the branch asked for last: index, W and its integral at the left end, increment, H (see _halve).
        self._branch = [(0, zero, zero, math.sqrt(span) * root[0], math.sqrt(span / 12) * root[1])]
        self._known: dict[float, tuple[Tensor, Tensor]] = {}

    def increment(self, t: float, s: float) -> Tensor:
        """W_s - W_t, (B, *event)."""
        return self.increment_and_integral(t, s)[0]

    def increment_and_integral(self, t: float, s: float) -> tuple[Tensor, Tensor]:
        """W_s - W_t and the integral of W_u - W_t du from t to s (negative du for s < t), each (B, *event)."""
        (w_t, j_t), (w_s, j_s) = self._at(t), self._at(s)
        self._known = {t: (w_t, j_t), s: (w_s, j_s)}
        integral = j_s - j_t - (s - t) * w_t
        return (w_s - w_t).to(self._device, self._dtype), integral.to(self._device, self._dtype)

    def _at(self, t: float) -> tuple[Tensor, Tensor]:
        """W and its integral from the lower end to t."""
        if t in self._known:
            return self._known[t]
        span = self._high - self._low
        u = (t - self._low) / span
        if not -1e-6 <= u <= 1 + 1e-6:  # a float32 time may lie a rounding beyond the ends
            raise ValueError(f"the path is known on [{self._low:g}, {self._high:g}], asked for at t = {t:g}")
        u = round(min(max(u, 0.0), 1.0) * _TICKS) / _TICKS  # so that the times of a dyadic grid are nodes
        while len(self._branch) > 1 and not 0 <= u * 2.0 ** (len(self._branch) - 1) - self._branch[-1][0] < 1:
            self._branch.pop()  # a node is always read as a left end, so that its bits do not depend on the way there
        while True:
            level = len(self._branch) - 1
            index, w, j, dw, area = self._branch[-1]
            h, f = span * 0.5**level, u * 2.0**level - index
            if f in (0.0, 1.0):
                return w + f * dw, j + f * h * (w + dw / 2 + area)
            if level == _DEPTH:  # the exact law at t given the leaf; its share of the integral is below rounding
                rest = math.sqrt(max(0.0, h * f * (1 - f) * (1 - 3 * f * (1 - f))))
                z = self._draw(_DEPTH + 1, struct.unpack("<q", struct.pack("<d", u))[0])[0]
                mean = j + h * (f * w + f**2 / 2 * dw + (3 - 2 * f) * f**2 * area)
                return w + f * dw + 6 * f * (1 - f) * area + rest * z, mean
            self._branch.append(self._halve(level, h, f >= 0.5))

    def _halve(self, level: int, h: float, right: bool) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        """One half of the last node. With H = (1/h) integral of the bridge W_u - W_left - (u - left)/h dW:

        dW_1 = dW/2 + 3/2 H + z,  H_1, H_2 = H/4 - z/2 +- n,  z ~ N(0, h/16),  n ~ N(0, h/48).
        """
        index, w, j, dw, area = self._branch[-1]
        z, n = self._draw(level + 1, index)
        z, n = math.sqrt(h / 16) * z, math.sqrt(h / 48) * n
        half, shared = dw / 2 + 1.5 * area + z, area / 4 - z / 2
        if not right:
            return 2 * index, w, j, half, shared + n
        return 2 * index + 1, w + half, j + h / 2 * (w + half / 2 + shared + n), dw - half, shared - n

    def _draw(self, level: int, index: int) -> Tensor:
        """Two standard normals for every entry of the batch, (2, B, *event), float64: those of one node."""
        parts = []
        for chunk in self._chunks:
            digest = hashlib.blake2b(struct.pack("<QQqq", self._key, chunk, level, index), digest_size=16).digest()
            state: Any = {"state": int.from_bytes(digest, "little"), "inc": _INCREMENT}
            self._bits.state = {"bit_generator": "PCG64DXSM", "state": state, "has_uint32": 0, "uinteger": 0}
            parts.append(self._generator.standard_normal((2, self._share, *self._event)))
        return torch.from_numpy(np.concatenate(parts, 1)[:, self._rows])
