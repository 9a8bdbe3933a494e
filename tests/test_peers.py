"""The comparison with other libraries counts what it says, and says what is missing."""

import csv
import functools
import importlib.util
import itertools
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import adaptive as adaptive_benchmark
import order
import peer_loops
import peer_samplers
import peers

from sdekit import SAMPLERS, GaussianMixture, HeatODE
from tests import oracle

ROWS = ("dpmpp_2m", "heun", "rk4")


@pytest.fixture
def few(monkeypatch):
    """A few rows of ours, torchdiffeq's (a dependency of the library), no adaptive ones, and few samples."""
    monkeypatch.setattr(peers, "deterministic", lambda: list(ROWS))
    monkeypatch.setattr(order, "deterministic", lambda: ["ddim", "dpmpp_2m"])
    fixed = {name: peer for name, peer in peer_samplers.FIXED.items() if peer.package == "torchdiffeq"}
    monkeypatch.setattr(peer_samplers, "FIXED", fixed)
    monkeypatch.setattr(peers, "adaptive", functools.partial(peers.adaptive, tolerances=(1e-2,)))
    monkeypatch.setattr(peers, "SIZES", {"grid2": 16})
    monkeypatch.setattr(peers, "calibrated", lambda problem, nfe: None)


@pytest.fixture
def not_installed(monkeypatch):
    """As if diffusers, torchode and azula were not there, whatever is."""
    find = importlib.util.find_spec
    gone = ("diffusers", "torchode", "azula")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest)
    )  # fmt: skip


def test_the_comparison_end_to_end(few, not_installed, tmp_path, capsys):
    peers.main(["--nfe", "5", "10", "--no-overhead", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in ("diffusers", "torchode"):
        assert f'{name} is not installed, its rows are missing: pip install -e ".[peers]"' in printed
    assert "azula is not installed, its rows are missing: pip install --no-deps azula==0.11.1" in printed
    assert "k-diffusion has no rows" in printed
    assert "| **best of peers** |" in printed
    assert "| **best of peers, on all four grids** |" in printed
    assert "ours / same name" not in printed  # those peers are diffusers'
    assert "| **best of ours on fixed grids** |" in printed
    assert "adaptive, rk45: " in printed
    rows = list(csv.DictReader((tmp_path / "peers.csv").open(encoding="utf-8")))
    fixed = [row for row in rows if row["budget"] != "0"]
    assert {row["sampler"] for row in fixed} == {*ROWS, *(f"torchdiffeq {m}" for m in ("euler", "midpoint", "rk4"))}
    assert all(0 < int(row["nfe"]) <= int(row["budget"]) for row in fixed)
    used = {(row["sampler"], row["budget"]): int(row["nfe"]) for row in fixed}
    assert used["dpmpp_2m", "10"] == used["torchdiffeq euler", "10"] == 10
    assert used["heun", "10"] == used["torchdiffeq midpoint", "10"] == 9  # an odd number: two a step, the denoising
    assert {row["grid"] for row in fixed if row["side"] == "ours"} == set(peers.OUR_GRIDS)
    assert {row["grid"] for row in fixed if row["side"] == "peers"} == set(peers.PEER_GRIDS)
    assert (tmp_path / "peers_grid2.png").stat().st_size > 20_000


def test_an_entry_is_what_an_independent_run_gives():
    """Euler on Karras's levels in NumPy, from the protocol's noises, and a peer's on the same."""
    problem = peers.make_problem("grid2", 8)
    mixture, n = oracle.grid25(), 6
    start = 80 * torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1234))
    levels = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)] + [0.0]
    y = start.numpy()
    for s, after in itertools.pairwise(levels):
        y = y + (after - s) * (y - mixture.denoise(y, s)) / s
    expected = oracle.error(y, mixture.flow(start.numpy(), 80.0, 0.0, rtol=1e-10, atol=1e-11))
    for entry in (
        peers.ours(problem, "ddim", "karras", n), peers.peer(problem, "torchdiffeq euler", "karras", n)
    ):  # fmt: skip
        assert entry.error == pytest.approx(expected, rel=1e-6)
        assert (entry.nfe, entry.nfe_per_sample) == (n, n)


def test_budgets():
    problem = peers.make_problem("grid2", 4)
    assert peers.ours(problem, "rk4", "karras", 4) is None  # a step and the denoising take five
    assert peers.peer(problem, "torchdiffeq rk4", "karras", 4) is None

    def greedy(score):
        for _ in range(3):
            x = score(problem.start, torch.tensor(1.0, dtype=torch.float64))
        return x

    with pytest.raises(RuntimeError, match="greedy took 3 evaluations in the column of 2"):
        peers.counted_run(problem, "ours", "greedy", "karras", 2, greedy)


