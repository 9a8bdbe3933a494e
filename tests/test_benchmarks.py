"""The benchmarks run, count what they say, and write what they name."""

import csv
import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import image_data
import nfe_vs_fid
import overhead

from sdekit import SAMPLERS


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(nfe_vs_fid, "QUICK", {(5, 10, 20): ("dpmpp_2m", "heun"), (5,): ("dpmpp_2m, clipped",)})


def test_main_job_end_to_end(quick, tmp_path, capsys):
    nfe_vs_fid.main(["--samples", "64", "--seeds", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "Fréchet distance (digits features); 64 samples per entry" in printed
    assert "FID" not in printed
    rows = list(csv.DictReader((tmp_path / "nfe_vs_fid_digits.csv").open(encoding="utf-8")))
    assert len(rows) == 2 * (1 + 2 * 3 + 1 + 2)  # seeds x (floor, two in three columns, a clipped one, adaptive)
    for row in rows:
        if row["sampler"].startswith("dpmpp_2m"):
            assert row["nfe"] == row["budget"]
        if row["sampler"] == "heun":  # an odd number: two a step, and the denoising
            assert int(row["nfe"]) == int(row["budget"]) - 1 + int(row["budget"]) % 2
    assert float(rows[0]["distance"]) > 0
    assert (tmp_path / "nfe_vs_fid_digits.png").stat().st_size > 20_000


def test_a_sampler_that_fails_costs_its_own_entries_only(quick, tmp_path, monkeypatch, capsys):
    problem = image_data.digits(None)
    score = problem.score

    def broken(x, t):
        return score(x, t) * (float("nan") if len(x) == 64 and float(t.max()) < 0.5 else 1.0)

    broken.device = None
    problem.score = broken
    monkeypatch.setattr(image_data, "digits", lambda checkpoint: problem)
    nfe_vs_fid.main(["--samples", "64", "--seeds", "1", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "nfe_vs_fid_digits.csv").open(encoding="utf-8")))
    assert {row["distance"] for row in rows if row["sampler"] != "real"} == {"nan"}
    assert "±" not in capsys.readouterr().out.split("| evaluations")[1]  # one seed tells nothing of the spread


def test_halves_are_disjoint_and_the_real_images():
    problem = image_data.digits(None)
    a, b = nfe_vs_fid.halves(problem, 3)
    assert (len(a), len(b)) == (898, 899)
    both = torch.cat([a, b]).sum(1).sort().values
    torch.testing.assert_close(both, problem.extractor(problem.images).sum(1).sort().values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "5000"], "--samples must be at most 898"),
        (["--samples", "10"], "--samples at least 64"),
        (["--dataset", "fashion-mnist"], "needs --data"),
        (["--data", "/nowhere"], "--data is for --dataset fashion-mnist"),
        (["--inception-weights", "/nowhere"], "--inception-weights: no file /nowhere"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        nfe_vs_fid.parse(arguments)
    assert message in capsys.readouterr().err


def test_idx_files(tmp_path):
    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)
    content = struct.pack(">BBBBIII", 0, 0, 8, 3, 2, 3, 4) + images.tobytes()
    (tmp_path / "plain").write_bytes(content)
    (tmp_path / "packed.gz").write_bytes(gzip.compress(content))
    np.testing.assert_array_equal(image_data.read_idx(tmp_path, "plain"), images)
    np.testing.assert_array_equal(image_data.read_idx(tmp_path, "packed"), images)
    (tmp_path / "short").write_bytes(content[:-1])
    for name in ("short", "missing"):
        with pytest.raises(SystemExit, match="--data"):
            image_data.read_idx(tmp_path, name)


def test_overhead_is_per_evaluation_and_counts_draws(monkeypatch, tmp_path, capsys):
    rows = {"ddim": ("1", "0.0"), "ancestral": ("1", "1.0"), "heun_sde": ("2", "0.5"), "restart": ("2", "0.0")}
    loops, base = [], overhead.bare
    monkeypatch.setattr(overhead, "bare", lambda d, n, draws: loops.append((n, draws)) or base(d, n, draws))
    monkeypatch.setattr(overhead, "SHAPES", ((1, 4),))
    monkeypatch.setattr(overhead, "SAMPLERS", {name: SAMPLERS[name] for name in rows})
    monkeypatch.setattr(sys, "argv", ["overhead.py", "--turns", "1", "--out", str(tmp_path)])
    overhead.main()
    with (tmp_path / "overhead.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    columns = ["sampler", "evaluations a step", "draws an evaluation", "ratio (1, 4)", "microseconds (1, 4)"]
    assert list(found[0]) == columns
    assert {row["sampler"]: (row[columns[1]], row[columns[2]]) for row in found} == rows
    assert loops == [(300, 0), (300, 300), (600, 300), (612, 2)]  # restart goes back twice, once a run
    assert all(float(row["ratio (1, 4)"]) > 0 for row in found)
    assert "heun_sde" in capsys.readouterr().out


def test_the_bare_loop_draws_as_often_as_it_is_told(monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: drawn.append(0) or randn(*args, **kwargs))
    for evaluations, draws in ((4, 0), (4, 4), (6, 3), (7, 2), (2, 6)):
        drawn.clear()
        overhead.bare(torch.ones(1), evaluations, draws)()
        assert len(drawn) == draws


def test_the_ratio_is_the_median_over_turns(monkeypatch):
    taken = iter([9.0, 9.0, 1.0, 2.0, 2.0, 10.0, 4.0, 12.0])  # base and run in turns, the first pair unmeasured
    monkeypatch.setattr(overhead, "seconds", lambda run: next(taken))
    assert overhead.ratio(lambda: None, lambda: None, 3) == (3.0, 10.0)
