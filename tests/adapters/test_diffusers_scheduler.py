"""Our samplers as diffusers' schedulers: the same as ``sample``, and as diffusers' own where those are right."""

import copy
import inspect

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from sdekit import SAMPLERS, Sampler, as_score, calibrate, sample
from sdekit.adapters.diffusers import Scheduler
from sdekit.adapters.diffusers.conventions import convention, parts
from sdekit.sampling import AskTell
from sdekit.solvers.steppers import edm

MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)) * 0.2
X = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
HOSTS = {
    "table": diffusers.DDIMScheduler(clip_sample=False),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "edm": diffusers.EDMEulerScheduler(),
}
SAMPLERS_OF_EDM = Sampler(edm(churn=0.0))  # Karras's Heun, which diffusers' Heun is; "heun" is that on the drift in t


def network(x, t):
    """Something smooth, as a pipeline would call it: at a 0-d timestep."""
    return torch.einsum("ij,bjhw->bihw", MIX, torch.sin(x + t / 1000)) * 0.5 + 0.4 * x


def drive(scheduler, x, *args, **kwargs):
    """A pipeline's loop."""
    scheduler.set_timesteps(*args, **kwargs)
    if type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler"):
        x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5  # theirs start from x/alpha
    elif hasattr(scheduler, "init_noise_sigma"):
        x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(
            network(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x, t),
            t,
            x,
            return_dict=False,
        )[0]
    return x


def apart(a, b):
    return float((a - b).abs().max() / b.square().mean().sqrt())


def direct(table):
    """(process, score) of the network above."""
    made = table

    def call(x, t):
        told = made.clock(t.double()).float().reshape(-1, 1, 1, 1)
        if made.sigma_data is None:
            return network(x, told)
        c_in, c_skip, c_out = made.precondition(t.reshape(-1, 1, 1, 1))
        return c_skip * x + c_out * network(c_in * x, told)

    return made.sde, as_score(call, made.sde, made.predicts)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_is_what_sample_makes(host, sampler):
    scheduler = Scheduler.from_config(HOSTS[host], sampler=sampler)
    try:
        scheduler.set_timesteps(6)
    except ValueError as error:
        refused = str(error)
        assert (host, "alpha = 0" in refused) == ("flow", True)
        return
    generator = torch.Generator().manual_seed(4)
    seed = int(torch.randint(2**62, (), generator=generator)) if SAMPLERS[sampler].stochastic else 0
    x = y = X * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(4), return_dict=False)[0]
    name, settings = parts(HOSTS[host])
    sde, score = direct(convention(name, settings))
    factor = scheduler._table.factor
    expected = sample(sde, score, X.shape, sampler, x_T=y / factor, steps=5, seed=seed)
    assert apart(x, expected) < 1e-5
    assert len(scheduler.timesteps) == 5 * SAMPLERS[sampler].rule.evaluations + SAMPLERS[sampler].rule.extra + 1


# ours, theirs, what they are set to
AGREE = [
    ("ddim", diffusers.DDIMScheduler, {"clip_sample": False}),
    ("ddim", diffusers.EulerDiscreteScheduler, {}),
    ("ddim", diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, {"lower_order_final": False}),
    ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, {"lower_order_final": False, "use_karras_sigmas": True}),
    ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, {"lower_order_final": False, "use_lu_lambdas": True}),
    ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, {"lower_order_final": False, "use_exponential_sigmas": True}),
    ("karras_heun", diffusers.HeunDiscreteScheduler, {}),
    ("karras_heun", diffusers.HeunDiscreteScheduler, {"use_karras_sigmas": True}),
]


