"""What was computed of a process, kept for the next call that asks for the same."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

V = TypeVar("V")

MOST = 16  # of a process; the one that was asked for longest ago goes first
_lock = threading.Lock()
_of: Any = WeakIdKeyDictionary()  # process -> {key: (times, what was watched there, value)}


def kept(
    sde: Any,
    key: Hashable,
    make: Callable[[], V],
    times: Callable[[V], Tensor],
    watch: Callable[[Tensor], list[Tensor]] | None = None,
) -> V:
    """``make()``, or what it made when it was last asked for under this key.

    A process may be changed, or be a function of something that changes: what was made is handed out again only while
    alpha and sigma (or what ``watch`` says of times) are to the bit what they were at the times that it depends on,
    ``times(value)``, between them and at T. The value is shared among calls and threads: it must not be changed.
    """
    look = watch or (lambda times: [sde.alpha(times), sde.sigma(times)])
    with torch.inference_mode(False), torch.no_grad():  # a later call may be of another mode
        with _lock:
            entries = _of.get(sde, {})
            entry = entries.get(key)
            if entry is not None:
                entries.move_to_end(key)
        if entry is not None:
            probes, then, value = entry
            now = torch.stack(look(probes))
            if now.shape == then.shape and torch.equal(now, then):
                return value
        value = make()
        near = times(value)
        probes = torch.cat([near, (near[1:] + near[:-1]) / 2, near.new_tensor([sde.T])])
        now = torch.stack(look(probes))
    with _lock:
        entries = _of.setdefault(sde, OrderedDict())
        entries[key] = (probes, now, value)
        entries.move_to_end(key)
        while len(entries) > MOST:
            entries.popitem(last=False)
    return value
