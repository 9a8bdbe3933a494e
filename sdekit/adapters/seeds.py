"""Seeds of the noise, from what hosts hand on."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def ids_of(x: Tensor) -> list[int]:
    """A number for each sample of x, (B, *event), that is a hash of its bytes as float32: one that is the same for it
    in every batch, for hosts that hand on no generator and no seed, but latents that theirs has made.
    """
    states = x.detach().float().cpu().contiguous().numpy()
    digests = (hashlib.blake2b(state.tobytes(), digest_size=7).digest() for state in states)
    return [int.from_bytes(digest, "little") for digest in digests]


def seeds(generator: Any, x: Tensor) -> tuple[int, Sequence[int] | None]:
    """(seed, ids) of the noise: a seed for all of one generator, and a number for each sample of a list of them.

    Pipelines of flow models hand on none. Then each sample's number is a hash of its latents, which theirs has made.
    """
    if generator is None:
        return 0, ids_of(x)
    if not isinstance(generator, list | tuple):
        return _number(generator), None
    if len(generator) != len(x):
        raise ValueError(f"generator must be one, or one for each of the {len(x)} samples, got {len(generator)}")
    return 0, [_number(one) for one in generator]


def _number(generator: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
