"""Time grids: they cover [T, t_min] exactly, strictly decreasing, for every process and step count."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdekit import GRIDS, VPSDE, HeatODE, sample, solve
from sdekit.sampling.grids import by_levels, karras, make_grid
from tests.conftest import PROCESSES, gaussian_score


@given(name=st.sampled_from(sorted(PROCESSES)), grid=st.sampled_from(sorted(GRIDS)), n=st.integers(1, 300))
def test_grids_cover_the_interval(name, grid, n):
    """PITFALLS 5, 9: ends exact, no repeated last time, steps that sum to t_min - T, n = 1, 2, 3 included."""
    sde = PROCESSES[name]()
    times = make_grid(sde, grid, n)
    assert times.dtype == torch.float64
    assert times.shape == (n + 1,)
    assert float(times[0]) == sde.T
    assert float(times[-1]) == sde.t_min
    assert (times.diff() < 0).all()


def test_grids_are_what_their_names_say(sde):
    t = make_grid(sde, "log_snr", 8)
    torch.testing.assert_close(sde.half_log_snr(t).diff().diff(), torch.zeros(7).double(), rtol=0, atol=1e-6)
    level = (make_grid(sde, "karras", 8), sde.sigma, sde.alpha)
    root = (level[1](level[0]) / level[2](level[0])) ** (1 / 7)
    torch.testing.assert_close(root.diff().diff(), torch.zeros(7).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(make_grid(sde, "quadratic", 8).sqrt().diff().diff(), torch.zeros(7).double(),
                               rtol=0, atol=1e-12)  # fmt: skip
    assert (karras(sde, 8, rho=3.0)[1:-1] != karras(sde, 8)[1:-1]).all()


def test_a_callable_and_a_tensor_are_grids():
    sde = VPSDE()
    assert make_grid(sde, lambda sde, n: torch.linspace(sde.T, 0.1, n + 1), 4).tolist() == pytest.approx(
        [1.0, 0.775, 0.55, 0.325, 0.1]
    )
    assert make_grid(sde, torch.tensor([0.9, 0.5, 0.2])).tolist() == pytest.approx([0.9, 0.5, 0.2])


@pytest.mark.parametrize(
    ("grid", "steps", "message"),
    [
        ("karas", 5, "unknown grid 'karas': did you mean 'karras'"),
        ("karras", 0, "steps must be at least 1, got 0"),
        ("karras", 2.5, "steps must be a whole number, got 2.5"),
        (torch.tensor([0.1, 0.5, 1.0]), None, r"grid must decrease strictly.*flip"),
        (torch.tensor([1.0, 0.5, 0.5]), None, "decrease strictly"),
        (torch.tensor([1.5, 0.5]), None, r"grid must lie in \[t_min, T\] = \[1e-05, 1\], got \[0.5, 1.5\]"),
        (
            torch.tensor([1.0, 0.0]),
            None,
            "grid must lie in .*the step to 0 is the denoising, denoise=True: leave the 0 out",
        ),
        (torch.tensor([1.0]), None, "at least two times"),
        (torch.tensor([1.0, 0.5]), 3, "grid has 1 steps but 3 are asked for"),
        ({"a": 1}, None, "grid must be a name"),
    ],
)
def test_bad_input_is_named(grid, steps, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_grid(VPSDE(), grid, steps)
    with pytest.raises(ValueError, match="rho must be"):
        karras(HeatODE(), 5, rho=0)


def test_a_grid_that_goes_on_to_0_ends_with_the_denoising():
    """PITFALL 37: the step to 0 is x_0; other programs write it into their lists."""
    sde, x = VPSDE(), VPSDE().prior_sample((3, 2), seed=0)
    times = torch.tensor([1.0, 0.6, 0.3, 0.01])
    on = torch.cat([times, torch.zeros(1)])
    for grid in (on, on.tolist()):
        for name in ("ddim", "dpmpp_2m", "heun"):
            with_zero = sample(sde, gaussian_score(sde, 0.5), x.shape, name, grid=grid, x_T=x)
            assert torch.equal(with_zero, sample(sde, gaussian_score(sde, 0.5), x.shape, name, grid=times, x_T=x))
        # and DDIM's step to 0 is that step
        with pytest.raises(ValueError, match="the step to 0 is the denoising, denoise=True: leave the 0 out"):
            sample(sde, gaussian_score(sde, 0.5), x.shape, "ddim", grid=grid, x_T=x, denoise=False)
    with pytest.raises(ValueError, match="the step to 0 is the denoising, denoise=True: leave the 0 out"):
        solve(sde.probability_flow(gaussian_score(sde)), x, on, "ddim")
    levels = [80.0, 20.0, 5.0, 1.0, 0.1]
    heat = HeatODE()
    assert torch.equal(by_levels([*levels, 0.0])(heat, 6), by_levels(levels)(heat, 6))


def test_a_named_grid_is_made_once_and_is_nobody_s_to_change():
    sde = VPSDE()
    first = make_grid(sde, "vp_cubic", 7)
    want = first.clone()
    first.zero_()
    assert torch.equal(make_grid(sde, "vp_cubic", 7), want)
