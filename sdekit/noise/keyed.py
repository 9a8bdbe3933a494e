"""Keyed noise: every random number is a function of (seed, sample, purpose, interval, draw within it)."""

import functools
import hashlib
import math
import secrets
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdekit import _checks
from sdekit.batch import Padding

_SHARE = 256  # numbers that are made at a time, at least; part of what a seed means
_BLOCK = 2**16  # at most so many go through the formula together (or one sample's): the cache holds them
_FLOAT32 = struct.Struct("<ff")
_INCREMENT = np.random.PCG64DXSM(0).state["state"]["inc"]


class _Streams(NamedTuple):
    """What a batch draws from."""

    keys: list[Any]  # for each chunk of neighbouring ids, the hash that its states begin with
    rows: Any  # where in the chunks the batch's samples are
    generator: Any


class Noise:
    """Standard normal numbers for a batch, sample by sample.

    The numbers of sample ids[i] are a function of (seed, ids[i], ``purpose``), the interval last entered and how many
    draws came before in it: not of the batch, nor of what was drawn in other intervals. So a run may be cut into
    batches, spread over processes or taken up again in the middle, and draws the same. An interval is known by its ends
    as float32 numbers, so that a grid whose last bits another formula or mathematics library makes otherwise draws the
    same too. They are made on the CPU from the bits of NumPy's PCG64DXSM, set for each draw to a state that is a
    BLAKE2b hash of all these, by Box & Muller's formula (1958) in float32, so that |z| < 6.8, and moved to the device
    (a GPU's from pinned memory): every device and dtype has the same numbers, rounded to it; the last bit of some is
    that of NumPy's logarithm and cosine on the CPU at hand. No global generator is read or moved.

    ``like``: a tensor (B, *event) that gives shape, dtype and device. ``seed``: a whole number >= 0,
    or None for fresh entropy. ``ids``: the samples' global numbers (default 0 ... B-1). ``purpose``: draws for one
    never move those for another; solvers' noise is "path", beside "prior", "probe", "perturb" and "data". ``root``:
    what is drawn is L z, z standard normal, with this L, a linear map (B, *event) -> (B, *event) of each sample alone.
    ``mask``: of padded samples, as in :func:`sdekit.sample`: the real entries' numbers are those that the sample would
    get without its padding, which gets 0.
    Raises TypeError or ValueError for a like, a seed or ids that cannot be used.
    """

    def __init__(
        self,
        like: Tensor,
        seed: int | None = None,
        ids: Sequence[int] | None = None,
        *,
        purpose: str = "path",
        root: Callable[[Tensor], Tensor] | None = None,
        mask: Tensor | Padding | None = None,
    ) -> None:
        _checks.floating(like.dtype, "like")
        if like.ndim == 0:
            raise ValueError("like must have shape (B, *event), got a 0-d tensor")
        seed = secrets.randbits(63) if seed is None else _checks.count(seed, "seed", minimum=0)
        ids = _checks.ids(ids, like.shape[0])
        self.shape, self.dtype, self.root = like.shape, like.dtype, root
        self._event, self._device = like.shape[1:], like.device
        # Small events are drawn many at a time: one chunk of numbers serves some neighbouring ids.
        self._share = max(1, _SHARE // max(1, self._event.numel()))
        self._who, self._ids, self._seed = f"{purpose} {seed}", ids, seed
        self.padding = Padding.of(mask, like.shape, self)
        self._parts: dict[torch.Size, Noise] = {}  # of the samples of one size, by their shape
        if self.padding is not None:
            for rows, where in self.padding.groups:
                some = like.new_empty(self.padding.alone(rows, where))
                self._parts[some.shape] = Noise(some, seed, [ids[i] for i in rows], purpose=purpose)
        self.enter(0.0, 0.0)

    @functools.cached_property
    def _streams(self) -> _Streams:
        """Made when first drawn from: many a loop is given a noise that its rule never asks."""
        ids, share = self._ids, self._share
        chunks = dict.fromkeys(i // share for i in ids)
        first = {chunk: k * share for k, chunk in enumerate(chunks)}
        rows = [first[i // share] + i % share for i in ids]
        in_order = rows == list(range(rows[0], rows[0] + len(rows))) if rows else True
        key = hashlib.blake2b(self._who.encode(), digest_size=16).digest()
        return _Streams(
            [hashlib.blake2b(key + struct.pack("<Q", chunk), digest_size=16) for chunk in chunks],
            slice(rows[0], rows[-1] + 1) if rows and in_order else rows,  # a slice is no copy
            np.random.PCG64DXSM(0),
        )

    def enter(self, t: float, s: float) -> None:
        """The draws that follow are those of the step from t to s, from its first on. Loops call it, rules draw."""
        self._interval, self._drawn = _FLOAT32.unpack(_FLOAT32.pack(t, s)), 0
        for part in self._parts.values():
            part.enter(t, s)

    def normal(self) -> Tensor:
        """The next standard normal tensor of the interval, (B, *event); L times one where there is a ``root``."""
        if self.padding is not None:
            like = torch.empty(self.shape, dtype=self.dtype, device=self._device)
            return self.padding.spread(lambda rows, shape: self._parts[shape].normal(), like)
        place = struct.pack("<ddq", *self._interval, self._drawn)
        self._drawn += 1
        chunks = len(self._streams.keys)
        drawn = self._normals([(chunk, place) for chunk in range(chunks)], self._share * self._event.numel())
        z = torch.from_numpy(drawn.reshape(chunks * self._share, *self._event)[self._streams.rows])
        if self._device.type == "cuda":
            z = z.pin_memory()  # from elsewhere the host would wait for the copy
        z = z.to(self._device, self.dtype, non_blocking=True)
        return z if self.root is None else self.root(z)

    def _normals(self, places: list[tuple[int, bytes]], numbers: int) -> Any:
        """So many standard normals, float32, for each chunk and place in it: a function of these alone.

        z_1, z_2 = sqrt(-2 log u) (cos, sin)(2 pi v), u and v of 32 bits each; u > 0, and is fine where it is small.
        """
        keys, _, generator = self._streams
        half = (numbers + 1) // 2
        out = np.empty((len(places), numbers), dtype=np.float32)
        many = max(1, _BLOCK // max(1, numbers))
        for first in range(0, len(places), many):
            some = places[first : first + many]
            bits = np.empty((len(some), half), dtype=np.uint64)
            for row, (chunk, place) in zip(bits, some, strict=True):
                key = keys[chunk].copy()
                key.update(place)
                state: Any = {"state": int.from_bytes(key.digest(), "little"), "inc": _INCREMENT}
                generator.state = {"bit_generator": "PCG64DXSM", "state": state, "has_uint32": 0, "uinteger": 0}
                row[:] = generator.random_raw(half)
            uniform = bits.view(np.uint32).astype(np.float32)
            radius, angle = uniform[:, :half], uniform[:, half:]
            radius += 0.5
            radius *= 2.0**-32
            np.log(radius, out=radius)
            radius *= -2.0
            np.sqrt(radius, out=radius)
            angle *= 2 * math.pi / 2**32
            z, rest = out[first : first + many, :half], numbers - half
            np.multiply(radius, np.cos(angle), out=z)
            np.multiply(radius[:, :rest], np.sin(angle[:, :rest]), out=out[first : first + many, half:])
        return out

    def increment(self, t: float, s: float) -> Tensor:
        """The Brownian increment of the next interval, W_s - W_t ~ N(0, |s - t|), (B, *event)."""
        return self.normal().mul_(abs(s - t) ** 0.5)

    def increment_and_integral(self, t: float, s: float) -> tuple[Tensor, Tensor]:
        """That increment and the integral of W_u - W_t du from t to s: (s - t)/2 dW + N(0, |s - t|^3/12)."""
        dW = self.increment(t, s)
        rest = self.normal().mul_((s - t) * abs(s - t) ** 0.5 / math.sqrt(12))
        return dW, rest.add_(dW, alpha=(s - t) / 2)
