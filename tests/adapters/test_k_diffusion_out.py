"""Our samplers as k-diffusion's functions: the mixture's E[x_0|x] as the model, on both kinds of state."""

import math
from itertools import pairwise

import pytest
import torch

from sdekit import SAMPLERS, as_score, sample
from sdekit.adapters.k_diffusion import sampler, sigmas
from sdekit.processes.gaussian import HeatODE, RectifiedFlow
from tests.adapters.exact import B, denoiser, predictions, state

HEAT = torch.tensor([12.0, 5.0, 2.2, 1.0, 0.5, 0.25, 0.1, 0.05, 0.02, 0.0], dtype=torch.float64)
FLOW = torch.tensor([0.98, 0.9, 0.75, 0.6, 0.45, 0.3, 0.15, 0.05, 0.02, 0.0], dtype=torch.float64)
NAMES = list(SAMPLERS)
QUIET = [name for name in NAMES if not SAMPLERS[name].stochastic]


def of(flow):
    """(process, model, levels, state at the first) of a kind of state."""
    levels = FLOW if flow else HEAT
    sde = RectifiedFlow() if flow else HeatODE(T=float(levels[0]))
    first = float(levels[0])
    return sde, as_score(denoiser(flow), sde, "x0"), levels, state(1 - first if flow else 1.0, first)


