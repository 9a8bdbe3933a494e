"""diffusers' own pipelines, of tiny networks with random weights, sample with our schedulers what ``sample`` makes."""

import warnings
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor

from sdekit import SAMPLERS, calibrate, sample
from sdekit.adapters.diffusers import Scheduler, from_diffusers

# StableDiffusion's own components that none of these calls need
NONE = {"text_encoder": None, "tokenizer": None}
BATCH, STEPS = 2, 5
MU = calculate_shift(16, 256, 4096, 0.5, 1.15)  # of Flux, for 16 tokens
REFUSED = {  # by flow models, which start where alpha = 0
    "euler_maruyama", "reverse_diffusion", "heun_sde", "pc",
}  # fmt: skip


class Host(NamedTuple):
    """A pipeline, its own scheduler, what it is called with, its noise, and the same model as (process, score)."""

    pipe: Any
    scheduler: Any
    arguments: dict[str, Any]
    latents: torch.Tensor
    sde: Any
    score: Any

    def __call__(self, scheduler, rows=slice(None), **changes):
        """The latents that the pipeline makes."""
        self.pipe.scheduler = scheduler
        arguments = {key: y[rows] if isinstance(y, torch.Tensor) else y for key, y in self.arguments.items()}
        arguments = {"latents": self.latents[rows].clone(), "num_inference_steps": STEPS, **arguments, **changes}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.pipe(output_type="latent", **arguments).images


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(network, std):
    """Random ones from a generator of its own: the constructors draw from torch's."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in network.parameters():
            w.copy_(std * torch.randn(w.shape, generator=generator))
    return network.eval()


def vae():
    two = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16, **two
    )


def stable_diffusion():
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    # Stable Diffusion 1.5's settings
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1,
        set_alpha_to_one=False,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(), unet=weights(unet, 0.05), scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **NONE,
    )  # fmt: skip
    text = randn(BATCH, 3, 8, seed=1)
    sde, score = from_diffusers(unet, scheduler)
    arguments = {"prompt_embeds": text, "guidance_scale": 1.0}
    return Host(pipe, scheduler, arguments, randn(BATCH, 4, 8, 8), sde, score.given(encoder_hidden_states=text))


def sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=weights(transformer, 0.15), scheduler=scheduler, vae=vae(), text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None, **NONE,
    )  # fmt: skip
    text, pooled = randn(BATCH, 3, 8, seed=1), randn(BATCH, 8, seed=2)
    sde, score = from_diffusers(transformer, scheduler)
    score = score.given(encoder_hidden_states=text, pooled_projections=pooled)
    arguments = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "guidance_scale": 0.0,
        "height": 16,
        "width": 16,
    }
    return Host(pipe, scheduler, arguments, randn(BATCH, 4, 8, 8), sde, score)


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8), guidance_embeds=False,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = diffusers.FluxPipeline(
        transformer=weights(transformer, 0.1),
        scheduler=scheduler,
        vae=vae(),
        text_encoder_2=None,
        tokenizer_2=None,
        **NONE,
    )
    text, pooled, latents = randn(BATCH, 3, 8, seed=1), randn(BATCH, 8, seed=2), randn(BATCH, 16, 16)
    sde, score = from_diffusers(transformer, scheduler, mu=MU)
    places = diffusers.FluxPipeline._prepare_latent_image_ids(BATCH, 4, 4, torch.device("cpu"), torch.float32)
    score = score.given(
        encoder_hidden_states=text, pooled_projections=pooled, img_ids=places, txt_ids=torch.zeros(3, 3)
    )
    arguments = {
        "prompt_embeds": text,
        "pooled_prompt_embeds": pooled,
        "guidance_scale": 1.0,
        "height": 16,
        "width": 16,
    }
    return Host(pipe, scheduler, arguments, latents, sde, score)


HOSTS = {"stable_diffusion": stable_diffusion, "sd3": sd3, "flux": flux}
_made: dict[str, Host] = {}


@pytest.fixture(params=HOSTS)
def host(request):
    """Each pipeline, made once."""
    return made(request.param)


def made(name):
    if name not in _made:
        with torch.random.fork_rng(devices=[]):
            _made[name] = HOSTS[name]()
        _made[name].pipe.set_progress_bar_config(disable=True)
    return _made[name]


def apart(a, b):
    return float((a - b).abs().max() / b.abs().max())


def generators(rows=range(BATCH)):
    return [torch.Generator().manual_seed(10 + i) for i in rows]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_in_every_pipeline(host, sampler):
    """The latents are those of a direct call; noise is each sample's own; alone it is the same image."""
    scheduler = Scheduler.from_config(host.scheduler, sampler=sampler)
    if host is not made("stable_diffusion") and sampler in REFUSED:
        with pytest.raises(ValueError, match="where alpha = 0"):
            host(scheduler)
        return
    got = host(scheduler, generator=generators())
    x_T = host.latents * scheduler.init_noise_sigma
    if host is made("stable_diffusion"):  # hands its generators on
        ids = [int(torch.randint(2**62, (), generator=generator)) for generator in generators()]
    else:
        ids = scheduler_ids(x_T)
    steps = {"steps": STEPS - 1, "seed": 0, "ids": ids}
    expected = sample(host.sde, host.score, x_T.shape, sampler, x_T=x_T, **steps)
    assert apart(got, expected) < 2e-5
    alone = host(scheduler, rows=slice(1, 2), generator=generators([1]))
    assert apart(alone, expected[1:]) < 1e-4  # to the network's own rounding


