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
import network_overhead
import nfe_vs_fid
import overhead
import overhead_calls
import overhead_measure
import poisson

from sdekit import SAMPLERS
from sdekit.processes.kinds import KINDS


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


def read(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_overhead_is_per_evaluation_and_counts_draws(monkeypatch, tmp_path, capsys):
    rows = {"ddim": ("1", "0.0"), "ancestral": ("1", "1.0"), "heun_sde": ("2", "0.5"), "restart": ("2", "0.02")}
    loops, base = [], overhead.bare
    monkeypatch.setattr(overhead, "bare", lambda d, n, draws: loops.append((n, draws)) or base(d, n, draws))
    monkeypatch.setattr(overhead, "SHAPES", ((1, 4),))
    monkeypatch.setattr(overhead, "SAMPLERS", {name: SAMPLERS[name] for name in rows})
    overhead.main(["--quick", "--only", "evaluations", "--out", str(tmp_path)])
    found = read(tmp_path / "overhead.csv")
    columns = ["sampler", "evaluations a step", "draws an evaluation"]
    columns += [f"{name} (1, 4)" for name in (*KINDS, "worst", "sums alone", "microseconds")]
    assert list(found[0]) == columns
    assert {row["sampler"]: (row[columns[1]], row[columns[2]]) for row in found} == rows
    assert loops[1::2] == [(51, 0), (51, 51), (102, 51), (114, 2)]  # restart goes back twice, once a run
    assert loops[::2] == [(12, 0), (12, 12), (24, 12), (36, 2)]
    assert [row["sampler"] for row in found if row["sums alone (1, 4)"]] == ["ddim"]  # the one with a table, no noise
    for row in found:
        assert row["worst (1, 4)"] == max((row[f"{name} (1, 4)"] for name in KINDS), key=float)
    printed = capsys.readouterr().out
    assert "| sampler | evaluations a step | draws an evaluation | score (1, 4) | eps (1, 4) |" in printed
    assert "| heun_sde | 2 | 0.5 | " in printed
    assert not (tmp_path / "overhead_calls.csv").exists()


@pytest.mark.parametrize("name", ["euler", "pc", "dpm_solver_2", "flow_unipc_3"])
def test_the_overhead_is_that_of_a_network_of_each_kind(monkeypatch, name):
    """The loops are of as_score and a network that returns the tensor that it was given, as often as is counted."""
    made, wrap, d = {}, overhead.as_score, torch.ones(1, 4)

    def counted(network, sde, predicts):
        calls = made.setdefault(predicts, [])

        def free(x, t):
            calls.append(t)
            assert network(x, t) is d
            return d

        return wrap(free, sde, predicts)

    monkeypatch.setattr(overhead, "as_score", counted)
    loops = overhead.ours(name, d, 6)
    assert set(loops) - {"sums alone"} == set(made) == set(KINDS)
    for predicts in KINDS:
        made[predicts].clear()
        loops[predicts]()
        assert len(made[predicts]) == overhead.counts(name, 6)[0]


def test_the_sums_are_those_of_the_rule():
    """As many evaluations as the sampler makes; with a history longer from step to step, up to the rule's order."""
    for name in ("ddim", "dpmpp_2m", "flow_unipc_3", "dpm_solver_3"):
        assert len(overhead.plan(name, 6)) == overhead.counts(name, 6)[0]
        assert overhead.sums(torch.ones(1, 4), overhead.plan(name, 6))().shape == (1, 4)
    assert [s.added for s in overhead.plan("dpmpp_2m", 6)] == sorted(s.added for s in overhead.plan("dpmpp_2m", 6))
    assert overhead.plan("sa_solver", 6) == overhead.plan("heun", 6) == []


def test_calls_are_of_new_processes_first(monkeypatch, tmp_path, capsys):
    """A first call and later ones of each process, after one process that is left out."""
    monkeypatch.setattr(overhead_calls, "SAMPLERS", {name: SAMPLERS[name] for name in ("ddim", "heun", "ancestral")})
    monkeypatch.setattr(overhead, "PROCESSES", {"HeatODE": overhead_calls.PROCESSES["HeatODE"]})
    asked, taken = [], iter([9.0, 9.0, 9.0, 5.0, 1.0, 2.0, 7.0, 3.0, 4.0] * 3)

    def seconds(run):
        asked.append((run.args[0], run.args[3], run.keywords))
        assert run().shape == (1, 64)
        return next(taken) / 1000

    monkeypatch.setattr(overhead_calls, "seconds", seconds)
    assert overhead_calls.calls("HeatODE", "a name", "ddim", 2, 2) == {
        "sampler": "a name", "process": "HeatODE", "first": 6.0, "later": 2.5
    }  # fmt: skip
    processes = [id(sde) for sde, *_ in asked]
    assert [processes[i] == processes[i - 1] for i in range(1, 9)] == [True, True, False] * 2 + [True, True]
    assert asked[0][1:] == ("ddim", {"nfe": 10, "seed": 0})

    monkeypatch.setattr(overhead_calls, "seconds", lambda run: run().mean().item() * 0 + 0.002)
    overhead.main(["--quick", "--only", "calls", "--out", str(tmp_path)])
    found = read(tmp_path / "overhead_calls.csv")
    assert [row["sampler"] for row in found] == ["ddim", "heun", "a calibration"]
    assert {(row["process"], row["first"], row["later"]) for row in found} == {("HeatODE", "2.0", "2.0")}
    assert "| a calibration | 2.0 / 2.00 |" in capsys.readouterr().out


def test_the_bare_loop_draws_as_often_as_it_is_told(monkeypatch):
    drawn, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args, **kwargs: drawn.append(0) or randn(*args, **kwargs))
    for evaluations, draws in ((4, 0), (4, 4), (6, 3), (7, 2), (2, 6)):
        drawn.clear()
        overhead_measure.bare(torch.ones(1), evaluations, draws)()
        assert len(drawn) == draws


