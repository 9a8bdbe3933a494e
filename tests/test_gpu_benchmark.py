"""The GPU's benchmark, where there is none: it runs, keeps what it has and its budget, and counts what it says."""

import json
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import gpu
import gpu_measure
import gpu_parts
from gpu_measure import SMALL, Setting

from sdekit import SAMPLERS, VPSDE, as_score, sample

CPU = Setting(torch.device("cpu"), False, SMALL, 0)


def run(tmp_path, *arguments):
    """The file's lines after a run: the first, then each part's rows, then how each part ended."""
    gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path), *arguments])
    first, *lines = map(json.loads, (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines())
    rows, endings = {}, {}
    for line in lines:
        if "row" in line:
            assert line["part"] not in endings
            rows.setdefault(line["part"], []).append(line["row"])
        else:
            endings[line["part"]] = line
    return first["run"], rows, endings


def test_every_part_leaves_rows_or_a_reason(tmp_path, capsys):
    start = time.monotonic()
    about, rows, endings = run(tmp_path, "--minutes", "1")
    assert time.monotonic() - start < 60
    assert set(endings) == set(gpu_parts.PARTS)
    for part, ending in endings.items():
        assert ending["status"] == ("done" if part in rows else "skipped"), ending
        assert (part in rows) != bool(ending.get("reason"))
    for part in ("waits", "memory"):
        assert endings[part]["reason"].startswith("needs cuda")
    assert set(rows) - {"diffusers"} == {"share", "bf16", "training", "overhead", "compile"}
    if "diffusers" not in rows:
        assert 'pip install -e ".[peers]"' in endings["diffusers"]["reason"]

    assert {row["evaluations"] for row in rows["share"] if row["call"].startswith("sample")} == {20}
    assert all(0 < row["share"] < 1 for row in rows["share"])
    assert [row["sampler"] for row in rows["overhead"]] == list(SAMPLERS)
    for row in rows["bf16"]:
        assert row["state"] == "torch.float32"
        assert 0 < row["rms_difference"] < 0.02 * row["rms_float32"]
    assert [row["autocast"] for row in rows["training"]] == ["no", "bfloat16"]
    assert about["torch"] == torch.__version__
    assert about["protocol"].startswith("random networks")
    assert {"date", "device", "cuda", "seed"} <= set(about)
    printed = capsys.readouterr().out
    assert "sample dpmpp_2m 20" in printed
    assert "waits: skipped in 0 s: needs cuda" in printed


def test_a_part_that_fails_keeps_its_rows_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    def fails(s):
        yield {"row": 1}
        raise RuntimeError("CUDA error: out of luck")

    def needs(s):
        raise gpu_parts.UnavailableError("needs a reason")
        yield

    def works(s):
        yield {"row": 2, "ms": 1.23456}
        yield {"other": True}

    monkeypatch.setattr(gpu, "PARTS", {"fails": fails, "needs": needs, "works": works, "left": fails, "out": works})
    _, rows, endings = run(tmp_path, "--skip", "left", "--only", "fails", "needs", "works", "left")
    assert rows == {"fails": [{"row": 1}], "works": [{"row": 2, "ms": 1.23456}, {"other": True}]}
    found = {part: (ending["status"], ending.get("reason")) for part, ending in endings.items()}
    assert found.pop("fails")[0] == "failed"
    assert endings["fails"]["reason"].endswith("CUDA error: out of luck")
    assert endings["fails"]["reason"].startswith("RuntimeError at benchmarks/gpu.py:")
    assert found == {
        "needs": ("skipped", "needs a reason"), "works": ("done", None),
        "left": ("skipped", "not asked for"), "out": ("skipped", "not asked for"),
    }  # fmt: skip
    assert "row  ms\n  2    1.235" in capsys.readouterr().out


def test_the_budget_is_kept_in_the_middle_of_a_row(tmp_path, monkeypatch):
    def slow(s):
        yield {"row": 1}
        try:
            while True:
                time.sleep(0.01)
        except Exception:  # as a library might
            yield {"row": 2}

    monkeypatch.setattr(gpu, "PARTS", {"slow": slow, "next": slow})
    start = time.monotonic()
    _, rows, endings = run(tmp_path, "--minutes", "0.01")
    assert time.monotonic() - start < 10
    assert rows == {"slow": [{"row": 1}]}
    assert endings["slow"]["status"] == "cut"
    assert "spent after 1 rows" in endings["slow"]["reason"]
    assert (endings["next"]["status"], endings["next"]["seconds"]) == ("skipped", 0)
    assert "was spent before it" in endings["next"]["reason"]


def test_a_second_run_is_added(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"works": lambda s: iter([{"row": 1}])})
    for _ in range(2):
        gpu.main(["--device", "cpu", "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text(encoding="utf-8").splitlines()]
    assert ["run" in line for line in lines] == [True, False, False] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "finds no CUDA device here; --device cpu runs"),
        (["--device", "cuda"], "finds no CUDA device here"),
        (["--device", "cpu", "--minutes", "-1"], "--minutes must be at least 0, got -1"),
        (["--device", "cpu", "--minutes", "nan"], "--minutes must be at least 0, got nan"),
        (["--device", "cpu", "--seed", "-1"], "--seed must be at least 0"),
        (["--device", "cpu", "--only", "everything"], "invalid choice: 'everything'"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        gpu.parse(arguments)
    assert stopped.value.code in (1, 2)
    assert message in capsys.readouterr().err


class Clock:
    """Seconds that pass only when they are told to, as the host's clock or as the device's events."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (gpu_measure, gpu_parts):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock))
    return clock


@pytest.fixture
def cuda(monkeypatch, clock):
    """The CPU as if it were a GPU: events by the clock, memory by a list of readings, waits where somebody warns."""

    class Event:
        def __init__(self, *, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock.now

        def elapsed_time(self, other):
            return 1000 * (other.at - self.at)

    modes = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    return Setting(torch.device("cpu"), True, SMALL, 0), modes


@pytest.mark.parametrize("events", [False, True])
def test_the_share_is_that_of_the_network(events, clock, cuda, monkeypatch):
    def spend(seconds):
        clock.now += seconds

    def calls(score, shape, s):
        def run():
            spend(0.5)
            for _ in range(2):
                score(torch.zeros(shape), torch.tensor(0.5))
                spend(0.25)

        return {"a call": run}

    class Network(torch.nn.Module):
        def forward(self, x, t):
            spend(1.5)
            return x

    monkeypatch.setattr(gpu_parts, "calls", calls)
    monkeypatch.setattr(Setting, "unet", lambda self, channels: Network())
    small = SMALL._replace(shapes=SMALL.shapes[:1], turns=3)
    (row,) = gpu_parts.share(Setting(torch.device("cpu"), events, small, 0))
    assert (row["evaluations"], row["ms"], row["network_ms"], row["beside_ms"]) == (2, 4000, 3000, 1000)
    assert row["share"] == 0.75


def test_waits_are_counted_between_the_calls_of_the_network(cuda):
    _, modes = cuda

    def wait():
        warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            wait()  # the network's own
            return 0 * x

    network = gpu_measure.Watched(Network(), int)
    score, shape = as_score(network, VPSDE(), "v"), (1, 3, 4, 4)

    def between(*_):
        wait()
        warnings.warn("something else", stacklevel=1)

    def call():
        wait()  # before the first call
        sample(score.sde, score, shape, "ddim", steps=4, seed=0, callback=between)
        wait()  # after the last

    assert len(gpu_parts.caught(call, network)) == 4  # the denoising is a fifth call of the network
    assert len(network.marks) == 5
    (place,) = set(gpu_parts.caught(call, network))
    assert place.startswith("tests/test_gpu_benchmark.py:")
    assert modes == ["warn", "default"] * 2


def test_parts_that_need_a_gpu_run_as_if_there_were_one(cuda, monkeypatch):
    s, modes = cuda
    monkeypatch.setattr(gpu_parts, "SAMPLERS", ("heun", "ancestral"))
    rows = list(gpu_parts.waits(s))
    assert [row["call"] for row in rows][-2:] == ["sample heun", "sample ancestral"]
    assert {(row["waits_in_loop"], row["where"]) for row in rows} == {(0, "")}
    assert modes == ["warn", "default"] * len(rows)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * 2**30))
    about = gpu.about(s, gpu.parse(["--device", "cpu"]))
    assert (about["device"], about["memory_GiB"]) == ("a GPU", 80)
    peaks = iter([m * 2**20 for m in (30, 40, 50, 60, 70, 80)])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 20 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    rows = list(gpu_parts.memory(s))
    assert [(row["MiB"], row["network_MiB"], row["beside_MiB"]) for row in rows] == [
        (m, 10, m - 10) for m in (20, 30, 40, 50, 60)
    ]


def test_there_are_fewer_turns_where_they_take_long(clock):
    turns = []

    def measure():
        turns.append(clock.now)
        clock.now += 4
        return clock.now

    s = Setting(torch.device("cpu"), False, SMALL._replace(turns=7), 0)
    assert s.repeat(measure) == [8, 12, 16]  # over ten seconds after the third, the first being left out
    assert len(turns) == 4
