"""diffusers' configs and networks as (process, score)."""

import importlib
import pickle
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from sdekit import calibrate, log_likelihood, ode_sample, round_trip_error, sample
from sdekit.adapters.diffusers import conventions, from_diffusers, load_folder

UNET = Path(__file__).parents[2] / "benchmarks" / "networks" / "diffusers_unet"


class Told(torch.nn.Module):
    """A network that remembers what it was called with."""

    def __init__(self, factor=1.0, channels=1):
        super().__init__()
        self.factor, self.channels, self.calls = factor, channels, []

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True):
        self.calls.append((sample, timestep, encoder_hidden_states, return_dict))
        out = torch.cat([self.factor * sample] * self.channels, dim=1)
        return {"sample": out} if return_dict else (out,)


def named(name, **base):
    return type(name, (Told,), {})(**base)


TABLES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": torch.linspace(0.001, 0.1, 50).tolist(), "num_train_timesteps": 50},
}


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_table_is_alphas_cumprod_and_the_network_is_told_its_index(table, prediction, zero):
    """PITFALL 50: i - 1 at t = i/N; and the table in float32 is what the network was trained with."""
    config = {"prediction_type": prediction, "rescale_betas_zero_snr": zero, **TABLES[table]}
    scheduler = diffusers.DDIMScheduler(**config)
    network = Told()
    sde, score = from_diffusers(network, scheduler)
    n = len(scheduler.alphas_cumprod)
    t = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert torch.allclose(sde.alpha(t).square(), scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)
    x = torch.randn(n, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    score.output(x, t)
    assert torch.equal(network.calls[0][1], torch.arange(n, dtype=torch.float32))
    # the score by the formulas of the prediction types
    k = 3 * n // 4
    x, time = x[:1].double(), t[k]
    alpha, sigma = sde.alpha(time), sde.sigma(time)
    out = network.factor * x
    eps = {"epsilon": out, "v_prediction": alpha * out + sigma * x, "sample": (x - alpha * out) / sigma}[prediction]
    assert torch.allclose(score(x, float(time)), -eps / sigma, rtol=1e-12)
    if zero:
        assert float(sde.alpha(1.0)) == 0


@pytest.mark.parametrize("kind", ["SD3Transformer2DModel", "FluxTransformer2DModel"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_flow_is_told_what_its_pipeline_tells_it(kind, shift):
    network = named(kind)
    sde, score = from_diffusers(network, diffusers.FlowMatchEulerDiscreteScheduler(shift=shift))
    u = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    t = u / (shift - (shift - 1) * u)
    assert torch.allclose(sde.alpha(t), 1 - u, atol=1e-15)
    assert torch.allclose(sde.sigma(t), u)
    assert sde.unit_level == shift
    score.output(torch.ones(3, 1, 2, 2), t)
    assert torch.allclose(network.calls[0][1].double(), u * (1000 if kind.startswith("SD3") else 1), atol=1e-4)
    x = torch.full((1, 1, 2, 2), 2.0, dtype=torch.float64)
    x_0 = x - 0.3 * x  # velocity eps - x_0 = x here, and x = x_0 + u (eps - x_0)
    assert torch.allclose(sde.denoise(x, float(t[1]), score), x_0, rtol=1e-6)


def test_dynamic_shifts_are_those_of_the_scheduler():
    for kind, settings in [("exponential", {}), ("linear", {"time_shift_type": "linear"})]:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **settings)
        sde, _ = from_diffusers(named("FluxTransformer2DModel"), scheduler, mu=0.8)
        t = torch.linspace(0.1, 1, 7, dtype=torch.float64)
        assert torch.allclose(sde.sigma(t), scheduler.time_shift(0.8, 1.0, t), rtol=1e-12), kind


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_is_preconditioned_as_its_scheduler_does(prediction):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=prediction, sigma_data=0.7, sigma_max=50.0)
    network = Told(0.3)
    sde, score = from_diffusers(network, scheduler)
    assert (sde.T, sde.t_min) == (50.0, 0.002)
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    x_0 = score.output(x, sigma)
    column = sigma.reshape(-1, 1, 1, 1)
    inside = scheduler.precondition_inputs(x, column)
    assert torch.allclose(x_0, scheduler.precondition_outputs(x, 0.3 * inside, column), rtol=1e-12)
    assert torch.allclose(network.calls[0][1], scheduler.precondition_noise(sigma), rtol=1e-12)


def test_zero_signal_is_of_the_rescaled_table_whatever_the_class():
    """Heun's has no such setting and carries it along; the model is the one that was trained on the rescaled betas."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012}  # what is a default of the one class is not carried along
    trained = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", **betas)
    sde, _ = from_diffusers(Told(), diffusers.HeunDiscreteScheduler.from_config(trained.config))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(sde.alpha(t).square(), trained.alphas_cumprod.double(), atol=1e-12)


def test_edm_is_preconditioned_in_float32_around_a_network_in_bfloat16():
    class Half(Told):
        def __init__(self):
            super().__init__(0.3)
            self.weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))

    network = Half()
    _, score = from_diffusers(network, diffusers.EDMEulerScheduler())
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    d = score.output(x, torch.tensor(0.01, dtype=torch.float64))
    assert network.calls[0][0].dtype is torch.bfloat16
    exact = diffusers.EDMEulerScheduler().precondition_outputs(x, 0.6 * x, torch.tensor(0.01))
    assert float((d - exact).abs().max()) < 3e-4  # x in bfloat16 would be off by 1/256


def test_conditions_the_first_half_of_learned_variance_and_pickles():
    network = Told(2.0, channels=2)
    _, score = from_diffusers(network, diffusers.DDPMScheduler(variance_type="learned_range"))
    x, text = torch.ones(2, 1, 2, 2), torch.arange(2.0)
    assert torch.equal(score.given(encoder_hidden_states=text).output(x, torch.tensor(1.0)), 2 * x)
    _, _, given, as_dict = network.calls[0]
    assert torch.equal(given, text)
    assert as_dict is False
    with pytest.raises(TypeError, match="go by name"):
        score.given(text).output(x, torch.tensor(1.0))
    again = pickle.loads(pickle.dumps(score))
    assert torch.equal(again(x, 0.5), score(x, 0.5))
    _, flow = from_diffusers(named("UNet2DModel"), diffusers.FlowMatchEulerDiscreteScheduler())
    assert flow.output(x, torch.tensor(0.5)).shape == x.shape


@pytest.fixture(scope="module")
def trained():
    """The trained U-Net of the benchmarks, as diffusers loads it, and its scheduler."""
    unet = diffusers.UNet2DModel.from_pretrained(UNET / "unet", torch_dtype=torch.float32)
    return unet.eval(), diffusers.DDPMScheduler.from_pretrained(UNET / "scheduler")


def test_a_trained_network_of_diffusers_needs_no_other_word(trained):
    """Samples as diffusers' own loop draws them, adams, calibration, likelihood, encoding."""
    sde, score = from_diffusers(*trained)
    shape = (4, 1, 8, 8)
    x_T = sde.prior_sample(shape, seed=0)
    flow = ode_sample(sde, score, shape, x_T=x_T, rtol=1e-3, atol=1e-3)
    assert flow.abs().max() < 1.5  # digits lie in [-1, 1]
    assert float((sample(sde, score, shape, nfe=20, x_T=x_T) - flow).square().mean().sqrt()) < 0.05
    fitted = calibrate(sde, score, shape, nfe=5, noises=8, iterations=3, batch=4, seed=0)
    assert fitted.error <= fitted.start_error
    assert round_trip_error(sde, score, flow, rtol=1e-3, atol=1e-3).max() < 0.05
    likelihood = log_likelihood(sde, score, flow, divergence="hutchinson", seed=0, rtol=1e-2, atol=1e-2)
    assert torch.isfinite(likelihood.log_prob).all()


def test_a_folder_is_the_network_and_the_scheduler_in_it(tmp_path):
    """As a pipeline writes it; what it loads says what its parts say, in evaluation mode."""
    sde, score = load_folder(UNET)
    with torch.random.fork_rng():
        network = diffusers.UNet2DModel.from_pretrained(UNET / "unet", low_cpu_mem_usage=False).eval()
    theirs, same = from_diffusers(network, diffusers.DDPMScheduler.from_pretrained(UNET / "scheduler"))
    assert torch.equal(sde.betas, theirs.betas)
    assert score.event == (1, 8, 8)
    assert not score.network.model.training
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    assert torch.equal(score(x, t), same(x, t))

    settings = {"in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 8),
                "norm_num_groups": 4, "down_block_types": ("DownBlock2D",) * 2,
                "up_block_types": ("UpBlock2D",) * 2}  # fmt: skip
    for size, event in (((4, 8), (4, 4, 8)), (None, None)):
        with torch.random.fork_rng():  # the first weights are random
            diffusers.UNet2DModel(sample_size=size, **settings).save_pretrained(tmp_path / "unet")
        diffusers.DDIMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "scheduler")
        _, score = load_folder(tmp_path)
        assert (score.predicts, score.event) == ("v", event)

    (tmp_path / "unet" / "config.json").write_text('{"_class_name": "DDIMScheduler"}', encoding="utf-8")
    with pytest.raises(ValueError, match="class 'DDIMScheduler', which is no network of diffusers"):
        load_folder(tmp_path)
    for path in (tmp_path / "nowhere", UNET / "unet"):
        with pytest.raises(FileNotFoundError, match="must hold unet/ or transformer/, and scheduler/"):
            load_folder(path)