def test_costs_are_medians_over_turns_of_differences(monkeypatch):
    """Short and long of base and run; the first turn is not counted, and they begin in turns. Ten evaluations more."""
    turns = [(9, 99, 9, 9), (7, 37, 1, 11), (1, 11, 9, 29), (8, 48, 2, 12)]  # a step of the run: 3, 2 and 4 for 1
    taken = iter([float(t) for turn in turns for t in turn])
    order = []
    monkeypatch.setattr(overhead_measure, "seconds", lambda run: order.append(run) or next(taken))
    (cost,) = overhead_measure.compare("aA", ["bB"], [1, 11], 3)
    assert "".join(order) == "aAbB" + "bBaA" + "aAbB" + "bBaA"
    assert cost == overhead_measure.Cost(ratio=3.0, seconds=3.0)


def test_pairs_take_turns_and_the_first_is_left_out():
    taken, order = iter(range(1, 9)), []
    watch = lambda run: order.append(run) or next(taken)  # noqa: E731
    assert network_overhead.pairs(watch, "a", "b", 3) == [(3, 4), (6, 5), (7, 8)]
    assert "".join(order) == "ba" + "ab" + "ba" + "ab"


def test_what_is_beside_the_network_is_what_is_not_in_its_calls(monkeypatch):
    class Slow(torch.nn.Module):
        def forward(self, x):
            return clock.append(clock[-1] + 5.0)

    def run(calls):
        for _ in range(calls):
            clock.append(clock[-1] + 2.0)
            model(None)

    clock, model = [0.0], Slow()
    monkeypatch.setattr(network_overhead.time, "thread_time", lambda: clock[-1])
    monkeypatch.setattr(network_overhead, "NFE", 3)
    watch = network_overhead.Watch(model)
    assert watch(lambda: run(3))[1] == 6.0
    with pytest.raises(RuntimeError, match="4 evaluations, not 3"):
        watch(lambda: run(4))


def test_a_small_network_beside_diffusers(monkeypatch, tmp_path, capsys):
    pytest.importorskip("diffusers")
    threads = torch.get_num_threads()
    monkeypatch.setattr(network_overhead, "NFE", 4)
    monkeypatch.setattr(network_overhead, "MODELS", {"small": {**network_overhead.MODELS["small"], "sample_size": 8}})
    try:
        network_overhead.main(["--quick", "--pairs", "2", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    found = read(tmp_path / "network_overhead.csv")
    assert [row["sampler"] for row in found] == ["ddim", "dpmpp_2m"]
    assert {(row["batch"], row["evaluations"], row["pairs"]) for row in found} == {("1", "4", "2")}
    for row in found:
        assert 0 < float(row["lower quartile"]) <= float(row["ratio"]) <= float(row["upper quartile"])
        assert 0 < float(row["beside ms"]) < float(row["ms"])
    assert network_overhead.table(found) in capsys.readouterr().out


def test_poisson_flow_beside_diffusion(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(poisson, "SHOWN", (5, 10))
    poisson.main(["--quick", "--out", str(tmp_path)])
    found = read(tmp_path / "poisson.csv")
    assert [row["network"] for row in found] == ["real images", *(name for name in poisson.ROWS for _ in (5, 10))]
    assert all(0 < float(row["distance"]) < 5 for row in found)
    assert "| PoissonFlow(128), x_0 (PFGM++) | " in capsys.readouterr().out
    assert (tmp_path / "poisson.png").stat().st_size > 10_000
