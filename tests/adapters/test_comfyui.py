"""ComfyUI's nodes, beside a stand-in of what ComfyUI does with them, written from what its nodes are promised."""

import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sdekit import SAMPLERS, VESDE, as_score, calibrate, sample
from sdekit.adapters import comfyui
from sdekit.adapters.k_diffusion import calibration_sigmas
from sdekit.adapters.k_diffusion import sampler as plain
from sdekit.processes.gaussian import HeatODE, RectifiedFlow
from tests.adapters.exact import EVENT, MIXTURE, B, predictions


class EPS:
    """x = x_0 + sigma eps, and at the highest level noise times sqrt(1 + sigma^2)."""

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return latent + noise * ((1 + sigma**2) ** 0.5 if max_denoise else sigma)

    def inverse_noise_scaling(self, sigma, latent):
        return latent


class CONST:
    """x = (1 - sigma) x_0 + sigma eps."""

    def noise_scaling(self, sigma, noise, latent, max_denoise=False):
        return sigma * noise + (1 - sigma) * latent

    def inverse_noise_scaling(self, sigma, latent):
        return latent / (1 - sigma)


class Discrete:
    """Levels of a table."""

    sigma_min, sigma_max = torch.tensor(0.029), torch.tensor(14.6)


class DiscreteFlow:
    """Times 0 ... 1000, shifted."""

    def __init__(self, shift=3.0):
        self.shift = shift
        self.sigma_min, self.sigma_max = self.sigma(torch.tensor(1.0)), self.sigma(torch.tensor(1000.0))

    def timestep(self, sigma):
        return 1000 * sigma

    def sigma(self, timestep):
        u = timestep / 1000
        return self.shift * u / (1 + (self.shift - 1) * u)


class Flux:
    """Times 0 ... 1, shifted by mu."""

    def __init__(self, mu=1.15):
        self.mu = mu
        self.sigma_min, self.sigma_max = self.sigma(torch.tensor(1e-4)), self.sigma(torch.tensor(1.0))

    def timestep(self, sigma):
        return sigma

    def sigma(self, timestep):
        return math.exp(self.mu) / (math.exp(self.mu) + (1 / timestep - 1))


class KSAMPLER:
    """What SamplerCustom calls."""

    def __init__(self, sampler_function, extra_options=None):
        self.sampler_function, self.extra_options = sampler_function, extra_options or {}

    def sample(self, guider, sigmas, extra_args, callback, noise, latent, disable_pbar=False):
        extra_args["denoise_mask"] = None
        sampling, total = guider.inner_model.model_sampling, len(sigmas) - 1
        highest = math.isclose(float(sampling.sigma_max), float(sigmas[0]), rel_tol=1e-5)
        x = sampling.noise_scaling(sigmas[0], noise, latent, highest or sigmas[0] > sampling.sigma_max)

        def model_k(x, sigma, denoise_mask=None, model_options=None, seed=None):
            assert seed == extra_args["seed"]
            return guider(x, sigma)

        model_k.inner_model = guider
        x = self.sampler_function(
            model_k,
            x,
            sigmas,
            extra_args=extra_args,
            callback=lambda said: callback(said["i"], said["denoised"], said["x"], total),
            disable=disable_pbar,
            **self.extra_options,
        )
        return sampling.inverse_noise_scaling(sigmas[-1], x)


class Model:
    """A MODEL that says the mixture's E[x_0|x], and its guider."""

    def __init__(self, kind, times):
        self.model_sampling = type("ModelSampling", (type(times), kind), {"__init__": lambda self: None})()
        vars(self.model_sampling).update(vars(times))
        self.flow, self.asked = kind is CONST, []
        self.inner_model, self.model_patcher = SimpleNamespace(model_sampling=self.model_sampling), self

    def get_model_object(self, name):
        return getattr(self, name)

    def __call__(self, x, sigma):
        self.asked.append(float(sigma[0]))
        return predictions(x.double(), 1 - sigma if self.flow else torch.ones_like(sigma), sigma)[0].to(x)


@pytest.fixture(autouse=True)
def here(monkeypatch):
    samplers = ModuleType("comfy.samplers")
    samplers.KSAMPLER = KSAMPLER
    monkeypatch.setitem(sys.modules, "comfy", ModuleType("comfy"))
    monkeypatch.setitem(sys.modules, "comfy.samplers", samplers)


