"""What hosts of k-diffusion's functions are given besides: grids, an analytic first step, calibrations, flow models."""

from dataclasses import replace

import pytest
import torch

from sdekit import SAMPLERS, VPSDE, as_score, calibrate, sample
from sdekit.adapters.k_diffusion import calibration_sigmas, noise_scale, sampler, sigmas
from sdekit.processes.gaussian import HeatODE, RectifiedFlow
from tests.adapters.exact import EVENT, MIXTURE, B, denoiser, predictions, state
from tests.adapters.test_k_diffusion_out import FLOW, HEAT


@pytest.mark.parametrize(("flow", "shift"), [(False, 1.0), (True, 1.0), (True, 3.0)])
@pytest.mark.parametrize("name", ["unipc_2", "ipndm", "ddim"])
def test_inner_grids_begin_analytically(name, flow, shift):
    """As ``sample`` on that grid by name, in as many evaluations; without the bridge it is one step more."""
    n, (low, high) = 5, (0.002, 1.0) if flow else (0.03, 80.0)
    grid = SAMPLERS[name].grid
    levels = sigmas(grid, n, low, high, flow=flow, shift=shift)
    assert levels.dtype is torch.float32
    assert len(levels) == n + 2
    assert abs(float(levels[0]) - high) < 1e-6 * high
    sde = RectifiedFlow(shift) if flow else HeatODE(T=high)
    sde.t_min = low / (shift - (shift - 1) * low) if flow else low
    x, calls, seen = state(0.0 if flow else 1.0, high), [], []
    got = sampler(name, flow=flow, bridge=True)(denoiser(flow, calls), x, levels, None, seen.append, True)
    assert len(calls) == n
    assert [said["i"] for said in seen] == list(range(1, n + 1))
    if not flow or shift == 1:
        steps, score = n - 1, as_score(denoiser(flow), sde, "x0")
        expected = sample(sde, score, x.shape, name, steps=steps, grid=grid, x_T=x)
        assert float((got - expected).abs().max()) < 1e-5
    plain = sampler(name, flow=flow)(denoiser(flow, calls), x, levels, disable=True)
    assert len(calls) == 2 * n + 1
    assert 1e-6 < float((got - plain).abs().max()) < 0.2


def test_only_a_step_far_above_is_a_bridge():
    """A list whose second level is none that an inner grid begins at is taken as it is."""
    levels = sigmas("inner_cubic", 12, 0.03, 14.6)
    assert len(levels) == 13  # these begin at the highest level themselves
    for listed in (levels, HEAT.float()):
        x = state(1.0, float(listed[0]))
        whole, plain = (sampler(bridge=b)(denoiser(), x, listed, disable=True) for b in (True, False))
        assert torch.equal(whole, plain)