def scheduler_ids(latents):
    from sdekit.adapters.seeds import ids_of

    return ids_of(latents)


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_the_pipelines_own_schedulers_on_their_own_times(host, sampler):
    if host is made("stable_diffusion") and sampler == "euler":
        return
    assert apart(host(Scheduler.from_config(host.scheduler, sampler=sampler, grid="host")), host(host.scheduler)) < 1e-5


def test_a_calibration_is_one_line(host):
    fitted = calibrate(host.sde, host.score, host.latents.shape, nfe=3, noises=8, iterations=4, batch=4, seed=0)
    scheduler = Scheduler.from_config(host.scheduler, calibration=fitted)
    got = host(scheduler, num_inference_steps=3)
    x_T = host.latents * scheduler.init_noise_sigma
    assert apart(got, sample(host.sde, host.score, x_T.shape, fitted, x_T=x_T)) < 2e-6


IMAGE = {
    "stable_diffusion": (diffusers.StableDiffusionImg2ImgPipeline, {"requires_safety_checker": False}),
    "sd3": (diffusers.StableDiffusion3Img2ImgPipeline, {}),
}


@pytest.mark.parametrize("name", IMAGE)
@pytest.mark.parametrize("sampler", ["unipc_2", "heun", "sa_solver", "dpm_solver_3"])
def test_an_image_is_edited_from_the_middle(name, sampler):
    """SDEdit: a run from the time of the begin index, as ``sample(..., x_T=..., grid=the rest)`` makes it."""
    host = made(name)
    kind, settings = IMAGE[name]
    leave = ("image_encoder", "feature_extractor", "safety_checker") if name == "sd3" else ("image_encoder",)
    parts = {key: part for key, part in host.pipe.components.items() if key not in leave}
    pipe = kind(**parts, **settings)
    pipe.set_progress_bar_config(disable=True)
    scheduler = Scheduler.from_config(host.scheduler, sampler=sampler)
    other = Host(pipe, host.scheduler, host.arguments, host.latents, host.sde, host.score)
    arguments = {"image": host.latents, "num_inference_steps": 10, "generator": torch.Generator().manual_seed(3)}
    pipe.scheduler = scheduler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = pipe(output_type="latent", strength=0.6, **{**other.arguments, **arguments}).images
    generator = torch.Generator().manual_seed(3)
    noise = randn_tensor(host.latents.shape, generator=generator, device=torch.device("cpu"), dtype=torch.float32)
    times = scheduler._table.plan.times[4:]
    x = host.sde.perturb(host.latents, float(times[0]), noise=noise)
    seeds = {"seed": 0, "ids": scheduler_ids(x)}
    if name == "stable_diffusion":
        seeds = {"seed": int(torch.randint(2**62, (), generator=generator))}
    expected = sample(host.sde, host.score, x.shape, sampler, x_T=x, grid=times, **seeds)
    assert apart(got, expected) < 2e-6


def test_a_whole_pipeline_is_saved_and_loaded(tmp_path):
    host = made("stable_diffusion")
    scheduler = Scheduler.from_config(host.scheduler, sampler="dpmpp_3m")
    expected = host(scheduler)
    host.pipe.save_pretrained(tmp_path)
    nothing = {**NONE, "safety_checker": None, "feature_extractor": None}
    with torch.random.fork_rng(devices=[]):
        loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **nothing)
    loaded.set_progress_bar_config(disable=True)
    again = host._replace(pipe=loaded)(loaded.scheduler)
    assert apart(again, expected) < 1e-6
    assert type(loaded.scheduler) is Scheduler
