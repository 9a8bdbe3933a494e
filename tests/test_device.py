"""What a host would wait for with a GPU, seen without one: on a device that records it, and refuses to mix.

Tensors of ``Elsewhere`` compute on the CPU and say that they are on another device (meta: every build of torch has it).
Recorded is what makes CUDA's host wait: a look at values (item, nonzero, a mask for an index) and a copy between host
and device, which may wait even where non_blocking unless the memory is pinned; pinned, and so allowed, are draws of
noise. A CPU tensor beside one of the device is an error, as it would be there, unless it has no dimensions.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sdekit import SAMPLERS, VPSDE, as_score, dynamic_threshold, sample, static_threshold
from sdekit.reverse import _WINDOW

DEVICE, CPU = torch.device("meta"), torch.device("cpu")
LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2"}


class Elsewhere(torch.Tensor):
    """A tensor on the other device."""

    @staticmethod
    def __new__(cls, inner):
        kwargs = {"strides": inner.stride(), "dtype": inner.dtype, "layout": inner.layout, "device": DEVICE}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), **kwargs)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor of the device, outside of its mode")


class Device(TorchDispatchMode):
    """Where tensors may be elsewhere; ``waits`` are the names of what the host waited for."""

    def __init__(self):
        super().__init__()
        self.waits, self.uploads = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name, given = func.__name__.split(".")[0], []
        tree_map_only(torch.Tensor, given.append, (args, kwargs))
        there = [y for y in given if isinstance(y, Elsewhere)]
        target = kwargs.get("device")
        target = None if target is None else torch.device(target)
        if not there and target != DEVICE:
            return func(*args, **kwargs)
        if name in LOOKS or (name in ("index", "index_put_") and any(y.dtype is torch.bool for y in given[1:])):
            self.waits.append(name)
        crossing = name in ("_to_copy", "copy_") and (not there or target == CPU or len({type(y) for y in given}) == 2)
        if crossing and not kwargs.get("non_blocking"):
            self.waits.append(name)
        elif crossing:
            self.uploads += 1
        elif mixed := [tuple(y.shape) for y in given if there and y.ndim and not isinstance(y, Elsewhere)]:
            raise RuntimeError(f"{func}: CPU tensors of shapes {mixed} beside those of the device")
        if target is not None:
            kwargs["device"] = "cpu"
        wrapped = {id(y.inner): y for y in there}  # what an operation in place or with out= gives back
        args, kwargs = tree_map_only(Elsewhere, lambda y: y.inner, (args, kwargs))
        out = func(*args, **kwargs)
        if crossing and target == CPU:
            return out
        return tree_map_only(torch.Tensor, lambda y: wrapped[id(y)] if id(y) in wrapped else Elsewhere(y), out)


class Network(torch.nn.Module):
    """One on the device: its time and its labels must be there too."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.full((2,), -0.1, device=DEVICE), requires_grad=False)

    def forward(self, x, t, labels):
        return self.scale * x * t[:, None] + 0.1 * labels[:, None]


def on_device(make_score, name, steps):
    """What a run of a sampler makes the host wait for, its copies to the device, and its evaluations."""
    sde, times = VPSDE(), []
    with torch.no_grad(), Device() as device:
        x_T = torch.ones(3, 2, device=DEVICE)
        score = make_score(sde)
        device.waits.clear()  # of the making

        def counted(x, t):
            times.append(t)
            return score(x, t)

        x = sample(sde, counted, x_T.shape, name, steps=steps, x_T=x_T, seed=0)
    assert isinstance(x, Elsewhere)
    assert torch.isfinite(x.inner).all()
    return device, len(times)


def looks(device):
    """How often values were looked at, where that is all that there was to wait for."""
    assert set(device.waits) <= {"_local_scalar_dense"}
    return len(device.waits)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_waits_for_the_device_once_in_64_evaluations(name):
    """To see that all were finite. Twice before its loop, for x_T, and twice after; and no other copy than of noise."""
    for steps in (20, 70):
        device, evaluations = on_device(lambda sde: lambda x, t: -x, name, steps)
        assert looks(device) == 4 + (evaluations - 1) // _WINDOW
        assert SAMPLERS[name].stochastic or device.uploads == 0


@pytest.mark.parametrize("predicts", ["score", "eps", "x0", "v", "flow"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "ddim"])
def test_a_network_gets_its_time_and_labels_without_a_wait(name, predicts):
    def labelled(sde):
        return as_score(Network(), sde, predicts).given(torch.arange(3))

    device, _ = on_device(labelled, name, 8)
    assert looks(device) == 4
    assert device.uploads == 0


@pytest.mark.parametrize("wrap", [static_threshold, dynamic_threshold])
def test_thresholding_waits_for_nothing(wrap):
    device, _ = on_device(lambda sde: wrap(sde, lambda x, t: -x, (-1.0, 1.0)), "unipc_2", 8)
    assert looks(device) == 4
    assert device.uploads == 0


def test_waits_are_seen():
    """What this file would miss, it could not test."""

    def bad(x, t):
        return -x if x.sum() > 0 else x

    device, evaluations = on_device(lambda sde: bad, "ddim", 8)
    assert looks(device) == 4 + evaluations
    copying = Device()
    with copying:
        x = torch.ones(3, 2, device=DEVICE)
        x.cpu()
        torch.ones(3).to(DEVICE)
        x.copy_(torch.ones(3, 2))
        x[x > 0]
        assert copying.waits == ["_to_copy", "_to_copy", "copy_", "index"]
        with pytest.raises(RuntimeError, match="beside those of the device"):
            x * torch.ones(2)