@pytest.mark.parametrize("flow", [False, True], ids=["heat", "flow"])
@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_what_sample_makes(name, flow):
    sde, score, levels, x = of(flow)
    for ends in (levels, levels[:-1]):  # the last step is the denoising, or one to a level above 0
        times, denoise = levels[:-1], len(ends) == len(levels)
        got = sampler(name, flow=flow)(denoiser(flow), x, ends, {"seed": 5}, disable=True)
        expected = sample(sde, score, x.shape, name, grid=times, x_T=x, seed=5, denoise=denoise)
        assert float((got - expected).abs().max()) < 1e-11 * float(expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_flow_begins_at_pure_noise_too(name):
    """But for rules on the reverse SDE's drift, which is infinite there: they say what to do."""
    sde, score, levels, x = of(True)
    levels, x = torch.cat([torch.ones(1, dtype=torch.float64), levels]), state(0.0, 1.0)
    run = sampler(name, flow=True)
    if name in ("euler_maruyama", "reverse_diffusion", "heun_sde", "pc"):
        with pytest.raises(ValueError, match="at T = 1.* start a little lower"):
            run(denoiser(True), x, levels, {"seed": 5}, disable=True)
        return
    got = run(denoiser(True), x, levels, {"seed": 5}, disable=True)
    expected = sample(sde, score, x.shape, name, grid=levels[:-1], x_T=x, seed=5)
    assert float((got - expected).abs().max()) < 1e-11
    assert torch.isfinite(got).all()


def test_ddim_and_dpmpp_2m_are_k_diffusions():
    """Their formulae of sample_euler and sample_dpmpp_2m, written out, in sigma and t = -log sigma."""
    _, _, levels, x = of(False)
    D, expected = denoiser(), x
    for s, u in pairwise(levels):
        expected = expected + (u - s) * (expected - D(expected, s.expand(B))) / s
    assert float((sampler("ddim")(D, x, levels, disable=True) - expected).abs().max()) < 1e-12

    expected, old, before = x, None, None
    for s, u in pairwise(levels):
        now, h = D(expected, s.expand(B)), s.log() - u.log()
        r = 0.0 if old is None or u == 0 else h / (2 * before)
        expected, old, before = u / s * expected - torch.expm1(-h) * (now + r * (now - old if r else 0)), now, h
    assert float((sampler("dpmpp_2m")(D, x, levels, disable=True) - expected).abs().max()) < 1e-12


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc_3", 3)])
@pytest.mark.parametrize("flow", [False, True], ids=["heat", "flow"])
def test_errors_fall_with_the_order(name, order, flow):
    low, high = (0.1, 0.9) if flow else (0.1, 9.0)
    x, errors = state(1 - high if flow else 1.0, high), []

    def drawn(n, name):
        levels = sigmas("log_snr", n + 1, low, high, flow=flow).double()
        return sampler(name, flow=flow)(denoiser(flow), x, levels, disable=True)

    exact = drawn(400, "unipc_3")
    errors = [float((drawn(n, name) - exact).square().mean().sqrt()) for n in (40, 80)]
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.5 * order


@pytest.mark.parametrize("name", ["unipc_2", "heun", "edm", "pc", "restart"])
def test_the_callback_is_told_of_every_step(name):
    """Once a step, of the step's first evaluation, in k-diffusion's words; the bar counts the same."""
    _, _, levels, x = of(False)
    calls, seen = [], []
    model, n = denoiser(calls=calls), len(levels) - 1
    sampler(name)(model, x, levels, {"seed": 0, "cond": "c"}, seen.append, True)
    assert [said["i"] for said in seen] == list(range(n))
    assert all(set(said) == {"x", "i", "sigma", "sigma_hat", "denoised"} for said in seen)
    at = 0
    for said in seen:
        assert float(said["sigma"]) == float(levels[said["i"]])
        assert name == "edm" or float(said["sigma_hat"]) == float(said["sigma"])
        while not torch.equal(calls[at][0], said["x"]):
            at += 1
        assert float(calls[at][1][0]) == float(said["sigma_hat"])
        assert torch.equal(said["denoised"], predictions(said["x"], 1.0, said["sigma_hat"])[0])
    assert torch.equal(seen[0]["x"], x) or name == "edm"
    assert all(extra == {"seed": 0, "cond": "c"} for _, _, extra in calls)
    assert len(calls) == n if name == "unipc_2" else len(calls) > n


def test_what_a_callback_changes_counts():
    """As in k-diffusion, where the step comes after it; an error of it ends the run."""
    _, _, levels, x = of(False)

    def clear(said):
        said["denoised"].zero_()

    got = sampler("ddim")(lambda x, s: predictions(x, 1.0, s)[0], x, levels, None, clear, True)
    assert not got.any()
    with pytest.raises(InterruptedError):
        sampler()(denoiser(), x, levels, None, lambda said: (_ for _ in ()).throw(InterruptedError), True)


def test_the_bar_is_the_hosts_to_hide(capsys):
    _, _, levels, x = of(False)
    sampler()(denoiser(), x, levels, disable=False)
    assert "9/9" in capsys.readouterr().err
    sampler()(denoiser(), x, levels, disable=True)
    assert capsys.readouterr().err == ""


def test_noise_is_of_the_seed_and_the_sample():
    _, _, levels, x = of(False)
    run = sampler("dpmpp_2m_sde")
    one = run(denoiser(), x, levels, {"seed": 3}, disable=True)
    assert torch.equal(run(denoiser(), x, levels, {"seed": 3}, disable=True), one)
    assert not torch.equal(run(denoiser(), x, levels, {"seed": 4}, disable=True), one)
    for rows in ([0], [4, 2]):
        part = run(denoiser(), x[rows], levels, {"seed": 3}, disable=True, ids=rows)
        assert float((part - one[rows]).abs().max()) < 1e-12


def test_without_a_seed_noise_is_of_each_samples_x():
    """In every batch; and no global generator is looked at."""
    _, _, levels, x = of(False)
    run = sampler("dpmpp_2m_sde")
    before = torch.get_rng_state()
    drawn = run(denoiser(), x, levels, disable=True)
    assert torch.equal(run(denoiser(), x, levels, disable=True), drawn)
    assert float((run(denoiser(), x[1:], levels, disable=True) - drawn[1:]).abs().max()) < 1e-12
    assert not torch.allclose(run(denoiser(), x + 1e-3, levels, disable=True), drawn, atol=1e-2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_are_the_hosts(dtype):
    """The state is in float32 at least, within; the model has its own."""
    _, _, levels, x = of(False)
    calls = []
    got = sampler()(denoiser(calls=calls), x.to(dtype), levels.to(torch.float32), disable=True)
    assert got.dtype is dtype
    assert {y.dtype for y, _, _ in calls} == {dtype}
    exact = sampler()(denoiser(), x, levels, disable=True)
    assert float((got.double() - exact).abs().max()) < 40 * torch.finfo(dtype).eps
    x = x.to(dtype)  # nothing is rounded but the end
    got, exact = (
        sampler("ddim")(lambda x, s: x.new_full(x.shape, 0.5), y, levels[:5], None, None, True) for y in (x, x.double())
    )
    assert float((got - exact.to(dtype)).abs().max()) <= (2e-7 if dtype is torch.float32 else 0)


def test_nothing_keeps_a_graph():
    _, _, levels, x = of(False)
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    got = sampler()(lambda x, s: weight * x, x.requires_grad_(), levels, disable=True)
    assert not got.requires_grad
    assert not sampler()(lambda x, s: x if torch.is_grad_enabled() else 0 * x, x, levels, disable=True).any()


def test_short_lists():
    """None or one level: nothing is to be done. Two, the last one 0: the denoising."""
    _, _, _, x = of(False)
    for levels in ([], [12.0]):
        assert sampler()(denoiser(), x, torch.tensor(levels), disable=True) is x
    for name in ("unipc_2", "dpmpp_2m_sde", "restart", "heun"):
        got = sampler(name)(denoiser(), x, torch.tensor([12.0, 0.0]), disable=True)
        assert float((got - predictions(x, 1.0, 12.0)[0]).abs().max()) < 1e-12
    small = state(1.0, 0.001)
    got = sampler()(denoiser(), small, torch.tensor([0.001, 0.0005, 0.0], dtype=torch.float64), disable=True)
    assert float((got - small).abs().max()) < 0.01


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sampler("unipc"), ValueError, "unknown sampler 'unipc': did you mean 'unipc_"),
        (lambda x: sampler("adams"), ValueError, "unknown sampler 'adams': it has no fixed steps"),
        (lambda x: sampler()(denoiser(), x, HEAT.flip(0)), ValueError, r"sigmas must decrease strictly, to 0 or above"),
        (lambda x: sampler()(denoiser(), x, HEAT - 0.01), ValueError, r"sigmas must decrease strictly, to 0 or above"),
        (lambda x: sampler()(denoiser(), x, HEAT[[0, 1, 1, 2]]), ValueError, "sigmas must decrease strictly"),
        (lambda x: sampler()(denoiser(), x, HEAT * math.nan), ValueError, "sigmas must decrease strictly"),
        (lambda x: sampler()(denoiser(), x, HEAT[None]), ValueError, r"sigmas must be 1-d, got shape \(1, 10\)"),
        (lambda x: sampler()(denoiser(), x, HEAT[:1].squeeze()), ValueError, r"sigmas must be 1-d, got shape \(\)"),
        (lambda x: sampler(flow=True)(denoiser(), x, HEAT), ValueError, r"sigmas of a flow model must lie in \[0, 1\]"),
        (lambda x: sampler()(lambda x, s: x[:, 0], x, HEAT), ValueError, "output must be what the model says at x"),
        (lambda x: sampler()(lambda x, s: x * math.nan, x, HEAT), FloatingPointError, "returned NaN or infinite"),
        (lambda x: sampler()(denoiser(), x.long(), HEAT), TypeError, "x must be a floating tensor"),
        (lambda x: sampler()(denoiser(), x, HEAT, eta=1.0), TypeError, "sample_unipc_2.. got an unexpected.*'eta'"),
        (lambda x: sigmas("karas", 5, 0.03, 14.6), ValueError, "unknown grid 'karas': did you mean 'karras'"),
        (lambda x: sigmas("karras", 1, 0.03, 14.6), ValueError, "n must be at least 2, got 1"),
        (lambda x: sigmas("karras", 5, 14.6, 0.03), ValueError, "sigma_min must be smaller than sigma_max"),
        (lambda x: sigmas("karras", 5, 0.03, 14.6, flow=True), ValueError, r"must lie in \(0, 1\], got 0.03 to 14.6"),
        (lambda x: sigmas("karras", 5, 0.03, 1.0, flow=True, shift=0.0), ValueError, "shift must be a finite number"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(state(1.0, 12.0))