def test_breakdowns_never_win():
    def entry(side, sampler, budget, error):
        return peers.Entry("p", side, sampler, "karras", budget, budget, budget, error)

    entries = [entry("ours", "a", 5, math.nan), entry("ours", "b", 5, 0.5), entry("peers", "c", 5, 0.25)]
    text = peers.table(entries, [5])
    assert "| **best of ours on fixed grids** | | 0.5 |" in text
    assert text.index("sdekit b") < text.index("sdekit a")
    assert "calibrated: not measured" in text


def test_tables_by_hand():
    """The best grid of a row, the best of a column, peers on our grids apart, ratios on one grid."""

    def entry(side, sampler, grid, budget, error):
        return peers.Entry("p", side, sampler, grid, budget, budget, budget, error)

    entries = [
        entry("ours", "a", "karras", 5, 0.5),
        entry("ours", "a", "karras", 10, 0.1),
        entry("ours", "a", "vp_cubic", 5, 0.3),
        entry("ours", "a", "vp_cubic", 10, 0.12),
        entry("peers", "b", "karras", 5, 0.4),
        entry("peers", "b", "karras", 10, 0.2),
        entry("peers on our grids", "b", "vp_cubic", 5, 0.35),
    ]
    text = peers.table(entries, [5, 10])
    assert "| sdekit a | vp_cubic | 0.3 | 0.12 |" in text
    assert "| b | karras | 0.4 | 0.2 |" in text
    assert "| **best of peers** | | 0.4 | 0.2 |" in text
    assert "| **best of peers, on all four grids** | | 0.35 | 0.2 |" in text
    assert "| **best of ours on fixed grids** | | 0.3 | 0.1 |" in text
    assert "best of ours on fixed grids: 5: a vp_cubic; 10: a karras" in text
    ratios = peers.same_name_table(entries, [5, 10, 20], [("a", "b")], ["karras"])
    assert "| a / b | karras | **1.250** | 0.500 |  |" in ratios


def test_same_names_are_rows():
    assert set(peers.SAME_NAME) <= set(peers.deterministic())
    assert set(peers.SAME_NAME.values()) <= set(peer_samplers.FIXED)
    assert not {"edm", "restart", "ancestral", "pc"} & set(peers.deterministic())


def test_calibrations_are_for_the_budget_and_counted(monkeypatch):
    problem, asked = peers.make_problem("grid2", 4), []

    def calibrate(sde, score, shape, *, nfe, seed):
        asked.append((tuple(shape), nfe, seed))
        score(problem.start, torch.tensor(1.0, dtype=torch.float64))  # its own evaluations are not the sampler's
        return "ddim"

    monkeypatch.setattr(peers, "calibrate", calibrate)
    monkeypatch.setattr(peers, "sample", lambda sde, score, shape, calibration, x_T: score(x_T, torch.tensor(1.0)))
    entry = peers.calibrated(problem, 5)
    assert (asked, entry.side, entry.budget, entry.nfe) == ([((4, 2), 5, 0)], "calibrated", 5, 1)
    assert peers.calibrated(problem, peers.CALIBRATED_UP_TO + 1) is None


@functools.cache
def eight():
    """The problem of several tests."""
    return peers.make_problem("grid2", 8)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of LMS
@pytest.mark.parametrize("name", peer_samplers.FIXED)
def test_peers_converge_and_end_at_zero(name):
    """Those that are installed: the levels reach them, so many steps come near to the flow, within the count."""
    chosen = peer_samplers.FIXED[name]
    if not peer_samplers.available(chosen.package):
        pytest.skip(f"{chosen.package} is not installed")
    problem = eight()
    few_steps, many = (peers.peer(problem, name, "karras", nfe) for nfe in (21, 161))
    assert (many.nfe - 1) % chosen.evaluations == 0
    assert many.error < 0.5 * few_steps.error
    assert many.error < 0.03


@pytest.mark.parametrize("steps", [1, 4])
def test_azulas_first_orders_are_its_ddim(steps):
    """Why they have no rows; and its samplers get the levels, the last positive one too."""
    if not peer_samplers.available("azula"):
        pytest.skip("azula is not installed")
    problem = eight()
    levels = torch.tensor([80.0, 7.0, 1.0, 0.2, 0.002][-steps - 1 :], dtype=torch.float64)
    for end in (levels, torch.cat([levels, torch.zeros(1, dtype=torch.float64)])):
        seen = []

        def denoise(y, s, seen=seen):
            seen.append(float(s))
            return peers.denoiser(problem.score)(y, s)

        expected = peer_samplers.FIXED["azula DDIM"].run(denoise, problem.start, end)
        assert seen == pytest.approx(end[:-1].tolist(), rel=1e-12)
        others = [(f"{name}Sampler", {"order": 1}) for name in ("zAB", "vAB", "zEAB", "xEAB")]
        for name, settings in [
            *others,
            ("EulerSampler", {}),
            ("ItoSampler", {"eta": 0.0}),
            ("PCSampler", {"delta": 0.0}),
        ]:
            out = peer_samplers.azula(name, **settings)(denoise, problem.start, end)
            torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


