"""Samplers from alpha(T) = 0: as good as stopped before T, shifts alike, float32, calibration, bad input."""

from functools import partial

import numpy as np
import pytest
import torch

from sdekit import (
    GRIDS,
    SAMPLERS,
    CosineVP,
    GaussianMixture,
    Noise,
    RectifiedFlow,
    calibrate,
    decode,
    encode,
    load_calibration,
    log_likelihood,
    ode_sample,
    pc_sample,
    sample,
    sde_sample,
    solve,
    variational_bound,
)
from sdekit.sampling.grids import make_grid
from tests.zero import MEAN, STD, ZERO, Rounded, Stopped, exact_flow, mixture_network, moments, moved, network, table

FLOW_ROWS = [name for name, row in SAMPLERS.items() if not row.stochastic]
EXACT_NOISE = ["ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "sa_solver", "edm", "restart"]


@pytest.fixture(scope="module")
def digits(digits64):
    """Noises, and x_0 where the exact flow takes them, of the flow from T and of that stopped at .999."""
    g, mixture = digits64
    eps = np.random.default_rng(3).standard_normal((48, 64))
    ends = {}
    for sde in (RectifiedFlow(), Stopped()):
        u = sde.t_min
        y = exact_flow(g, eps * sde.T, sde.T, u, 1e-7) / (1 - u)
        ends[type(sde)] = torch.from_numpy(g.denoise(y, u / (1 - u)))
    return mixture, torch.from_numpy(eps), ends


@pytest.mark.parametrize("name", FLOW_ROWS)
def test_starting_without_signal_costs_nothing(digits, name):
    """At 5 to 20 evaluations the error from T is that of a start at .999, within 1 %, on each row's own grid.

    Sample by sample, from the same noise, and the median of that: one in a hundred lies so near to the border of two
    modes that it ends in either by rounding.
    """
    mixture, eps, ends = digits
    for nfe in (5, 10, 20):
        errors = {}
        for sde in (RectifiedFlow(), Stopped()):
            x = sample(sde, mixture.score(sde), eps.shape, name, nfe=nfe, x_T=eps * sde.T)
            errors[type(sde)] = (x - ends[type(sde)]).square().mean(1).sqrt()
        assert float((errors[RectifiedFlow] / errors[Stopped]).median()) < 1.01, nfe


def test_shift_changes_the_clock_and_nothing_else(digits64):
    """The same latents go to the same samples, and every row takes the same steps on the same noise levels."""
    mixture = digits64[1]
    plain, shifted = RectifiedFlow(), RectifiedFlow(3.0)
    x_T = torch.randn(4, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for predicts in ("flow", "x0"):
        a, b = (
            ode_sample(s, mixture_network(mixture, s, predicts), x_T.shape, x_T=x_T, rtol=1e-5, atol=1e-5)
            for s in (plain, shifted)
        )
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)  # adams knows the flow's own clock alone
    for name in FLOW_ROWS:
        u = make_grid(plain, SAMPLERS[name].grid, 10)
        t = u / (3 - 2 * u)
        a, b = (
            sample(s, mixture_network(mixture, s, "flow"), x_T.shape, name, grid=grid, x_T=x_T)
            for s, grid in ((plain, u), (shifted, t.clamp_min(shifted.t_min)))
        )
        if name in ("euler", "heun", "rk4"):  # these step in t: the same to their own error
            assert float((a - b).square().mean(1).sqrt().median()) < {"euler": 0.5, "heun": 0.1, "rk4": 0.02}[name]
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m: f"{name} {m}")  # noqa: B023


class Same:
    """One and the same noise, drawn in float32, in whichever dtype the state has."""

    def __init__(self, x):
        self.noise, self.dtype = Noise(x.float(), 0), x.dtype

    def enter(self, t, s):
        self.noise.enter(t, s)

    def normal(self):
        return self.noise.normal().to(self.dtype)


