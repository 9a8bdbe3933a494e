"""Keyed noise: every random number is a function of (seed, sample, purpose, interval, draw within it)."""

import hashlib
import math
import secrets
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdekit import _checks

_SHARE = 256  # numbers that one call of the generator makes, at least; part of what a seed means
_FLOAT32 = struct.Struct("<ff")
_INCREMENT = np.random.PCG64DXSM(0).state["state"]["inc"]


class Noise:
    """Standard normal numbers for a batch, sample by sample.

    The numbers of sample ids[i] are a function of (seed, ids[i], ``purpose``), the interval last entered and how many
    draws came before in it: not of the batch, nor of what was drawn in other intervals. So a run may be cut into
    batches, spread over processes or taken up again in the middle, and draws the same. An interval is known by its ends
    as float32 numbers, so that a grid whose last bits another formula or mathematics library makes otherwise draws the
    same too. They are made on the CPU by
    NumPy's PCG64DXSM, set for each draw to a state that is a BLAKE2b hash of all these, and moved to the device (a
    GPU's from pinned memory): every device has the same numbers; another dtype, or another version of NumPy's normals,
    may have others. No global generator is read or moved.

    ``like``: a tensor (B, *event) that gives shape, dtype and device. ``seed``: a whole number >= 0,
    or None for fresh entropy. ``ids``: the samples' global numbers (default 0 ... B-1). ``purpose``: draws for one
    never move those for another; solvers' noise is "path", beside "prior", "probe", "perturb" and "data".
    Raises TypeError or ValueError for a like, a seed or ids that cannot be used.
    """

    def __init__(
        self, like: Tensor, seed: int | None = None, ids: Sequence[int] | None = None, *, purpose: str = "path"
    ) -> None:
        _checks.floating(like.dtype, "like")
        if like.ndim == 0:
            raise ValueError("like must have shape (B, *event), got a 0-d tensor")
        seed = secrets.randbits(63) if seed is None else _checks.count(seed, "seed", minimum=0)
        ids = range(like.shape[0]) if ids is None else [_checks.count(i, "ids", minimum=0) for i in ids]
        if len(ids) != like.shape[0]:
            raise ValueError(f"ids must hold one number per sample: got {len(ids)} for a batch of {like.shape[0]}")
        if ids and max(ids) >= 2**64:
            raise ValueError(f"ids must be below 2^64, got {max(ids)}")
        self.shape, self.dtype = like.shape, like.dtype
        self._event, self._device = like.shape[1:], like.device
        # Small events are drawn many at a time: one call serves some neighbouring ids.
        self._share = max(1, _SHARE // max(1, self._event.numel()))
        chunks = dict.fromkeys(i // self._share for i in ids)
        first = {chunk: k * self._share for k, chunk in enumerate(chunks)}
        rows = [first[i // self._share] + i % self._share for i in ids]
        in_order = rows == list(range(rows[0], rows[0] + len(rows))) if rows else True
        self._rows: Any = slice(rows[0], rows[-1] + 1) if rows and in_order else rows  # a slice is no copy
        key = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=16).digest()
        self._keys = [hashlib.blake2b(key + struct.pack("<Q", chunk), digest_size=16) for chunk in chunks]
        self._size = (len(self._keys) * self._share, *self._event)
        self._drawn_as = np.float64 if self.dtype is torch.float64 else np.float32
        self._as_drawn = self._device.type == "cpu" and self.dtype in (torch.float32, torch.float64)
        self._bits = np.random.PCG64DXSM(0)
        self._generator = np.random.Generator(self._bits)
        self.enter(0.0, 0.0)

    def enter(self, t: float, s: float) -> None:
        """The draws that follow are those of the step from t to s, from its first on. Loops call it, rules draw."""
        self._interval, self._drawn = _FLOAT32.unpack(_FLOAT32.pack(t, s)), 0

    def normal(self) -> Tensor:
        """The next standard normal tensor of the interval, (B, *event)."""
        place = struct.pack("<ddq", *self._interval, self._drawn)
        self._drawn += 1
        drawn = np.empty(self._size, dtype=self._drawn_as)
        for k in range(len(self._keys)):
            self._fill(drawn[k * self._share : (k + 1) * self._share], k, place)
        z = torch.from_numpy(drawn[self._rows])
        return z if self._as_drawn else self._moved(z)

    def _moved(self, z: Tensor) -> Tensor:
        if self._device.type == "cuda":
            z = z.pin_memory()  # from elsewhere the host would wait for the copy
        return z.to(self._device, self.dtype, non_blocking=True)

    def _fill(self, out: Any, chunk: int, place: bytes) -> None:
        """Standard normals of the chunk of that number, as a function of the place."""
        key = self._keys[chunk].copy()
        key.update(place)
        state: Any = {"state": int.from_bytes(key.digest(), "little"), "inc": _INCREMENT}
        self._bits.state = {"bit_generator": "PCG64DXSM", "state": state, "has_uint32": 0, "uinteger": 0}
        self._generator.standard_normal(dtype=out.dtype, out=out)

    def increment(self, t: float, s: float) -> Tensor:
        """The Brownian increment of the next interval, W_s - W_t ~ N(0, |s - t|), (B, *event)."""
        return self.normal().mul_(abs(s - t) ** 0.5)

    def increment_and_integral(self, t: float, s: float) -> tuple[Tensor, Tensor]:
        """That increment and the integral of W_u - W_t du from t to s: (s - t)/2 dW + N(0, |s - t|^3/12)."""
        dW = self.increment(t, s)
        rest = self.normal().mul_((s - t) * abs(s - t) ** 0.5 / math.sqrt(12))
        return dW, rest.add_(dW, alpha=(s - t) / 2)