def test_order_of_three_rows(few, not_installed, monkeypatch, tmp_path, capsys):
    midpoint = "torchdiffeq midpoint"
    monkeypatch.setattr(peer_samplers, "FIXED", {midpoint: peer_samplers.FIXED[midpoint]})
    order.main(["--steps", "40", "80", "160", "--samples", "16", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "diffusers is not installed" in printed
    rows = {row["sampler"]: row for row in csv.DictReader((tmp_path / "order.csv").open(encoding="utf-8"))}
    for name, expected in (("sdekit ddim", 1), ("sdekit dpmpp_2m", 2), (midpoint, 2)):
        assert int(rows[name]["claimed"]) == expected
        assert float(rows[name]["measured"]) == pytest.approx(expected, abs=0.15)
    assert int(rows["sdekit ddim"]["claimed"]) == SAMPLERS["ddim"].rule.order


def test_order_marks_what_stays_below_its_claim():
    assert order.measured((10, 20, 40), [1.0, 0.25, 0.0625]) == pytest.approx(2)
    assert math.isnan(order.measured((10, 20), [1.0, math.inf]))
    found = [{"sampler": "a", "claimed": 2, "measured": 1.8, "below": True, "error at 10": 1.0}]
    assert "| a | 2 | 1.80 | below the claim by more than 0.1 | 1 |" in order.table(found)


def test_the_peers_denoiser_is_the_oracles():
    mixture = oracle.grid25()
    counted = peers.Counted(GaussianMixture(mixture.m, mixture.covs, mixture.w).score(HeatODE()))
    y, levels = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), [0.1, 0.5, 2.0]
    each = peers.denoiser(counted)(y, torch.tensor(levels, dtype=torch.float64))
    for row, s in enumerate(levels):
        np.testing.assert_allclose(
            each[row : row + 1].numpy(), mixture.denoise(y[row : row + 1].numpy(), s), atol=1e-10
        )
    assert (counted.calls, counted.rows) == (1, 3)


def test_overhead_of_a_peer(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peers.overhead, "SHAPES", ((1, 4),))
    monkeypatch.setattr(peers.overhead, "SAMPLERS", {"ddim": SAMPLERS["ddim"]})
    loops = ["torchdiffeq euler", "torchsde euler"]
    loops += [name for name in peer_loops.AZULA_STEPS if peer_samplers.available("azula")]
    monkeypatch.setattr(peer_loops, "PEER_LOOPS", loops)
    with torch.random.fork_rng(devices=[]):  # azula's DDIM draws
        peers.main(["--quick", "--only-overhead", "--out", str(tmp_path)])
    assert not (tmp_path / "peers.csv").exists()
    rows = list(csv.DictReader((tmp_path / "peers_overhead.csv").open(encoding="utf-8")))
    assert [row["sampler"] for row in rows] == ["sdekit ddim", *loops]
    for row in rows:  # a difference of times: its sign is the machine's
        assert math.isfinite(float(row["worst (1, 4)"]))
        assert bool(row["eps (1, 4)"]) == (row["sampler"] == "sdekit ddim")
    printed = capsys.readouterr().out
    assert "| draws an evaluation | eps (1, 4) | worst (1, 4) | sums alone (1, 4) |\n" in printed
    assert "| torchsde euler | 1 | 1.0 |  | " in printed


def test_evaluations_at_an_error_are_read_off_the_curve():
    points = [peers.Entry("p", "ours", "m", "", 0, n, float(n), e) for n, e in ((10, 1e-1), (20, 1e-2), (40, 1e-4))]
    assert adaptive_benchmark.needed(points, 1e-2) == pytest.approx(20)
    assert adaptive_benchmark.needed(points, 1e-3) == pytest.approx(30)
    assert adaptive_benchmark.needed(points, 1.0) == 10
    assert adaptive_benchmark.needed(points, 1e-5) == math.inf


def test_the_adaptive_benchmark_end_to_end(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peer_samplers, "ADAPTIVE", {k: v for k, v in peer_samplers.ADAPTIVE.items() if "diffeq" in k})
    monkeypatch.setattr(adaptive_benchmark, "METHODS", ("adams", "rk45"))
    adaptive_benchmark.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for row in ("| adams | ", "| rk45 | ", "| torchdiffeq dopri5 | ", "| k-diffusion dpm_adaptive | 40 | 65 | > 93 |"):
        assert row in printed
    ratios = re.search(r"fewest of the peers / adams\*\* \| ([\d.]+) \| ([\d.]+)", printed)
    assert min(map(float, ratios.groups())) >= 2
    assert re.search(r"adams \| \d+ \| \d+ \| \d+ \| \d+ \| [1-9]\d?%", printed)
    assert (tmp_path / "adaptive.png").stat().st_size > 20_000