def rounding(sde, row, predicts, grid, x, denoise):
    """The largest difference between float32 and float64, over the size of the state where it started."""
    score = network(sde, predicts)
    narrow, wide = (
        solve(sde.reverse(score, row.churn), y, grid, row.rule, noise=Same(y), denoise=denoise).x
        for y in (x.float(), x.float().double())
    )
    assert narrow.dtype == torch.float32
    return float((narrow - wide).abs().max() / x.abs().max())


@pytest.mark.parametrize("name", [*FLOW_ROWS, *EXACT_NOISE])
@pytest.mark.parametrize("process", ["flow", "cosine"])
def test_float32_at_the_start(process, name):
    """From T to u = .1 within 5e-6 of float64. Gaussian data, for between modes the flow itself amplifies roundings."""
    sde, row = ZERO[process](), SAMPLERS[name]
    x = torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for predicts in ("x0", "v", "flow"):
        for steps in (8, 20):
            u = torch.linspace(1, 0.05 if name == "restart" else 0.1, steps + 1, dtype=torch.float64)
            grid = sde.inverse_half_log_snr(torch.log((1 - u) / u))
            assert rounding(sde, row, predicts, grid, x, False) < 5e-6, (predicts, steps)


@pytest.mark.parametrize("name", [*FLOW_ROWS, *EXACT_NOISE])
@pytest.mark.parametrize("process", ["flow", "cosine"])
def test_float32_at_the_end(process, name):
    """From t = .1 to t_min, and the denoising."""
    sde, row = ZERO[process](), SAMPLERS[name]
    m, v = moments(sde, 0.1)
    x = m + v**0.5 * torch.randn(16, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    lam = torch.linspace(float(sde.half_log_snr(0.1)), float(sde.half_log_snr(sde.t_min)), 21, dtype=torch.float64)
    grid = sde.inverse_half_log_snr(lam)
    for predicts in ("x0", "v", "flow"):
        assert rounding(sde, row, predicts, grid, x, True) < 5e-6, predicts


@pytest.mark.parametrize("grid", GRIDS)
def test_grids_start_at_T(grid):
    """And those of levels have no other time above sigma/alpha = 1,000."""
    for make in ZERO.values():
        sde = make()
        times = make_grid(sde, grid, 12)
        assert times[0] == sde.T
        assert times[-1] == sde.t_min
        assert bool((times.diff() < 0).all())
        if grid not in ("uniform", "quadratic"):
            assert float(sde.half_log_snr(times[1])) > -7


@pytest.mark.parametrize("name", EXACT_NOISE)
@pytest.mark.parametrize("process", ["flow_3", "cosine", "table", "rounded"])
def test_stochastic_samplers_from_T(process, name):
    """Mean and spread of Gaussian data from a network that says v, at each row's own grid."""
    sde = ZERO[process]()
    x = sample(sde, network(sde, "v"), (4000, 1), name, steps=200, seed=0, dtype=torch.float64, denoise=False)
    m, v = moments(sde, sde.t_min)
    assert float(x.mean()) == pytest.approx(m, abs=5 * (v / 4000) ** 0.5)
    assert float(x.std()) == pytest.approx(v**0.5, rel=0.08)


@pytest.mark.parametrize("process", ["flow", "flow_3", "cosine", "rounded"])
def test_calibrate(process, tmp_path):
    sde = ZERO[process]()
    mixture = GaussianMixture([[1.0, 0.2], [-1.0, 0.3]], np.stack([0.05 * np.eye(2)] * 2))
    score = mixture_network(mixture, sde, "flow" if process == "flow" else "v")
    made = calibrate(sde, score, (2, 2), nfe=5, noises=32, iterations=25, seed=0)
    assert made.error < made.start_error
    assert made.times[0] <= sde.T
    assert made.start == 1  # the draw itself, of a process that does not grow
    made.save(tmp_path / "c.json")
    loaded = load_calibration(tmp_path / "c.json")
    assert loaded == made
    x_T = torch.randn(256, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    exact = ode_sample(sde, score, x_T.shape, x_T=x_T, rtol=1e-5, atol=1e-5)
    ours, start = (
        float((sample(sde, score, x_T.shape, how, x_T=x_T, **more) - exact).square().mean(1).sqrt().mean())
        for how, more in ((loaded, {}), (made.sampler, {"nfe": 5, "grid": made.grid}))
    )
    assert ours < start
    # a calibration is of a network's score, whatever it says
    other = mixture_network(mixture, sde, "x0")
    again = sample(sde, other, x_T.shape, loaded, x_T=x_T)
    torch.testing.assert_close(again, sample(sde, score, x_T.shape, loaded, x_T=x_T), rtol=0, atol=1e-9)
    loaded.check(ZERO[process]())
    for wrong in (Stopped(), table()):
        with pytest.raises(ValueError, match="this calibration was made for another process"):
            loaded.check(wrong)
    if process != "flow":
        with pytest.raises(ValueError, match="made for another process"):
            sample(RectifiedFlow(), score, x_T.shape, loaded)


BLIND = {
    "sample": lambda sde, score, x: sample(sde, score, x.shape, "ddim", nfe=20, x_T=x),
    "ancestral": lambda sde, score, x: sample(sde, score, x.shape, "ancestral", nfe=20, x_T=x),
    "pc_sample": lambda sde, score, x: pc_sample(sde, score, x.shape, steps=20, x_T=x),
    "ode_sample": lambda sde, score, x: ode_sample(sde, score, x.shape, x_T=x),
    "ode_sample in t": lambda sde, score, x: ode_sample(sde, score, x.shape, x_T=x, method="rk23"),
    "sde_sample": lambda sde, score, x: sde_sample(sde, score, x.shape, x_T=x, seed=0, rtol=0.2, atol=0.2),
    "log_likelihood": lambda sde, score, x: log_likelihood(sde, score, x).log_prob,
    "calibrate": lambda sde, score, x: torch.tensor(
        calibrate(sde, score, x.shape, nfe=2, noises=2, iterations=1, batch=2).times
    ),
    "encode": lambda sde, score, x: encode(sde, score, x),
    "decode": lambda sde, score, x: decode(sde, score, x),
    "variational_bound": lambda sde, score, x: variational_bound(sde, score, (x > 0).long(), steps=5).nats,
    "torchdiffeq": lambda sde, score, x: solve(sde.probability_flow(score), x, [sde.T, 0.5], "torchdiffeq:dopri5").x,
}


@pytest.mark.parametrize("what", BLIND)
def test_a_blind_network_is_refused_by_name_and_the_remedies_work(what):
    """eps and score say nothing of x_0 at alpha = 0. A lower T, or another prediction, as the message has it."""
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for sde, predicts in ((RectifiedFlow(), "eps"), (CosineVP(), "score"), (Rounded(), "eps")):
        score, name = network(sde, predicts), type(sde).__name__
        with pytest.raises(ValueError, match=f"{name} has zero terminal SNR.*predicts {predicts} says nothing"):
            BLIND[what](sde, score, x)
        sde.T = 0.999  # "set T a little lower (for example T = 0.999)"
        assert bool(torch.isfinite(BLIND[what](sde, score, x)).all())
    if what not in ("pc_sample", "sde_sample"):
        sde = RectifiedFlow()
        assert bool(torch.isfinite(BLIND[what](sde, network(sde, "v"), x)).all())


NOISY = {name: partial(sample, sampler=name, steps=100) for name in ("euler_maruyama", "reverse_diffusion", "heun_sde")}


@pytest.mark.parametrize("what", [*NOISY, "pc"])
def test_the_reverse_drift_is_refused_by_name_and_the_remedy_works(what):
    for make in (RectifiedFlow, CosineVP, ZERO["rounded"]):
        sde = make()
        run = partial(NOISY.get(what, pc_sample), sde, network(sde, "v"), (4000, 1), seed=0, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"alpha = 0, at T = 1.*start a little lower.*ancestral"):
            run()
        more = {} if what == "pc" else {"steps": None}
        x = run(grid=torch.linspace(0.999, sde.t_min, 301), **more)
        assert float(x.mean()) == pytest.approx(MEAN, abs=0.06)
        assert float(x.std()) == pytest.approx(STD, abs=0.06)


def test_an_adaptive_sde_is_refused_by_name_and_the_remedies_work():
    sde = RectifiedFlow()
    with pytest.raises(ValueError, match=r"the reverse SDE of RectifiedFlow has no finite drift where alpha = 0"):
        sde_sample(sde, network(sde, "v"), (4, 1))
    assert sde_sample(sde, network(sde, "v"), (4, 1), churn=0.0).shape == (4, 1)  # the flow may
    for name in ("ancestral", "sa_solver", "dpmpp_2m_sde"):
        assert name in SAMPLERS
    sde.T = 0.999
    x = sde_sample(sde, network(sde, "v"), (2000, 1), seed=0)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.06)
    assert float(x.std()) == pytest.approx(STD, abs=0.06)


def test_the_flow_of_euler_and_its_kind_starts_at_T():
    """With churn = 0 the drift is the velocity, alpha' x_0 + sigma' eps, which is finite at T."""
    sde = CosineVP()
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for predicts in ("x0", "v", "flow"):
        drift = sde.probability_flow(network(sde, predicts)).drift(x, 1.0)
        slope = -torch.pi / 2 / 1.008 / torch.cos(torch.tensor(torch.pi / 2 * 0.008 / 1.008).double())
        torch.testing.assert_close(drift, torch.full_like(x, float(slope) * MEAN), rtol=1e-12, atol=1e-12)
        out = sample(sde, network(sde, predicts), x.shape, "rk4", steps=200, grid="uniform", x_T=x, denoise=False)
        torch.testing.assert_close(out, moved(sde, x, 1.0, sde.t_min), rtol=0, atol=1e-6)


def test_gradients_pass_the_start():
    """Of samples to x_T, against differences: nothing that is infinite at T is differentiated."""
    sde = RectifiedFlow()
    x = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("ddim", "ipndm", "deis", "dpmpp_2m", "unipc_3", "flow_3m", "heun", "dpm_solver_3"):
        draw = partial(sample, sde, network(sde, "v"), x.shape, name, nfe=9)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(draw(x_T=leaf, differentiable=True).sum(), leaf)
        quotient = (draw(x_T=x + 1e-5) - draw(x_T=x - 1e-5)) / 2e-5
        torch.testing.assert_close(gradient, quotient, rtol=1e-6, atol=1e-8)


def test_correctors_and_half_precision_from_T():
    """A corrector does nothing at T, where its step is 0; 16-bit states start there as others do."""
    sde = RectifiedFlow()
    for predictor in ("ancestral", "dpmpp_2m"):
        x = pc_sample(sde, network(sde, "v"), (4000, 1), steps=100, predictor=predictor, seed=0)
        assert float(x.mean()) == pytest.approx(MEAN, abs=0.05)
        assert float(x.std()) == pytest.approx(STD, abs=0.05)
    for name in ("dpmpp_2m", "ipndm", "flow_3m", "deis", "ddim", "dpmpp_2m_sde"):
        full, *half = (
            sample(sde, network(sde, "flow"), (2000, 4), name, steps=20, seed=0, dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        )
        assert float(full.mean()) == pytest.approx(MEAN, abs=0.03)
        assert float(full.std()) == pytest.approx(STD, abs=0.1)  # ddim's and the noisy one's own error in 20 steps
        for dtype, x in zip((torch.bfloat16, torch.float16), half, strict=True):
            assert x.dtype == dtype
            assert float(x.float().mean()) == pytest.approx(float(full.mean()), abs=0.01)
            assert float(x.float().std()) == pytest.approx(float(full.std()), abs=0.015)
