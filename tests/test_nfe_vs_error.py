"""On trained networks: what the tables promise, of the results kept and of the code as it is."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import networks
import nfe_vs_error
import noisy_rows
from page_data import rows

from sdekit import SAMPLERS, CosineVP, RectifiedFlow, sample


@pytest.fixture(scope="module")
def bench():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nfe_vs_error, "REFERENCE", 300)
        return {name: nfe_vs_error.Bench(name, 12) for name in ("eps_linear", "flow_shift")}


def test_the_kept_results_hold_what_is_promised():
    """The default is never behind the best of diffusers, and no row of ours is worse than 1.5 times ddim."""
    found = rows("nfe_vs_error")
    assert {row["problem"] for row in found} >= set(networks.BENCH)
    for problem in networks.BENCH:
        here = [row for row in found if row["problem"] == problem]
        theirs = nfe_vs_error.best_of(here, "diffusers")
        ours = {(row["sampler"], row["nfe"]): row["error"] for row in here if row["side"] == "sdekit"}
        assert {name for name, _ in ours} == set(nfe_vs_error.OURS)
        for nfe in nfe_vs_error.COLUMNS:
            assert ours[nfe_vs_error.DEFAULT, nfe] < theirs[nfe][0]
            assert all(ours[name, nfe] < 1.5 * ours["ddim", nfe] for name in nfe_vs_error.OURS)


def test_no_row_is_thrown_off_by_a_network(bench):
    """PITFALL: grids from T on threw 16 rows of 16 off, heun and dpm_solver_2 by a factor of 30."""
    for one in bench.values():
        for nfe in (5, 8):
            errors = {name: one.ours(name, nfe) for name in nfe_vs_error.OURS}
            assert max(errors.values()) < 1.6 * errors["ddim"], errors
    one = bench["eps_linear"]
    for name in ("dpm_solver_2", "heun", "flow_3m"):  # the test sees the old start
        x = sample(one.sde, one.score, one.x_T.shape, name, nfe=5, x_T=one.x_T, grid="vp_quadratic")
        assert nfe_vs_error.difference(x, one.exact) > 3 * one.ours("ddim", 5)


def test_the_bench_is_what_it_says():
    for name, kind in networks.BENCH.items():
        sde, score = networks.load(name, 20)
        assert type(sde) is type(kind.process())
        assert score.predicts == kind.predicts
        x = sde.prior_sample((20, *networks.EVENT), seed=0)
        once = sample(sde, score, x.shape, nfe=4, x_T=x)
        assert torch.isfinite(once).all()
        # labels go with their samples
        other = networks.load(name, 20)[1].given(torch.arange(20).flip(0) % 10) if kind.conditional else score
        same = torch.equal(sample(sde, other, x.shape, nfe=4, x_T=x), once)
        assert same is not kind.conditional
    assert float(CosineVP().alpha(1.0)) == float(RectifiedFlow(3.0).alpha(1.0)) == 0.0


def test_a_network_is_trained_and_kept(tmp_path, capsys, monkeypatch):
    networks.main(["--only", "x0_edm", "--steps", "3", "--out", str(tmp_path)])
    networks.main(["--only", "x0_edm", "--steps", "3", "--out", str(tmp_path)])
    assert "there already" in capsys.readouterr().out
    monkeypatch.setattr(networks, "FOLDER", tmp_path)
    networks.load.cache_clear()
    sde, score = networks.load("x0_edm", 2)
    assert score.network.sigma_data == 0.5
    assert sde.T == 80.0
    networks.load.cache_clear()


def test_the_job_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nfe_vs_error, "COLUMNS", (5, 6))
    monkeypatch.setattr(nfe_vs_error, "REFERENCE", 100)
    monkeypatch.setattr(nfe_vs_error, "OURS", ["ddim", "unipc_2"])
    monkeypatch.setattr(nfe_vs_error, "available", lambda package: False)
    monkeypatch.setattr(nfe_vs_error, "sensitivities", lambda: rows("sensitivity")[:30])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    nfe_vs_error.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "**unipc_2**" in printed
    found = list(csv.DictReader((tmp_path / "nfe_vs_error.csv").open(encoding="utf-8")))
    assert len(found) == 2 * 2 * 2
    assert all(0 < float(row["error"]) < 0.5 for row in found)
    assert (tmp_path / "nfe_vs_error.png").stat().st_size > 20_000


def test_every_scheduler_of_diffusers_runs(bench):
    """Where it is installed; not one of them stands in the table for want of a run."""
    pytest.importorskip("diffusers")
    for one in bench.values():
        for name in nfe_vs_error.diffusers_rows.names(one.score.predicts):
            assert math.isfinite(one.theirs(name, 5)), name


def test_every_row_is_in_one_of_the_tables():
    assert {*nfe_vs_error.OURS} | {*noisy_rows.OURS} == {*SAMPLERS}
    assert not {*nfe_vs_error.OURS} & {*noisy_rows.OURS}


def test_rows_with_noise_on_networks(tmp_path, capsys, monkeypatch):
    """One that runs and one that has no first step where there is no signal."""
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    noisy_rows.main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| euler_maruyama | refused |" in printed
    found = list(csv.DictReader((tmp_path / "noisy_rows.csv").open(encoding="utf-8")))
    assert [row["sampler"] for row in found] == ["limit", "sa_solver", "euler_maruyama"]
    assert 0 < float(found[1]["distance"]) < 4
