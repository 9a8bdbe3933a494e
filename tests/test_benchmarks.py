"""The benchmarks run, count what they say, and write what they name."""

import csv
import sys
from pathlib import Path

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


def test_data_that_cannot_be_read_end_the_run_with_a_line(tmp_path):
    with pytest.raises(SystemExit, match="--data: .*no images"):
        image_data.fashion_mnist(tmp_path, None, 1, tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03")
    with pytest.raises(SystemExit, match="--data: .*truncated"):
        image_data.fashion_mnist(tmp_path, None, 1, tmp_path)


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
    columns = ["sampler", "evaluations a step", "draws an evaluation"]
    columns += ["ratio (1, 4)", "set-up (1, 4)", "microseconds (1, 4)", "sums alone (1, 4)"]
    assert list(found[0]) == columns
    assert {row["sampler"]: (row[columns[1]], row[columns[2]]) for row in found} == rows
    long = [(512, 0), (512, 512), (1024, 512), (1036, 2)]  # restart goes back twice, once a run
    assert loops[1::2] == long
    assert loops[::2] == [(128, 0), (128, 128), (256, 128), (268, 2)]
    assert [row["sampler"] for row in found if row["sums alone (1, 4)"]] == ["ddim"]  # the one with a table, no noise
    assert "heun_sde" in capsys.readouterr().out


def test_the_bare_loop_draws_as_often_as_it_is_told(monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: drawn.append(0) or randn(*args, **kwargs))
    for evaluations, draws in ((4, 0), (4, 4), (6, 3), (7, 2), (2, 6)):
        drawn.clear()
        overhead.bare(torch.ones(1), evaluations, draws)()
        assert len(drawn) == draws


def test_costs_are_medians_over_turns_of_differences(monkeypatch):
    """base and run, short and long, in turns; the first turn is not counted. The long run has 10 evaluations more."""
    turns = [(9, 9, 9, 99), (1, 7, 11, 37), (1, 9, 11, 29), (2, 8, 12, 48)]  # a step: 3, 2 and 4 for 1; 4, 7 and 4 over
    taken = iter([float(t) for turn in turns for t in turn])
    monkeypatch.setattr(overhead, "seconds", lambda run: next(taken))
    nothing = [lambda: None] * 2
    assert overhead.compare(nothing, nothing, [1, 11], 3) == overhead.Cost(ratio=3.0, set_up=4.0, seconds=3.0)