@given(
    st.sampled_from(AGREE),
    st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    st.sampled_from(["epsilon", "v_prediction", "sample"]),
    st.sampled_from(["leading", "trailing", "linspace"]),
    st.booleans(),
    st.integers(2, 25),
)
def test_diffusers_own_on_the_same_times(row, table, prediction, spacing, zero, steps):
    """Left out are combinations in which diffusers itself goes wrong.

    DDIM steps to t - N//n, which is not the next time where n does not divide N, and never is with linspace; Karras and
    lu levels of squaredcos round to the same time twice, where its DPM-Solver ends in an IndexError; Euler's and Heun's
    state is x/alpha in float32: 150 times x where the table ends, and 4,000 or more under zero terminal SNR (which
    they take for alpha^2 = 2^-24) and squaredcos, where little is left of its digits.
    """
    ours, theirs, settings = row
    if theirs is diffusers.DDIMScheduler:
        assume(spacing != "linspace" and 1000 % steps == 0)
    assume(
        not (
            table == "squaredcos_cap_v2"
            and {*settings} & {"use_karras_sigmas", "use_lu_lambdas", "use_exponential_sigmas"}
        )
    )
    takes_zero = "rescale_betas_zero_snr" in inspect.signature(theirs).parameters
    assume(not zero or (takes_zero and prediction != "epsilon"))
    wide = theirs in (diffusers.EulerDiscreteScheduler, diffusers.HeunDiscreteScheduler)
    assume(not (wide and (zero or table == "squaredcos_cap_v2")))
    host = theirs(
        beta_schedule=table, prediction_type=prediction, timestep_spacing=spacing, **settings,
        **({"rescale_betas_zero_snr": True} if zero else {}),
    )  # fmt: skip
    SAMPLERS["karras_heun"] = SAMPLERS_OF_EDM
    try:
        scheduler = Scheduler.from_config(host, sampler=ours, grid="host")
        expected = drive(host, X, steps)
        got = drive(scheduler, X, steps)
    finally:
        del SAMPLERS["karras_heun"]
    assert len(scheduler.timesteps) == len(host.timesteps)
    assert torch.allclose(scheduler.timesteps.double(), host.timesteps.double(), atol=1e-3)
    assert apart(got, expected) < (5e-4 if wide else 1e-5)


@given(st.sampled_from([1.0, 3.0, None]), st.integers(2, 20), st.sampled_from(["ddim", "euler", "heun"]), st.booleans())
def test_flow_matching_of_any_shift(shift, steps, sampler, explicit):
    theirs = (
        diffusers.FlowMatchHeunDiscreteScheduler if sampler == "heun" else diffusers.FlowMatchEulerDiscreteScheduler
    )
    assume(shift is not None or sampler != "heun")
    assume(not explicit or sampler != "heun")
    host = theirs(use_dynamic_shifting=True) if shift is None else theirs(shift=shift)
    scheduler = Scheduler.from_config(host, sampler=sampler, grid="host")
    keywords = {"mu": 0.7} if shift is None else {}
    if explicit:
        keywords["sigmas"] = np.linspace(1.0, 0.05, steps) ** 1.5
    else:
        keywords["num_inference_steps"] = steps
    # (their Heun divides by sigma = .001 in float32)
    tolerance = 1e-4 if sampler == "heun" else 1e-5
    assert apart(drive(scheduler, X, **keywords), drive(host, X, **keywords)) < tolerance
    assert torch.allclose(scheduler.timesteps, host.timesteps, atol=1e-3)
    assert torch.allclose(scheduler.sigmas[:-1], host.sigmas[:-1], atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_edm(prediction, steps):
    """The same network, preconditioned by the scheduler on both sides."""
    for sampler, theirs, settings in [
        ("ddim", diffusers.EDMEulerScheduler, {}),
        ("dpmpp_2m", diffusers.EDMDPMSolverMultistepScheduler, {"lower_order_final": False}),
    ]:
        host = theirs(prediction_type=prediction, **settings)
        scheduler = Scheduler.from_config(host, sampler=sampler, grid="host")
        got, expected = drive(scheduler, X, steps), drive(host, X, steps)
        assert float((got - expected).abs().max()) < 1e-5 * 80  # float32 at the size of x_T
        assert apart(got, expected) < 2e-4


def test_the_third_order_is_ours():
    """PITFALL 6: a factor 2 is missing in DPM-Solver++(3M)'s second difference, in diffusers too.

    Data N(0, .25) and the exact v; error of x at the lowest level of a grid even in log-SNR, at 24, 48 and 96 steps.
    """

    def exact(x, r):
        """v of the data at the level r (not at the timestep, which diffusers rounds)."""
        alpha, sigma = 1 / (1 + r**2) ** 0.5, r / (1 + r**2) ** 0.5
        return (alpha - alpha * 0.25 / (0.25 * alpha**2 + sigma**2)) / sigma * x

    def error(scheduler, steps):
        scheduler.set_timesteps(steps)
        x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
        levels = scheduler.sigmas.double().tolist()
        for t, r in zip(scheduler.timesteps[:-1], levels, strict=False):
            x = scheduler.step(exact(x, r), t, x, return_dict=False)[0].double()
        variance = [(0.25 + r**2) / (1 + r**2) for r in (levels[0], levels[-2])]
        return abs(float(x[0, 0, 0, 0]) / (variance[1] / variance[0]) ** 0.5 - 1)

    host = diffusers.DPMSolverMultistepScheduler(
        solver_order=3, lower_order_final=False, prediction_type="v_prediction", use_exponential_sigmas=True
    )
    ours, theirs = Scheduler.from_config(host, sampler="dpmpp_3m", grid="host"), copy.deepcopy(host)
    mine, others = ([error(scheduler, n) for n in (24, 48, 96)] for scheduler in (ours, theirs))
    orders = [float(np.log2(e[0] / e[2]) / 2) for e in (mine, others)]
    assert orders[0] > 2.8
    assert orders[1] < 2.4
    assert mine[2] < others[2] / 2


def test_edges_of_a_run():
    """Any begin where a step begins; a run at its end; a timestep out of turn; no set_timesteps; another run."""
    host = HOSTS["table"]
    scheduler = Scheduler.from_config(host, sampler="heun")
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(X, 0, X)
    scheduler.set_timesteps(4)
    assert scheduler.order == 2
    t = scheduler.timesteps
    scheduler.set_begin_index(3)
    with pytest.raises(
        ValueError, match="begin_index must be where a step evaluates what it begins with, 0, 2, 4, 6, got 3"
    ):
        scheduler.step(X, t[3], X)
    scheduler.set_begin_index(4)
    with pytest.raises(ValueError, match="timestep must be entry 4 of timesteps"):
        scheduler.step(X, t[0], X)
    x = X
    for told in t[4:]:
        x = scheduler.step(network(x, told), told, x).prev_sample
    with pytest.raises(ValueError, match="the run is at its end"):
        scheduler.step(X, t[-1], X)
    scheduler.set_timesteps(4)
    again = copy.deepcopy(scheduler)  # some pipelines keep one for audio
    assert torch.equal(again.timesteps, scheduler.timesteps)
    scheduler.step(X, t[0], X)


def test_the_state_is_kept_in_float32():
    """PITFALL 49: in bfloat16 each of 200 steps would be rounded to 1/256; so is the result alone."""
    scheduler = Scheduler.from_config(HOSTS["table"], sampler="ddim", grid="karras")

    def run(dtype):
        scheduler.set_timesteps(200)
        x = X.to(dtype)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.zeros_like(x), t, x, return_dict=False)[0]
        assert x.dtype is dtype
        return x.float()

    assert ((run(torch.bfloat16) / run(torch.float32) - 1).abs() < 2**-7).all()  # x_T's rounding and the result's