@pytest.mark.parametrize("grid", ["karras", "log_snr", "uniform"])
def test_grids_end_at_the_hosts_levels(grid):
    levels = sigmas(grid, 7, 0.03, 14.6)
    assert len(levels) == 8
    assert levels[[0, -2, -1]].tolist() == pytest.approx([14.6, 0.03, 0.0], rel=1e-6)
    if grid == "karras":  # their get_sigmas_karras, written out
        ramp = torch.linspace(14.6 ** (1 / 7), 0.03 ** (1 / 7), 7, dtype=torch.float64) ** 7
        torch.testing.assert_close(levels[:-1].double(), ramp, rtol=1e-6, atol=0)
    flow = sigmas("uniform", 5, 0.2, 1.0, flow=True)
    torch.testing.assert_close(flow, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]), rtol=1e-6, atol=1e-7)
    u = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    shifted = sigmas("uniform", 5, 0.6 / 1.4, 1.0, flow=True, shift=3.0)
    torch.testing.assert_close(shifted, 3 * u / (1 + 2 * u), rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def fitted():
    sde = VPSDE()
    score = MIXTURE.score(sde)
    options = {"nfe": 4, "noises": 8, "iterations": 3, "batch": 4, "seed": 0, "dtype": torch.float64}
    return sde, score, calibrate(sde, lambda x, t: score(x.flatten(1), t).reshape(x.shape), (1, *EVENT), **options)


@pytest.mark.parametrize("flow", [False, True], ids=["heat", "flow"])
def test_a_calibration_serves_states_of_another_process(fitted, flow):
    """Fitted to VP, it makes of a host's x what it makes of the same x in its own frame."""
    sde, score, calibration = fitted
    levels = calibration_sigmas(calibration, flow=flow)
    assert len(levels) == calibration.nfe + 1
    x_T = sde.prior_sample((B, *EVENT), seed=3, dtype=torch.float64)
    alpha, sigma = calibration.alpha[0], calibration.sigma[0]
    x = x_T * sigma / calibration.prior_std / (alpha + sigma if flow else alpha)
    expected = sample(sde, lambda x, t: score(x.flatten(1), t).reshape(x.shape), x.shape, calibration, x_T=x_T)
    calls = []
    got = sampler(calibration, flow=flow)(denoiser(flow, calls), x, levels, disable=True)
    assert float((got - expected).abs().max()) < 1e-11
    assert len(calls) == calibration.nfe
    for wrong in (levels[1:], levels * 1.01, torch.cat([levels, levels.new_zeros(0)])[:-1]):
        with pytest.raises(ValueError, match="a calibration has its own 4 evaluations: sigmas must be calibration_si"):
            sampler(calibration, flow=flow)(denoiser(flow), x, wrong.clamp(max=1) if flow else wrong, disable=True)


def test_a_calibration_from_pure_noise_is_for_flows(fitted):
    _, _, calibration = fitted
    nothing = replace(calibration, alpha=[0.0, *calibration.alpha[1:]])
    with pytest.raises(ValueError, match="begins where alpha = 0"):
        calibration_sigmas(nothing)
    assert float(calibration_sigmas(nothing, flow=True)[0]) == 1.0


def comfy(kind, **attributes):
    """A model as ComfyUI hands it to samplers, of a class of model_sampling that is made for it."""
    made = type("ModelSampling", (type("Discrete", (), {}), type(kind, (), attributes)), {})()
    patcher = type("Patcher", (), {"get_model_object": lambda self, name: {"model_sampling": made}[name]})()
    inner = type("Guider", (), {"model_patcher": patcher})()
    flow, scale = kind == "CONST", attributes.get("noise_scale", 1.0)

    class Model:
        inner_model = inner

        def __call__(self, x, sigma, **extra_args):
            return predictions(x, 1 - sigma if flow else torch.ones_like(sigma), scale * sigma)[0]

    return Model()


def test_comfyuis_models_say_what_their_state_is():
    x, levels = state(0.02, 0.98), FLOW
    for name in ("unipc_2", "ancestral"):
        for kind, flow in (("CONST", True), ("EPS", False), ("V_PREDICTION", False)):
            model = comfy(kind)
            assert noise_scale(model.inner_model.model_patcher.get_model_object("model_sampling")) == float(flow)
            asked = sampler(name)(model, x, levels, {"seed": 1}, disable=True)
            told = sampler(name, flow=flow)(model, x, levels, {"seed": 1}, disable=True)
            assert torch.equal(asked, told)
    assert not torch.equal(told, sampler(name, flow=True)(model, x, levels, {"seed": 1}, disable=True))


@pytest.mark.parametrize("name", ["unipc_2", "ancestral", "flow_3m"])
def test_a_flows_noise_may_have_another_size(name, fitted):
    """x = (1 - sigma) x_0 + c sigma eps: the process of these alpha and sigma."""
    c = 0.7
    model, sde = comfy("CONST", noise_scale=c), RectifiedFlow()
    sde.sigma = lambda t: c * t
    x, score = state(1 - float(FLOW[0]), c * float(FLOW[0])), as_score(model, sde, "x0")
    expected = sample(sde, score, x.shape, name, grid=FLOW[:-1], x_T=x, seed=2)
    assert float((sampler(name)(model, x, FLOW, {"seed": 2}, disable=True) - expected).abs().max()) < 1e-11
    with pytest.raises(ValueError, match="a calibration is for noise of unit size, and this model's has 0.7"):
        sampler(fitted[2])(model, x, FLOW, disable=True)
