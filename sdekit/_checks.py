"""Messages for bad input: each names the argument, what it was, and what would do."""

import difflib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


def lookup(table: Mapping[str, V], name: str, what: str) -> V:
    """``table[name]``; an unknown name raises with the near ones and the whole list."""
    if isinstance(name, str) and name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise ValueError(f"unknown {what} {name!r}: {hint}known are {', '.join(sorted(table))}")


def positive(value: Any, name: str, *, zero: bool = False) -> float:
    """A finite float > 0 (>= 0 with ``zero``)."""
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be a finite number {'>= 0' if zero else '> 0'}, got {value!r}")
    return float(value)


def count(value: Any, name: str, *, minimum: int = 1) -> int:
    """A whole number of at least ``minimum``; 2.5 and True are refused."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, got {value!r} of type {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def ids(given: Sequence[int] | None, batch: int) -> Sequence[int]:
    """The samples' global numbers, 0 ... B-1 unless given."""
    if given is None:
        return range(batch)
    numbers = [count(i, "ids", minimum=0) for i in given]
    if len(numbers) != batch:
        raise ValueError(f"ids must hold one number per sample: got {len(numbers)} for a batch of {batch}")
    if numbers and max(numbers) >= 2**64:
        raise ValueError(f"ids must be below 2^64, got {max(numbers)}")
    return numbers


def event_shape(shape: Sequence[int]) -> torch.Size:
    """A sample shape (B, *event) with B >= 1 and no empty axis."""
    try:
        size = torch.Size(shape)
    except TypeError:
        raise TypeError(f"shape must be a sequence of whole numbers (B, *event), got {shape!r}") from None
    if len(size) == 0 or min(size) < 1:
        raise ValueError(f"shape must be (B, *event) with every entry at least 1, got {tuple(size)}")
    return size


def state(x: Any, name: str = "x") -> Tensor:
    """A finite floating tensor with a batch axis."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}; use torch.as_tensor")
    if not x.is_floating_point():
        way = "take torch.view_as_real of it" if x.is_complex() else "convert with .float() or .double()"
        raise TypeError(f"{name} must be a floating tensor, got {x.dtype}; {way}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name} must have shape (B, *event), not empty, got {tuple(x.shape)}")
    if not finite(x):
        raise ValueError(f"{name} holds {int((~torch.isfinite(x)).sum())} non-finite values; pass finite ones")
    return x


def finite(x: Tensor) -> bool:
    """True if every entry is. A finite sum says so at a thirtieth of the cost; one that is not may be overflow."""
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())


def labels(given: Tensor, classes: int, *, none: bool = True) -> None:
    """Whole numbers 0 ... ``classes``, the last of which stands for none of them (without ``none`` it is no label)."""
    low, high = (int(end) for end in given.aminmax())
    if low < 0 or high > classes - (not none):
        way = f", or {classes} for none of them" if none else ""
        raise ValueError(
            f"labels must be 0 ... {classes - 1}{way}, got {low if low < 0 else high}; or build the network with more "
            "classes"
        )


def floating(dtype: torch.dtype | None, name: str = "dtype") -> torch.dtype | None:
    """The dtype, if it is None or floating."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"{name} must be floating, got {dtype}; use torch.float32 or torch.float64")
    return dtype


def instance(sde: Any, *, gaussian: bool = True) -> None:
    """Refuse what is no process, and a process's class where the process itself is meant.

    ``gaussian``: its alpha and sigma are needed; without, an ItoSDE will do.
    """
    if isinstance(sde, type):
        raise TypeError(f"sde must be a process, not its class: {sde.__name__}(), got {sde.__name__}")
    if hasattr(sde, "perturb") and not hasattr(sde, "alpha"):
        if gaussian:
            raise TypeError(
                f'{type(sde).__name__} has no alpha and sigma, which this needs: its models predict a "score", and '
                "solve(process.reverse(score), x_T, grid, method) samples it"
            )
        return
    if not (hasattr(sde, "alpha") and hasattr(sde, "sigma")):
        raise TypeError(f"sde must be a process, such as VPSDE(), got {type(sde).__name__}")