def test_a_state_that_the_pipeline_moves():
    """Between steps it is taken from there, as AskTell takes it, and within a step it is refused."""
    scheduler = Scheduler.from_config(HOSTS["table"], sampler="dpmpp_2m", grid="karras")
    left = torch.zeros_like(X, dtype=torch.bool)
    left[..., :2] = True
    scheduler.set_timesteps(5)
    sde, score = direct(convention(*parts(HOSTS["table"])))
    run = AskTell(sde, X, "dpmpp_2m", predicts="eps", grid="karras", steps=4)
    x = y = X
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0].masked_fill(left, 0.5)
        run.tell(score.output(y, torch.tensor(run.t)), y)
        y = run.x.masked_fill(left, 0.5)
    assert apart(x, y) < 1e-5
    heun = Scheduler.from_config(HOSTS["table"], sampler="heun")
    heun.set_timesteps(2)
    x = heun.step(network(X, 0), heun.timesteps[0], X, return_dict=False)[0] + 0.1
    x = heun.step(network(x, 0), heun.timesteps[1], x, return_dict=False)[0]
    with pytest.raises(ValueError, match="the state was changed within a step of heun"):
        heun.step(network(x, 0), heun.timesteps[2], x)


def test_a_state_that_is_changed_in_place():
    """In half precision too, where the pipeline has a copy; and within a step it is refused as well."""
    for dtype, near in ((torch.float32, 1e-6), (torch.bfloat16, 0.05)):
        scheduler, found = Scheduler.from_config(HOSTS["table"], sampler="dpmpp_2m", grid="karras"), []
        for in_place in (False, True):
            scheduler.set_timesteps(5)
            x = X.to(dtype)
            for t in scheduler.timesteps:
                x = scheduler.step(network(x.float(), t), t, x, return_dict=False)[0]
                x = x.mul_(0.5) if in_place else x * 0.5
            found.append(x.float())
        assert apart(found[1], found[0]) < near
    heun = Scheduler.from_config(HOSTS["table"], sampler="heun")
    heun.set_timesteps(2)
    x = heun.step(network(X, 0), heun.timesteps[0], X, return_dict=False)[0].mul_(0.9)
    x = heun.step(network(x, 0), heun.timesteps[1], x, return_dict=False)[0]
    with pytest.raises(ValueError, match="the state was changed within a step of heun"):
        heun.step(network(x, 0), heun.timesteps[2], x)


