"""What a host would wait for with a GPU, seen without one: on a device that records it, and refuses to mix.

Tensors of ``Elsewhere`` compute on the CPU and say that they are on another device (meta: every build of torch has it).
Recorded is what makes CUDA's host wait: a look at values (LOOKS, and a mask for an index), and a copy between host and
device, which may wait even where non_blocking unless the memory is pinned; pinned, and so allowed, are draws of noise.
What the host reads of a linear solver's success is not. A CPU tensor beside one of the device is an error, as it would
be there, unless it is a number to read.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from sdekit import SAMPLERS, VPSDE, Noise, as_score, dynamic_threshold, sample, static_threshold
from sdekit.processes.counted import _WINDOW

DEVICE, CPU, ONES = torch.device("meta"), torch.device("cpu"), torch.ones(3, dtype=torch.float64)
LOOKS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "unique_consecutive"}


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
        if any(y.device == DEVICE and not isinstance(y, Elsewhere) for y in given):
            raise RuntimeError(f"{func} of a tensor made on the device from Python numbers: a copy, which waits")
        if name in LOOKS or (
            name in ("index", "index_put_") and any(y.dtype in (torch.bool, torch.uint8) for y in given[1:])
        ):
            self.waits.append(name)
        crossing = name in ("_to_copy", "copy_") and (not there or target == CPU or len({type(y) for y in given}) == 2)
        if crossing and not kwargs.get("non_blocking"):
            self.waits.append(name)
        elif crossing:
            self.uploads += 1
        numbers = [] if name in ("stack", "cat") else [y for y in given if y.ndim == 0 and y is not kwargs.get("out")]
        if name.endswith("_"):
            numbers = [y for y in numbers if y is not args[0]]
        held = {id(y) for y in (*there, *numbers)}
        if not crossing and there and (mixed := [tuple(y.shape) for y in given if id(y) not in held]):
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

    def forward(self, x, t, labels=None):
        out = self.scale * x * t[:, None]
        return out if labels is None else out + 0.1 * labels[:, None]


def on_device(make_score, name, steps):
    """What a run of a sampler makes the host wait for, its copies to the device, its evaluations and its draws."""
    sde, times, draws, normal = VPSDE(), [], [], Noise.normal

    def drawn(noise):
        draws.append(noise)
        return normal(noise)

    with torch.no_grad(), Device() as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Noise, "normal", drawn)
        x_T = torch.ones(3, 2, device=DEVICE)
        score = make_score(sde)

        def counted(x, t):
            times.append(t)
            return score(x, t)

        x = sample(sde, counted, x_T.shape, name, steps=steps, x_T=x_T, seed=0)
    assert isinstance(x, Elsewhere)
    assert torch.isfinite(x.inner).all()
    return device, len(times), len(draws)


def looks(device):
    """How often values were looked at, where that is all that there was to wait for."""
    assert set(device.waits) <= {"_local_scalar_dense"}
    return len(device.waits)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_waits_for_the_device_once_in_64_evaluations(name):
    """To see that all were finite. Twice before its loop, for x_T, and once after; and nothing but noise is copied."""
    for steps in (20, 63, 70):
        device, evaluations, draws = on_device(lambda sde: lambda x, t: -x, name, steps)
        assert looks(device) == 3 + math.ceil(evaluations / _WINDOW)
        assert device.uploads == draws
        assert (draws > 0) == SAMPLERS[name].stochastic


@pytest.mark.parametrize("predicts", ["score", "eps", "x0", "v", "flow"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "heun", "ddim"])
def test_a_network_gets_its_time_without_a_wait(name, predicts):
    device, *_ = on_device(lambda sde: as_score(Network(), sde, predicts), name, 8)
    assert looks(device) == 4
    assert device.uploads == 0


def test_labels_are_copied_once():
    device, *_ = on_device(lambda sde: as_score(Network(), sde, "eps").given(torch.arange(3)), "dpmpp_2m", 8)
    assert sorted(device.waits) == ["_local_scalar_dense"] * 4 + ["_to_copy"]


@pytest.mark.parametrize("clock", [lambda t: 999 * t, lambda t: torch.stack([t, 2 * t], 1)[:, 0], lambda t: t * ONES])
def test_a_network_s_time_is_the_same_there(clock):
    """Whether it is one number for all, or only a function of (B,) tensors can tell."""
    sde, x, seen = VPSDE(), torch.ones(3, 2), []

    def network(x, t):
        seen.append(t)
        return -x

    as_score(network, sde, "eps", time=clock)(x, 0.3)
    with torch.no_grad(), Device():
        as_score(network, sde, "eps", time=clock)(x.to(DEVICE), 0.3)
    assert torch.equal(seen[0], seen[1].inner)
    assert seen[0].shape == (3,)


@pytest.mark.parametrize("wrap", [static_threshold, dynamic_threshold])
def test_thresholding_waits_for_nothing(wrap):
    device, *_ = on_device(lambda sde: wrap(sde, lambda x, t: -x, (-1.0, 1.0)), "unipc_2", 8)
    assert looks(device) == 4
    assert device.uploads == 0


def test_waits_are_seen():
    """What this file would miss, it could not test."""

    def bad(x, t):
        return -x if x.sum() > 0 else x

    device, evaluations, _ = on_device(lambda sde: bad, "ddim", 8)
    assert looks(device) == 4 + evaluations
    with Device() as device:
        x = torch.ones(3, 2, device=DEVICE)
        x.cpu()
        torch.ones(3).to(DEVICE)
        x.copy_(torch.ones(3, 2))
        x[x > 0]
        assert device.waits == ["_to_copy", "_to_copy", "copy_", "index"]
        total = torch.zeros(())
        for mixed in (
            lambda: x * torch.ones(2),
            lambda: torch.sum(x, None, out=total),
            lambda: total.add_(x[0, 0]),
            lambda: torch.stack([x[0, 0], total]),
        ):
            with pytest.raises(RuntimeError, match="beside those of the device"):
                mixed()
        with pytest.raises(RuntimeError, match="from Python numbers"):
            x * torch.tensor([1.0, 2.0], device=DEVICE)
