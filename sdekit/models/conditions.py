"""What a network is given besides x and t: each sample's own goes where the sample goes."""

import copy
import numbers
from collections.abc import Callable, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdekit.batch import asked
from sdekit.system import holds, ordinary, shown

Chosen = tuple[tuple[Any, ...], dict[str, Any]]


class Conditions:
    """Arguments for a call with a batch; tensors in them whose first axis is that of the samples follow these.

    A whole number as a positional argument is a label for all samples.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        whole = [isinstance(a, numbers.Integral) and not isinstance(a, bool) for a in args]
        args = tuple(torch.tensor(int(a)) if is_whole else a for a, is_whole in zip(args, whole, strict=True))
        self.all: Chosen = mapped(ordinary, (args, kwargs))
        self._last: tuple[Any, Any, Any] = (None, None, None)  # those of the samples last asked for

    def __repr__(self) -> str:
        args, kwargs = self.all
        return ", ".join([*map(shown, args), *(f"{name}={shown(value)}" for name, value in kwargs.items())])

    def of(self, x: Tensor) -> Chosen:
        """Those of the samples that x are, on x's device. ValueError where none fits the batch though one should."""
        here = asked()
        rows, total = (None, x.shape[0]) if here is None else here
        for_rows, key, chosen = self._last
        if chosen is not None and for_rows is rows and key == (total, x.shape[0], x.device):
            return chosen
        lengths: list[int] = []
        mapped(lambda y: lengths.append(len(y)) if y.ndim and len(y) != 1 else None, self.all)
        if lengths and total not in lengths:
            raise ValueError(
                f"conditions were given for {lengths[0]} samples, and x has {total}: their first axis must be the "
                "batch (or 1); what all samples share is better bound to the network, as by functools.partial"
            )

        def choose(y: Tensor) -> Tensor:
            y = y.to(x.device)
            if y.ndim == 0:
                return y if y.is_floating_point() else y.expand(x.shape[0])
            return y[rows] if len(y) == total and rows is not None else y

        with torch.inference_mode(False):  # they are for a later mode, too
            chosen = mapped(choose, self.all)
        self._last = (rows, (total, x.shape[0], x.device), chosen)
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        return {"all": self.all, "_last": (None, None, None)}


def mapped(f: Callable[[Tensor], Any], y: Any) -> Any:
    """y with f of every tensor in it, in tuples, lists and mappings of any kind."""
    if isinstance(y, Tensor):
        return f(y)
    if isinstance(y, np.ndarray):
        return f(torch.from_numpy(y))
    if isinstance(y, MutableMapping):
        new = copy.copy(y)
        for key, value in y.items():
            new[key] = mapped(f, value)
        return new
    if isinstance(y, tuple | list):
        parts = [mapped(f, value) for value in y]
        return type(y)(*parts) if hasattr(y, "_fields") else type(y)(parts)
    return y


def mask_of_padding(score: Any, data: Tensor) -> Tensor | None:
    """A condition that is a mask of padded data, it seems: bool, of their first axes, and all they hold there is 0."""
    conditions, found = getattr(score, "conditions", None), []

    def look(y: Tensor) -> None:
        form = (*y.shape, *(1,) * (data.ndim - y.ndim))
        fits = all(m in (1, n) for m, n in zip(form, data.shape, strict=False))
        mask = y.dtype is torch.bool and 1 < y.ndim <= data.ndim and fits and not holds(y)
        if mask and holds((data == 0) | y.reshape(form).to(data.device)):
            found.append(y)

    if conditions is not None:
        mapped(look, conditions.all)
    return found[0] if found else None


class ApartError(ValueError):
    """Two conditions do not fit into one call."""


def joined(a: Any, b: Any, rows: int = 1) -> Any:
    """The conditions a of ``rows`` samples, and after them those b of as many, as those of one batch.

    Tensors are put one after the other, and what else there is must be the same in both. Raises ApartError where they
    are not of one shape. With rows = 1 it says whether they can be joined.
    """
    if isinstance(a, np.ndarray | Tensor) and isinstance(b, np.ndarray | Tensor):
        a, b = torch.as_tensor(a), torch.as_tensor(b)
        own = [y[None] if y.ndim == 0 and not y.is_floating_point() else y for y in (a, b)]  # labels
        most = max(rows, *(len(y) if y.ndim else 1 for y in own))
        fit = all(y.ndim and len(y) in (1, most) for y in own) and own[0].shape[1:] == own[1].shape[1:]
        if fit and rows in (1, most):
            return torch.cat([y.expand(most, *y.shape[1:]) for y in own])
        if a is b or (a.shape == b.shape and torch.equal(a, b)):
            return a
    elif isinstance(a, MutableMapping) and type(a) is type(b) and a.keys() == b.keys():
        new = copy.copy(a)
        for key in a:
            new[key] = joined(a[key], b[key], rows)
        return new
    elif isinstance(a, tuple | list) and type(a) is type(b) and len(a) == len(b):
        parts = [joined(p, q, rows) for p, q in zip(a, b, strict=True)]
        return type(a)(*parts) if hasattr(a, "_fields") else type(a)(parts)
    elif a is b or (type(a) is type(b) and not isinstance(a, tuple | list | MutableMapping | Tensor) and a == b):
        return a
    raise ApartError("conditional and unconditional arguments must be of the same shapes to go into one call")
