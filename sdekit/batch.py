"""The batch that a loop runs: which of its samples a model is asked for now, and which of their entries are real.

Both are a context's, so that they reach a network, a norm or a guidance through whatever closure a user has put
between.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.system import ordinary

# Of how large a batch, where it is not all of it.
_asked: ContextVar[tuple[Tensor, int] | None] = ContextVar("samples", default=None)


def samples(rows: Tensor, total: int) -> AbstractContextManager[None]:
    """Within, models are asked for the samples ``rows`` (b,) of a batch of ``total``; conditions follow them."""
    outer = _asked.get()
    return asking((rows, total) if outer is None else (outer[0][rows], outer[1]))


@contextmanager
def asking(for_samples: tuple[Tensor, int] | None) -> Iterator[None]:
    """As :func:`samples`, whatever is asked for outside; None: the whole batch."""
    token = _asked.set(for_samples)
    try:
        yield
    finally:
        _asked.reset(token)


def asked() -> tuple[Tensor, int] | None:
    """(rows, total) of the innermost :func:`samples`, or None where a model is asked for the whole batch."""
    return _asked.get()


class Padding:
    """Which entries of a batch of samples of different sizes are real; the others are there to fill it up.

    ``real`` (B, *event), bool; ``counts`` (B,), int64: of them in each sample. Between them is nothing: what solvers
    hold there is 0, whatever a model says of it, no noise is drawn for it, and no norm counts it.
    """

    def __init__(self, real: Tensor, whole: Sequence[int] = ()) -> None:
        self.real = ordinary(real)
        self.counts = self.real.reshape(len(real), -1).sum(1)
        self.whole = torch.Size(whole)  # the last axes of an event, that no mask cuts through: (d,) of points (N, d)

    @functools.cached_property
    def groups(self) -> list[tuple[list[int], Tensor]]:
        """The samples of one size together: who, and where in the batch their entries are, (b n)."""
        flat, numbers, groups = self.real.reshape(len(self.real), -1), self.counts.tolist(), []
        for n in sorted(set(numbers)):
            rows = [i for i, m in enumerate(numbers) if m == n]
            who = torch.tensor(rows, device=flat.device)
            i, k = flat[who].nonzero(as_tuple=True)
            groups.append((rows, who[i] * flat.shape[1] + k))
        return groups

    @classmethod
    def of(cls, mask: "Tensor | Padding | None", shape: Sequence[int], process: Any) -> "Padding | None":
        """The padding that a user's ``mask`` says of samples (B, *event), under a process or a system.

        Raises TypeError or ValueError for a mask that is not bool, does not fit the shape, or leaves a sample without
        any entry, and where the process ties entries to each other or has a mean of its own.
        """
        if mask is None or isinstance(mask, Padding):
            return mask
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask must be a tensor of torch.bool, True where an entry is real, got {got}")
        shape = _checks.event_shape(shape)
        form = (*mask.shape, *(1,) * (len(shape) - mask.ndim))
        fits = mask.ndim <= len(shape) and mask.ndim > 1 and form[0] == shape[0]
        if not fits or any(m not in (1, n) for m, n in zip(form, shape, strict=True)):
            raise ValueError(
                f"mask must have the first axes of {tuple(shape)}, the batch's and at least one more, got "
                f"{tuple(mask.shape)}: for sets of points (B, N, d) it is (B, N)"
            )
        real = mask.reshape(form).expand(tuple(shape))
        if not bool(real.reshape(len(real), -1).any(1).all()):
            raise ValueError("mask leaves a sample without a single real entry: leave such samples out")
        own = getattr(process, "shifted", False) or not getattr(process, "centred", True)
        if own or getattr(process, "root", None) is not None:
            what = "a mean of its own" if own else "noise that ties all entries together"
            raise ValueError(f"mask is for processes that treat every entry alike; {type(process).__name__} has {what}")
        cut = max(k for k, m in enumerate(form) if m != 1 or k < 2)  # of (B, N), and (B, N, 1), the points' axis
        return cls(real, shape[2:] if cut == 1 else ())

    def only(self, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """x with 0 where nothing is real; x are the samples ``rows``, all unless given."""
        if self.real.device != x.device:  # once: a copy at every evaluation would make the host wait
            self.real = self.real.to(x.device)
        real = self.real if rows is None else self.real[rows.to(x.device)]
        return torch.where(real.reshape(x.shape), x, 0.0)

    def same(self, other: "Padding") -> bool:
        """Whether the other one says the same."""
        return torch.equal(self.real.cpu(), other.real.cpu())

    def alone(self, rows: list[int], where: Tensor) -> torch.Size:
        """The shape of samples of one size without their padding: (b, n, *whole)."""
        return torch.Size((len(rows), len(where) // len(rows) // self.whole.numel(), *self.whole))

    def spread(self, make: Callable[[list[int], torch.Size], Tensor], like: Tensor) -> Tensor:
        """A batch like ``like`` of ``make(rows, shape)``: samples of one size without their padding."""
        out = like.new_zeros(like.shape)
        for rows, where in self.groups:
            with padded(None):
                made = make(rows, self.alone(rows, where))
            out.view(-1)[where.to(out.device)] = made.reshape(-1).to(out)
        return out


def real_state(x: Any, mask: Tensor | Padding | None, process: Any, name: str = "x") -> tuple[Tensor, Padding | None]:
    """A finite state (B, *event), with 0 where nothing is real, whatever was there, and its padding.

    Raises as :meth:`Padding.of`, and TypeError or ValueError for an x that is no state.
    """
    if mask is None or not isinstance(x, Tensor) or not x.is_floating_point():
        return _checks.state(x, name), None  # or an error that says what it is
    padding = Padding.of(mask, x.shape, process)
    clean = padding.only(x)  # type: ignore[union-attr]
    # x itself where it may be: an evaluation may have been at it
    return _checks.state(x if torch.equal(x, clean) else clean, name), padding


_padding: ContextVar[Padding | None] = ContextVar("padding", default=None)
padding_now = _padding.get  # the batch's, or None: for whoever asks so often that a call counts


def padded(padding: Padding | None) -> AbstractContextManager[None]:
    """Within, the batch is padded so, and all of it asked for; None: not padded at all, whatever holds outside,
    but of the samples that are asked for there.
    """
    return nullcontext() if padding is None and _padding.get() is None else _padded(padding)


@contextmanager
def _padded(padding: Padding | None) -> Iterator[None]:
    token = _padding.set(padding)
    try:
        with nullcontext() if padding is None else asking(None):
            yield
    finally:
        _padding.reset(token)


def only_real(x: Tensor) -> Tensor:
    """The samples asked for, with 0 where nothing is real; x itself where nothing is padded."""
    padding = _padding.get()
    if padding is None:
        return x
    here = _asked.get()
    return padding.only(x, None if here is None else here[0])


def unpadded(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """of(x), (B,), of a whole batch: where it is padded of samples without their padding, size by size."""
    padding = _padding.get()
    if padding is None:
        return of(x)
    flat, groups = x.reshape(-1), padding.groups
    with padded(None):
        found = torch.cat([of(flat[w.to(x.device)].reshape(padding.alone(rows, w))) for rows, w in groups])
    order = torch.tensor([i for rows, _ in groups for i in rows])
    return found[order.argsort().to(found.device)]


def entries(x: Tensor) -> Any:
    """How many real entries a sample has: a number where nothing is padded, else (b,), of the samples asked for."""
    padding = _padding.get()
    if padding is None:
        return x[0].numel()
    here = _asked.get()
    counts = padding.counts if here is None else padding.counts[here[0].to(padding.counts.device)]
    return counts.to(x.device, torch.promote_types(x.dtype, torch.float32))


def event_mean(y: Tensor) -> Tensor:
    """Over what is real of the event, (b,), of the samples asked for."""
    n, flat = entries(y), only_real(y).reshape(len(y), -1)
    return flat.mean(1) if isinstance(n, int) else (flat.sum(1, dtype=n.dtype) / n).to(y.dtype)


def first_entry(x: Tensor) -> Tensor:
    """The first real entry of each of the samples asked for, (b,)."""
    padding, flat = _padding.get(), x.reshape(len(x), -1)
    if padding is None:
        return flat[:, 0]
    here = _asked.get()
    real = padding.real if here is None else padding.real[here[0].to(padding.real.device)]
    return flat.gather(1, real.reshape(len(x), -1).int().argmax(1, keepdim=True).to(x.device))[:, 0]
