"""Likelihoods of networks whose operations autograd cannot batch: GroupNorm after attention, fused attention."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from sdekit import VPSDE, as_score, log_likelihood
from sdekit.likelihood import density
from sdekit.training.networks import UNet

SDE = VPSDE()
SDE.t_min, SDE.T = 0.1, 0.2  # at random weights a flow is not smooth: a short way, in few steps


class Attentive(nn.Module):
    """Attention over the pixels leaves its result channels_last; GroupNorm follows."""

    def __init__(self, c=4):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, c, 3, padding=1), nn.Conv2d(c, 1, 3, padding=1)
        self.qkv, self.norm = nn.Linear(c, 3 * c), nn.GroupNorm(2, c, eps=0.1)

    def forward(self, x, t):
        h = self.first(x)
        q, k, v = self.qkv(h.flatten(2).mT).chunk(3, -1)
        y = functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0].mT.reshape(h.shape)
        assert not y.is_contiguous()
        return self.last(functional.silu(self.norm(y)))


def made(kind, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind()
        for p in network.parameters():
            if not p.any():  # zero before training
                nn.init.normal_(p, std=0.02)
    return network.to(dtype), torch.linspace(-1, 1, 3 * 4, dtype=dtype).sin().reshape(3, 1, 2, 2)


def test_a_network_that_cannot_be_batched_has_the_divergence_of_its_jacobian(monkeypatch):
    network, x = made(Attentive)
    score = as_score(network, SDE, "eps")
    system = SDE.reverse(score, 0.0)
    tried, grad = [], torch.autograd.grad

    def counted(*args, **kwargs):
        tried.append(kwargs.get("is_grads_batched", False))
        return grad(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    found = density.make_divergence(x, "exact", 1, None, None)
    time = torch.full((3,), 0.15, dtype=torch.float64)
    for graph in (False, False, True):
        _, div = found(system, x, system.at(time, x).time, torch.arange(3), graph)
        for i in range(3):
            jacobian = torch.autograd.functional.jacobian(lambda y: score.output(y, time[:1]), x[i : i + 1])
            trace = jacobian.reshape(4, 4).trace()
            assert abs(float(div[i, 0].detach()) - float(trace)) < 1e-12
    assert tried.count(True) == 1  # and never again, nor with a graph


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_log_likelihood_is_that_of_plain_gradients(divergence, monkeypatch):
    """In float32 too, and in chunks; a network that can be batched is, and says the same but for rounding."""
    options = {"divergence": divergence, "probes": 3, "seed": 0, "rtol": 1e-2, "atol": 1e-2}
    for kind in (Attentive, lambda: UNet(1, 16, (1,))):
        network, x = made(kind, torch.float32)
        score = as_score(network, SDE, "eps")
        got = log_likelihood(SDE, score, x, **options)
        with monkeypatch.context() as patch:
            patch.setattr(density, "_VJP_NUMBERS", 24)
            chunked = log_likelihood(SDE, score, x, **options)
            plain = density.Divergence.__init__

            def loop(self, *args, plain=plain, **kwargs):
                plain(self, *args, **kwargs)
                self.batched = False

            patch.setattr(density.Divergence, "__init__", loop)
            expected = log_likelihood(SDE, score, x, **options)
        for out in (got, chunked):
            torch.testing.assert_close(out.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)
            assert out.nfe == expected.nfe
    assert torch.isfinite(got.log_prob).all()


def differs_from_its_quotients(value, x, weight, h):
    """By how much d value/dx and d value/dweight miss difference quotients along one direction each."""
    direction = torch.linspace(-1, 2, x.numel(), dtype=torch.float64).cos().reshape(x.shape)
    push = torch.linspace(-2, 1, weight.numel(), dtype=torch.float64).cos().reshape(weight.shape)
    dx, dw = torch.autograd.grad(value(x), (x, weight))
    with torch.no_grad():
        along = [float(value(x + k * h * direction).detach()) for k in (1, -1)]
        beside = []
        for k in (1, -2):
            weight.add_(push, alpha=k * h)
            beside.append(float(value(x).detach()))
        weight.add_(push, alpha=h)
    found = [(up - down) / (2 * h) for up, down in (along, beside)]
    exact = [float((dx * direction).sum()), float((dw * push).sum())]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("kind", [Attentive, lambda: UNet(1, 16, (1,))], ids=["attentive", "unet"])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_of_a_divergence_are_its_difference_quotients(kind, batch):
    """2 x 2 pixels among others are where batched second derivatives of GroupNorm were wrong without an error."""
    network, x = made(kind)
    system, rows = SDE.reverse(as_score(network, SDE, "eps"), 0.0), torch.arange(batch)
    divergence = density.make_divergence(x[:batch], "exact", 1, None, None)
    time = torch.full((batch,), 0.15, dtype=torch.float64)

    def value(y):
        out, div = divergence(system, y, system.at(time, y).time, rows, True)
        return div.sum() + out.square().sum()

    assert differs_from_its_quotients(value, x[:batch].requires_grad_(), next(network.parameters()), 1e-5) < 1e-7


@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_of_a_likelihood_are_its_difference_quotients(batch):
    network, x = made(Attentive)

    def value(y):
        out = log_likelihood(SDE, as_score(network, SDE, "eps"), y, rtol=1e-6, atol=1e-6, differentiable=True)
        return out.log_prob.sum()

    assert differs_from_its_quotients(value, x[:batch].requires_grad_(), next(network.parameters()), 1e-3) < 1e-4


def test_an_error_of_the_network_itself_is_raised_as_it_is():
    class Refuses(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("the network's own trouble")

    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="the network's own trouble"):
        log_likelihood(SDE, lambda x, t: -Refuses.apply(x), x)


def test_the_choice_of_attention_is_given_back_whoever_leaves_last():
    """It is the process's: two threads that are within together must not keep each other's."""
    from sdekit.likelihood.density import _plain_attention

    def flags():
        kinds = torch.backends.cuda
        return kinds.flash_sdp_enabled(), kinds.mem_efficient_sdp_enabled(), kinds.math_sdp_enabled()

    before = flags()
    first, second = _plain_attention(), _plain_attention()
    first.__enter__()
    second.__enter__()
    assert flags()[:2] == (False, False)
    first.__exit__(None, None, None)
    assert flags()[:2] == (False, False)
    second.__exit__(None, None, None)
    assert flags() == before