@pytest.mark.parametrize("where", ["cpu", "meta"])
def test_a_pipeline_that_slices_and_does_not_say_where_it_begins(where):
    """The first timestep is looked at, wherever it is (on a device once; a tensor there stands for a GPU's)."""
    scheduler = Scheduler.from_config(HOSTS["table"], sampler="unipc_2")

    class Told(torch.Tensor):
        """A timestep of another device, which can be read."""

        device = torch.device(where)

    def run(says):
        scheduler.set_timesteps(6)
        x = scheduler.add_noise(X, X.flip(0), scheduler.timesteps[3:4])
        if says:
            scheduler.set_begin_index(3)
        for t in scheduler.timesteps[3:]:
            x = scheduler.step(network(x, t), t.as_subclass(Told), x, return_dict=False)[0]
        assert scheduler.step_index == 6
        return x

    assert torch.equal(run(False), run(True))


def test_noise_added_for_something_else_does_not_move_the_start():
    scheduler = Scheduler.from_config(HOSTS["table"])
    expected = drive(scheduler, X, 6)
    scheduler.set_timesteps(6)
    scheduler.add_noise(X, X, scheduler.timesteps[2:3])
    x = X
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    assert torch.equal(x, expected)


def test_timesteps_of_a_flow_are_as_the_network_is_told_them():
    """PITFALL 47: no shift comes on top; diffusers' own then has levels of other times than it tells."""
    scheduler = Scheduler.from_config(HOSTS["flow"], sampler="ddim")
    scheduler.set_timesteps(timesteps=[1000, 600, 200])
    assert scheduler.timesteps.tolist() == [1000, 600, 200]
    assert torch.allclose(scheduler.sigmas, torch.tensor([1.0, 0.6, 0.2, 0.0]))
    scheduler.set_timesteps(3, sigmas=[1.0, 0.6, 0.3, 0.0])
    assert len(scheduler.timesteps) == 3


def test_settings_are_set_and_other_words_are_refused():
    flow = Scheduler.from_config(HOSTS["flow"], shift=5.0, sampler="ddim")
    assert flow.config.shift == 5.0
    flow.set_timesteps(sigmas=[1.0, 0.6])
    assert float(flow.sigmas[1]) == pytest.approx(3 / 3.4)
    with pytest.raises(TypeError, match="smapler: no setting of DDIMScheduler, nor one of sampler, grid, calibration"):
        Scheduler.from_config(HOSTS["table"], smapler="heun")
    _, rest = Scheduler.from_config(HOSTS["table"], return_unused_kwargs=True, other=1)
    assert rest == {"other": 1}
    euler = diffusers.EulerDiscreteScheduler.from_config(diffusers.DDIMScheduler(clip_sample=True).config)
    assert Scheduler.from_config(euler)._heeds("clip_sample") is None  # carried along, and not Euler's


def test_ddim_pipelines_pass_an_eta():
    scheduler = Scheduler.from_config(HOSTS["table"], sampler="ddim")
    scheduler.set_timesteps(2)
    scheduler.step(X, scheduler.timesteps[0], X, eta=0.0, use_clipped_model_output=None)
    with pytest.raises(ValueError, match="eta = 0.5 is of DDIM"):
        scheduler.step(X, scheduler.timesteps[1], X, eta=0.5)


def test_noise_is_a_function_of_each_samples_generator_or_latents():
    scheduler = Scheduler.from_config(HOSTS["table"], sampler="ancestral")

    def run(x, generator):
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generator, return_dict=False)[0]
        return x

    def make(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = run(X, make(1, 2))
    assert apart(run(X[1:], make(2)), both[1:]) < 1e-6
    assert apart(run(X[1:], make(1)), both[1:]) > 1e-2
    alone = run(X[1:], None)
    assert apart(alone, run(X, None)[1:]) < 1e-6
    assert apart(alone, run(X[1:] + 1e-3, None)) > 1e-2
    with pytest.raises(ValueError, match="generator must be one, or one for each of the 2 samples, got 3"):
        run(X, make(1, 2, 3))


def test_clipping_is_of_x_0_and_of_the_eps_that_goes_with_it():
    host = diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=0.7)
    scheduler = Scheduler.from_config(host, sampler="ddim", grid="host")
    host.set_timesteps(10)
    x = X
    for t in host.timesteps:
        x = host.step(network(x, t), t, x, use_clipped_model_output=True, return_dict=False)[0]
    assert apart(drive(scheduler, X, 10), x) < 1e-5
    with pytest.raises(ValueError, match="thresholding of DDIMScheduler is not known"):
        Scheduler.from_config(diffusers.DDIMScheduler(thresholding=True))


