"""Keyed noise: every random number is a function of (seed, sample, purpose, its place in the sequence)."""

import math
import secrets
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from sdekit import _checks

# One stream per purpose: drawing more of one never moves another.
_PURPOSES = {"prior": 0, "path": 1, "probe": 2, "perturb": 3, "data": 4}
_BLOCK = 256  # numbers drawn by a sample's generator at a time, at least; part of what a seed means


class Noise:
    """Standard normal numbers for a batch, sample by sample.

    Row i is drawn by a generator of its own, keyed by (seed, ids[i], purpose), so a sample's noise
    does not depend on the batch that it is drawn in. The global generator is neither read nor moved. No two
    samples share a generator (for ids below 2^32), though torch's CPU generator takes 32 bits of seed only.
    The same seed gives the same numbers on devices of the same type and in the same dtype.

    ``like``: a tensor (B, *event) that gives shape, dtype and device. ``seed``: a whole number >= 0,
    or None for fresh entropy. ``ids``: the samples' global numbers (default 0 ... B-1).
    Raises TypeError or ValueError for a seed or ids that cannot be used.
    """

    def __init__(
        self, like: Tensor, seed: int | None = None, ids: Sequence[int] | None = None, *, purpose: str = "path"
    ) -> None:
        seed = secrets.randbits(63) if seed is None else _checks.count(seed, "seed", minimum=0)
        ids = range(like.shape[0]) if ids is None else [_checks.count(i, "ids", minimum=0) for i in ids]
        if len(ids) != like.shape[0]:
            raise ValueError(f"ids must hold one number per sample: got {len(ids)} for a batch of {like.shape[0]}")
        self._like, self._ids = like.new_empty(0, *like.shape[1:]), ids  # no view: it would keep like alive
        self._key = int(np.random.SeedSequence(seed, spawn_key=(_PURPOSES[purpose],)).generate_state(1, np.uint64)[0])
        # Small events are drawn many at a time: one call per sample and block, not per sample and step.
        self._block = max(1, _BLOCK // like[0].numel())
        self._next = self._block

    @cached_property
    def _generators(self) -> list[torch.Generator]:  # made by the first draw, which many a solver never makes
        return [torch.Generator(self._like.device).manual_seed(_sample_key(self._key, i)) for i in self._ids]

    @cached_property
    def _drawn(self) -> Tensor:
        with torch.inference_mode(False):  # it is written to whatever the mode of a later draw
            return self._like.new_empty(len(self._ids), self._block, *self._like.shape[1:])

    def normal(self) -> Tensor:
        """The next standard normal tensor, (B, *event)."""
        if self._next == self._block:
            for row, generator in zip(self._drawn, self._generators, strict=True):
                row.normal_(generator=generator)
            self._next = 0
        self._next += 1
        return self._drawn[:, self._next - 1].clone()  # the block is overwritten by the next one

    def increment(self, t: float, s: float) -> Tensor:
        """The Brownian increment of the next interval, W_s - W_t ~ N(0, |s - t|), (B, *event)."""
        return self.normal().mul_(abs(s - t) ** 0.5)

    def increment_and_integral(self, t: float, s: float) -> tuple[Tensor, Tensor]:
        """That increment and the integral of W_u - W_t du from t to s: (s - t)/2 dW + N(0, |s - t|^3/12)."""
        dW = self.increment(t, s)
        rest = self.normal().mul_((s - t) * abs(s - t) ** 0.5 / math.sqrt(12))
        return dW, rest.add_(dW, alpha=(s - t) / 2)


def _sample_key(key: int, i: int) -> int:
    """A 64-bit key whose low half, all that a CPU generator reads, is a bijection of i: no birthday collisions."""
    return (key >> 32 << 32) | ((key + i * 0x9E3779B1) & 0xFFFFFFFF)