def node(name, **inputs):
    """What a node puts out, made and called as ComfyUI does."""
    kind = comfyui.NODE_CLASS_MAPPINGS[name]
    needed = kind.INPUT_TYPES()["required"]
    assert set(inputs) == set(needed)
    out = getattr(kind(), kind.FUNCTION)(**inputs)
    assert len(out) == len(kind.RETURN_TYPES)
    return out


def queue(model, sampler, sigmas, seed=0, latent=None, dtype=torch.float64):
    """SamplerCustom: noise of the seed, the sampler, and the steps that were shown."""
    noise = torch.randn(B, *EVENT, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    shown = []
    latent = torch.zeros_like(noise) if latent is None else latent
    args = {"model_options": {}, "seed": seed}
    x = sampler.sample(model, sigmas, args, lambda i, *rest: shown.append((i, rest[-1])), noise, latent, True)
    return x, noise, shown


KINDS = {
    "eps": (lambda: Model(EPS, Discrete())),
    "flow": (lambda: Model(CONST, DiscreteFlow())),
    "flux": (lambda: Model(CONST, Flux())),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["unipc_2", "dpmpp_2m", "heun", "dpmpp_2m_sde"])
def test_a_graph_draws_what_sample_draws(name, kind):
    """Sampler and grid node by the host's loop: the process's own samples of the same first state."""
    model = KINDS[kind]()
    (sampler,), (levels,) = (
        node("SdekitSampler", sampler=name, bridge=False),
        node("SdekitGrid", model=model, grid="karras", steps=8, denoise=1.0),
    )
    assert (len(levels), float(levels[-1])) == (9, 0.0)
    assert float(levels[0]) == pytest.approx(float(model.model_sampling.sigma_max), rel=1e-6)
    assert float(levels[-2]) == pytest.approx(float(model.model_sampling.sigma_min), rel=1e-4)
    x, noise, shown = queue(model, sampler, levels, seed=4)
    times = levels[:-1].double()
    sde = RectifiedFlow() if model.flow else HeatODE(T=float(times[0]))
    sde.t_min = min(sde.t_min, float(times[-1]))
    first = noise if model.flow else noise * (1 + levels[0] ** 2) ** 0.5
    score = as_score(lambda x, s: model(x, s), sde, "x0")
    expected = sample(sde, score, x.shape, name, grid=times, x_T=first, seed=4)
    assert float((x - expected).abs().max()) < 1e-10
    assert shown == [(i, 8) for i in range(8)]


@pytest.mark.parametrize("kind", KINDS)
def test_named_grids_of_flows_follow_the_models_shift(kind):
    model = KINDS[kind]()
    (levels,) = node("SdekitGrid", model=model, grid="uniform", steps=6, denoise=1.0)
    if kind == "eps":
        assert levels[:-1].diff().std() < 1e-5
    else:
        low = 1e-3 if kind == "flow" else 1e-4
        u = torch.linspace(1.0, low, 6)
        of = model.model_sampling
        torch.testing.assert_close(levels[:-1], of.sigma(of.timestep(u)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_few_steps_begin_analytically(kind):
    """The default grid with the default sampler: as many evaluations as steps; near to many steps."""
    model, many = KINDS[kind](), KINDS[kind]()
    (sampler,) = node("SdekitSampler", sampler="unipc_2", bridge=True)
    (levels,) = node("SdekitGrid", model=model, grid="inner_cubic", steps=5, denoise=1.0)
    x, _, _ = queue(model, sampler, levels)
    assert len(model.asked) == 5
    (fine,) = node("SdekitGrid", model=many, grid="karras", steps=200, denoise=1.0)
    exact, _, _ = queue(many, node("SdekitSampler", sampler="unipc_3", bridge=False)[0], fine)
    assert float((x - exact).square().mean().sqrt()) < 0.1


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_an_image_is_edited_from_part_way(kind):
    """``denoise`` as ComfyUI's own schedulers have it: the last steps of so many more."""
    model = KINDS[kind]()
    (whole,) = node("SdekitGrid", model=model, grid="karras", steps=20, denoise=1.0)
    (part,) = node("SdekitGrid", model=model, grid="karras", steps=5, denoise=0.25)
    assert torch.equal(part, whole[-6:])
    (sampler,) = node("SdekitSampler", sampler="unipc_2", bridge=True)
    image = MIXTURE.sample(B, seed=1, dtype=torch.float64).reshape(B, *EVENT)
    x, _, shown = queue(model, sampler, part, latent=image)
    assert len(shown) == 5
    # nearer to the image than another one is
    assert float((x - image).square().mean()) < float((x - image.roll(1, 0)).square().mean())
    assert node("SdekitGrid", model=model, grid="karras", steps=5, denoise=0.0)[0].shape == (0,)
    assert queue(model, sampler, torch.zeros(1), latent=image)[0] is not None
    one = node("SdekitGrid", model=model, grid="karras", steps=1, denoise=1.0)[0]
    assert one.tolist() == pytest.approx([float(model.model_sampling.sigma_max), 0.0])


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_list_may_be_cut_in_two(kind):
    """Down to a level with one sampler, on from there with another without noise, as SplitSigmas has it."""
    model = KINDS[kind]()
    (sampler,) = node("SdekitSampler", sampler="ddim", bridge=False)
    (levels,) = node("SdekitGrid", model=model, grid="karras", steps=8, denoise=1.0)
    levels = levels.double()
    whole, noise, _ = queue(model, sampler, levels)
    half, _, _ = queue(model, sampler, levels[:5])
    sampling, seed = model.model_sampling, {"seed": 0, "model_options": {}}
    rest = sampler.sample(model, levels[4:], seed, lambda *said: None, torch.zeros_like(noise), half, True)
    assert float((rest - whole).abs().max()) < 1e-10
    assert float(sampling.sigma_max) > 0


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_a_calibration_is_a_sampler_with_its_sigmas(kind, tmp_path):
    model, ve = KINDS[kind](), VESDE(0.03, 14.6)
    score = MIXTURE.score(ve)
    fit = calibrate(
        ve, lambda x, t: score(x.flatten(1), t).reshape(x.shape), (1, *EVENT), nfe=4, noises=8, iterations=3, seed=0,
        dtype=torch.float64,
    )  # fmt: skip
    fit.save(tmp_path / "fit.json")
    path = str(tmp_path / "fit.json")
    sampler, levels = node("SdekitCalibration", model=model, path=path)
    assert torch.equal(levels, calibration_sigmas(fit, flow=model.flow))
    x, noise, shown = queue(model, sampler, levels, seed=2)
    first = model.model_sampling.noise_scaling(levels[0], noise, torch.zeros_like(noise), levels[0] >= 14.6)
    expected = plain(fit, flow=model.flow)(lambda x, s, seed: model(x, s), first, levels, {"seed": 2}, disable=True)
    assert torch.equal(x, expected)
    assert shown == [(i, 4) for i in range(4)]
    kind = comfyui.NODE_CLASS_MAPPINGS["SdekitCalibration"]
    assert kind.IS_CHANGED(model=model, path=path) == (tmp_path / "fit.json").stat().st_mtime
    (tmp_path / "fit.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="is not a calibration of sdekit"):
        node("SdekitCalibration", model=model, path=path)


def test_a_line_or_a_link_in_custom_nodes_is_enough(tmp_path):
    """ComfyUI imports a file by its path and takes the two mappings."""
    line, link = tmp_path / "sdekit_nodes.py", tmp_path / "comfyui.py"
    line.write_text("from sdekit.adapters.comfyui import *\n", encoding="utf-8")
    link.symlink_to(comfyui.__file__)
    for path in (line, link):
        spec = importlib.util.spec_from_file_location(path.stem + "_of_the_user", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS)
        assert len(module.NODE_CLASS_MAPPINGS) == 3
    for kind in comfyui.NODE_CLASS_MAPPINGS.values():
        assert callable(getattr(kind, kind.FUNCTION))
        assert kind.CATEGORY
    offered = comfyui.NODE_CLASS_MAPPINGS["SdekitSampler"].INPUT_TYPES()["required"]["sampler"]
    assert offered[0] == list(SAMPLERS)
    assert offered[1]["default"] in offered[0]


def test_without_comfyui_a_node_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy.samplers", None)
    with pytest.raises(ImportError, match="run within ComfyUI, which is not here"):
        node("SdekitSampler", sampler="unipc_2", bridge=True)
    with pytest.raises(ValueError, match="unknown sampler 'uni'"):
        plain("uni")