def test_add_noise_is_that_of_the_scheduler_that_was_replaced():
    host = diffusers.DDPMScheduler()
    scheduler = Scheduler.from_config(host)
    scheduler.set_timesteps(10)
    noise, told = torch.ones_like(X), torch.tensor([999, 3])
    assert apart(scheduler.add_noise(X, noise, told), host.add_noise(X, noise, told)) < 1e-6
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = Scheduler.from_config(flow, grid="host")
    flow.set_timesteps(10)
    scheduler.set_timesteps(10)
    for k in (0, 6):
        flow.set_begin_index(k)
        expected = flow.scale_noise(X, flow.timesteps[k : k + 1], noise)
        assert apart(scheduler.scale_noise(X, scheduler.timesteps[k : k + 1], noise), expected) < 1e-6


def test_saved_and_loaded(tmp_path):
    host = HOSTS["table"]
    sde, score = direct(convention(*parts(host)))
    fitted = calibrate(sde, score, (2, 4, 5, 5), nfe=3, noises=8, iterations=1, batch=4, seed=0)
    for keywords in ({"sampler": "dpmpp_3m", "grid": "karras"}, {"calibration": fitted}):
        scheduler = Scheduler.from_config(host, **keywords)
        scheduler.save_pretrained(tmp_path)
        loaded = Scheduler.from_pretrained(tmp_path)
        assert torch.equal(drive(loaded, X, 3), drive(scheduler, X, 3))
        assert loaded.config.beta_schedule == "linear"
    host.save_pretrained(tmp_path)
    other = Scheduler.from_pretrained(tmp_path, sampler="ddim", grid="host")
    assert apart(drive(other, X, 5), drive(host, X, 5)) < 1e-5
    assert Scheduler.from_config(loaded.config, sampler="heun", grid="karras").order == 2
    assert len(other) == 1000


def test_what_is_wrong_is_said():
    host, flow = HOSTS["table"], HOSTS["flow"]
    alone = {key: value for key, value in host.config.items() if not key.startswith("_")}

    euler = diffusers.EulerDiscreteScheduler()
    wrong = [
        (lambda: Scheduler(host, sampler="foo"), "unknown sampler 'foo'"),
        (lambda: Scheduler(host, grid="foo"), "unknown grid 'foo'"),
        (lambda: Scheduler(alone), "give the scheduler itself"),
        (lambda: Scheduler(diffusers.LCMScheduler()), "LCMScheduler tells no process"),
        (lambda: Scheduler(host).set_timesteps(), "num_inference_steps, timesteps or sigmas"),
        (lambda: Scheduler(host).set_timesteps(1), "at least 2, a step and the denoising"),
        (lambda: Scheduler(host).set_timesteps(5, timesteps=[9, 5, 4, 3, 1]), "DDIMScheduler takes no timesteps"),
        (lambda: Scheduler(flow).set_timesteps(3, sigmas=[0.2, 0.5, 0.9]), "sigmas must decrease, from noise to data"),
        (lambda: Scheduler(flow).set_timesteps(4, sigmas=[0.9, 0.5, 0.2]), "as many as num_inference_steps = 4, got 3"),
        (
            lambda: Scheduler(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)).set_timesteps(5),
            "mu must be given",
        ),
        (
            lambda: Scheduler(euler, sampler="edm").set_timesteps(timesteps=[500, 300, 100]),
            "adds noise before it evaluates",
        ),
        (
            lambda: Scheduler(host, sampler="edm", grid="inner_karras").set_timesteps(8),
            "adds noise before it evaluates",
        ),
        (
            lambda: Scheduler(flow, sampler="ancestral", grid="inner_karras").set_timesteps(8),
            "times noise, and pipelines",
        ),
        (lambda: Scheduler(euler).set_timesteps(sigmas=[500.0, 5.0, 1.0, 0.0]), "sigmas must be levels of the model"),
        (lambda: Scheduler(HOSTS["edm"]).set_timesteps(sigmas=[50.0, 5.0]), "EDMEulerScheduler takes no sigmas"),
        (lambda: Scheduler(euler).set_timesteps(3, sigmas=[9.0, 5.0, 1.0]), "its sigmas end with a 0"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="a calibration is a sampler of its own: leave sampler out; got 'heun'"):
        Scheduler(host, sampler="heun", calibration={})
    with pytest.raises(TypeError, match="calibration must be what calibrate or load_calibration returns"):
        Scheduler(host, calibration="six.json")
