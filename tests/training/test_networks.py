"""The networks keep the shape, dtype and time of what they are given, and touch no global state."""

import math

import pytest
import torch

from sdekit import VPSDE, HeatODE, SubVPSDE, as_score
from sdekit.training.networks import MLP, NETWORKS, Preconditioned, UNet, build, time_features
from sdekit.training.objectives import denoising, edm


def nudged(network, seed=0):
    """Zero-initialised read-outs hide wrong shapes and dead paths: give every weight a value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
    return network


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (28, 28), (1, 5), (32, 32)])
@pytest.mark.parametrize("multipliers", [(1,), (1, 2), (1, 2, 2)])
def test_a_unet_returns_the_shape_it_got(size, multipliers):
    network = nudged(build("UNet", channels_in=2, width=8, multipliers=multipliers))
    x = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0))
    out = network(x, torch.tensor([0.1, 0.5, 0.9]))
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(("name", "event"), [("UNet", (1, 8, 8)), ("MLP", (1,))])
def test_a_bf16_network_tells_times_apart_that_bf16_cannot(name, event):
    network = nudged(build(name)).to(torch.bfloat16)
    x = torch.ones(2, *event, dtype=torch.bfloat16)
    out = network(x, torch.tensor([0.5, 0.5009]))  # equal in bf16, whose spacing at 0.5 is 0.0039
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize(("name", "event"), [("UNet", (1, 8, 8)), ("MLP", (1,))])
def test_samples_do_not_see_each_other(name, event):
    network = nudged(build(name)).double()
    x = torch.randn(4, *event, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = torch.tensor([0.1, 0.3, 0.6, 0.9])
    assert torch.allclose(network(x, t)[2:3], network(x[2:3], t[2:3]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_weight_takes_part(name):
    network = nudged(build(name))
    x = torch.ones(2, 1, 8, 8) if name == "UNet" else torch.ones(2, 1)
    network(x, torch.tensor([0.2, 0.7])).square().sum().backward()
    idle = [key for key, weight in network.named_parameters() if weight.grad is None]
    assert idle == []


@pytest.mark.parametrize("name", NETWORKS)
def test_a_seed_fixes_the_weights_and_the_global_rng_stays(name):
    before = torch.random.get_rng_state()
    a, b, c = build(name, seed=3), build(name, seed=3), build(name, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = list(zip(a.parameters(), b.parameters(), c.parameters(), strict=True))
    assert all(torch.equal(u, v) for u, v, _ in pairs)
    assert not all(torch.equal(u, w) for u, _, w in pairs)


def test_time_features_are_distinct_over_both_kinds_of_clock():
    for top in (1.0, 80.0):
        features = time_features(torch.linspace(0, top, 200), 32)
        gaps = torch.cdist(features, features) + 10 * torch.eye(200)
        assert gaps.min() > 0.1


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (UNet, {"width": 0}, "width"),
        (UNet, {"multipliers": ()}, "multipliers"),
        (MLP, {"dim": 0}, "dim"),
        (MLP, {"width": 7}, "width must be even"),
    ],
)
def test_bad_sizes_are_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_unknown_networks_and_arguments_are_named():
    with pytest.raises(ValueError, match="UNet"):
        build("Unet")
    with pytest.raises(ValueError, match="depth"):
        build("MLP", depth=3)


class Constant(torch.nn.Module):
    """F = 0.25, whatever it is told, which it remembers."""

    classes = 3

    def forward(self, y, noise, *condition):
        self.told = y, noise, condition
        return torch.full_like(y, 0.25)


@pytest.mark.parametrize("sde", [VPSDE(), HeatODE(), SubVPSDE()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("d", [0.5, 2.0])
def test_preconditioning_is_karras_s(sde, d):
    """Equation 7 and table 1, in floats: c_skip, c_out, c_in, c_noise at the level sigma/alpha."""
    inner = Constant()
    network = Preconditioned(inner, sde, d)
    assert network.classes == 3
    t, x, label = 0.3 * sde.T, torch.tensor([[1.7]], dtype=torch.float64), torch.tensor([1])
    out = network(x, torch.tensor([t], dtype=torch.float64), label)
    r, y = float(sde.sigma(t) / sde.alpha(t)), 1.7 / float(sde.alpha(t))
    expected = d**2 / (r**2 + d**2) * y + r * d / math.sqrt(r**2 + d**2) * 0.25
    assert float(out) == pytest.approx(expected, rel=1e-12)
    told, noise, condition = inner.told
    assert float(told) == pytest.approx(y / math.sqrt(r**2 + d**2), rel=1e-12)
    assert float(noise) == pytest.approx(math.log(r) / 4, rel=1e-9)
    assert condition == (label,)


@pytest.mark.parametrize("d", [0.5, 2.0])
def test_the_weighting_edm_gives_the_inner_network_s_error_weight_one(d):
    """For data N(0, d^2) the best F is 0, and its target there has variance 1 at every level."""
    sde, n = VPSDE(), 20000
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, n, 1, generator=generator, dtype=torch.float64)

    class Zero(torch.nn.Module):
        def forward(self, y, noise):
            return torch.zeros_like(y)

    score = as_score(Preconditioned(Zero(), sde, d), sde, "x0")
    for t in (0.01, 0.3, 0.9):
        losses = denoising(edm(d))(score, d * x0, torch.full((n,), t, dtype=torch.float64), lambda: eps)
        assert float(losses.mean()) == pytest.approx(1.0, abs=0.06)  # six standard errors of a chi-square's mean


def test_labels_reach_the_network_and_none_is_a_class_of_its_own():
    network = build("MLP", dim=2, width=8, layers=1, classes=3)
    torch.nn.init.normal_(network.last.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.normal_(network.time.vectors.weight, generator=torch.Generator().manual_seed(1))
    sde = VPSDE()
    score, x = as_score(network, sde, "eps"), torch.ones(2, 2)
    each = [score.given(k)(x, 0.5) for k in range(4)]
    assert torch.equal(each[3], score(x, 0.5))  # number 3 stands for none of the three
    assert all(not torch.equal(each[i], each[j]) for i in range(4) for j in range(i))
    mixed = score.given(torch.tensor([2, 0]))(x, 0.5)
    assert torch.allclose(mixed, torch.stack([each[2][0], each[0][1]]), rtol=1e-6)
    with pytest.raises(ValueError, match="conditions were given for 3 samples, and x has 2"):
        score.given(torch.tensor([0, 1, 2]))(x, 0.5)
    with pytest.raises(ValueError, match="without classes"):
        as_score(build("MLP", dim=2, width=8, layers=1), sde, "eps").given(1)(x, 0.5)