def test_without_diffusers_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in [name for name in sys.modules if name.startswith("sdekit.adapters.diffusers")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        ImportError, match=r"^sdekit.adapters.diffusers needs diffusers: pip install 'sdekit\[diffusers\]'$"
    ):
        importlib.import_module("sdekit.adapters.diffusers")


def test_every_class_of_diffusers_is_known_or_refused_by_name():
    known = (*conventions.TABLES, *conventions.FLOWS, *conventions.EDMS)
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")):
        config = {"_class_name": name}
        if name in known:
            assert conventions.parts(config) == (name, {})
        else:
            with pytest.raises(ValueError, match=f"scheduler {name} tells no process"):
                conventions.parts(config)
    assert all(conventions.takes(name) for name in known)


def test_what_is_not_known_is_refused_by_name():
    network, ddim = Told(), "DDIMScheduler"
    refused = [
        ({"_class_name": "VQDiffusionScheduler"}, "VQDiffusionScheduler tells no process"),
        (diffusers.LCMScheduler(), "LCMScheduler tells no process"),
        ({"_class_name": "CMStochasticIterativeScheduler"}, "CMStochasticIterativeScheduler tells no process"),
        ({"_class_name": ddim, "beta_schedule": "other"}, "beta_schedule 'other'"),
        ({"_class_name": ddim, "prediction_type": "noise"}, "prediction_type 'noise' of DDIMScheduler is not known"),
        ({"shift": 1.0}, "does not say of which class it is"),
        (diffusers.TCDScheduler().config, "give the scheduler itself"),
        (diffusers.EulerDiscreteScheduler(timestep_type="continuous"), "timestep_type 'continuous'"),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), "invert_sigmas"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "mu must be given"),
        (diffusers.FlowMatchEulerDiscreteScheduler(), "what a Told takes for the time of a flow is not known"),
    ]
    for scheduler, message in refused:
        with pytest.raises(ValueError, match=message):
            from_diffusers(network, scheduler)
    with pytest.raises(TypeError, match="scheduler must be one of diffusers' or its config, got int"):
        from_diffusers(network, 3)
    with pytest.raises(TypeError, match="model must be a network"):
        from_diffusers("unet", diffusers.DDIMScheduler())
    _, score = from_diffusers(network, diffusers.FlowMatchEulerDiscreteScheduler(), time=lambda told: 1 - told / 1000)
    score.output(torch.ones(1, 1, 2, 2), torch.tensor(0.25))
    assert network.calls[-1][1].item() == 0.75
