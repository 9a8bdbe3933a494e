"""A run that is killed goes on as if it had not been; a file that is broken says so, and the one before is whole."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.torch
import torch

from sdekit import VPSDE, SubVPSDE
from sdekit.cli import main
from sdekit.training.checkpoint import FORMAT, read_tensors, write_tensors
from sdekit.training.networks import build
from sdekit.training.objectives import sliced
from sdekit.training.state import FORMAT as RUN
from sdekit.training.state import states
from sdekit.training.trainer import train

DATA = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


def run(out, *, stop=None, **options):
    """30 steps, saved every 10th; ``stop``: raise when so many are saved."""

    def callback(step, network):
        if step == stop:
            raise KeyboardInterrupt

    settings = {"steps": 30, "batch": 16, "every": 10, "warmup": 5, "device": "cpu", "out": out, "callback": callback}
    network = build("MLP", dim=2, width=16, layers=1)
    return network, train(network, VPSDE(), DATA, **(settings | options))


def stopped(out, **options):
    with pytest.raises(KeyboardInterrupt):
        run(out, stop=20, **options)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    network, whole = run(tmp_path / "whole")
    stopped(tmp_path / "parts")
    again, rest = run(tmp_path / "parts", resume=True)
    assert torch.equal(whole.losses, rest.losses)
    for a, b in ((network, again), (whole.network, rest.network)):
        assert all(torch.equal(u, v) for u, v in zip(a.parameters(), b.parameters(), strict=True))
    rows = [(tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("whole", "parts")]
    assert [[r.split(",")[0] for r in side] for side in rows] == [["step", "10", "20", "30"]] * 2
    assert [p.name for p in states(tmp_path / "parts")] == [
        "state-000000020.safetensors",
        "state-000000030.safetensors",
    ]


def test_saving_changes_nothing(tmp_path):
    _, with_files = run(tmp_path)
    _, without = run(None)
    assert torch.equal(with_files.losses, without.losses)


def test_a_finished_run_resumes_to_itself(tmp_path):
    _, whole = run(tmp_path)
    _, again = run(tmp_path, resume=True)
    assert torch.equal(whole.losses, again.losses)
    assert all(torch.equal(u, v) for u, v in zip(whole.network.parameters(), again.network.parameters(), strict=True))


def test_resume_without_a_run_starts_one_and_says_so(tmp_path):
    assert torch.equal(run(tmp_path, resume=True)[1].losses, run(None)[1].losses)
    assert (tmp_path / "log.txt").read_text() == f"step 0: no state in {tmp_path} to go on from, so the run begins\n"


def test_a_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    with pytest.raises(FileExistsError, match="resume=True"):
        run(tmp_path)


def test_another_process_or_other_data_are_refused_in_words(tmp_path):
    stopped(tmp_path)
    rest = {"steps": 30, "batch": 16, "every": 10, "warmup": 5, "device": "cpu", "out": tmp_path, "resume": True}
    network = build("MLP", dim=2, width=16, layers=1)
    with pytest.raises(ValueError, match=r"with process = 'VPSDE' \(now 'VPSDE with other numbers'\); process cannot"):
        train(network, VPSDE(beta_max=10.0), DATA, **rest)
    with pytest.raises(ValueError, match=r"with process = 'VPSDE' \(now 'SubVPSDE'\); process cannot change.*init="):
        train(network, SubVPSDE(), DATA, **rest)
    with pytest.raises(ValueError, match=r"a run with other data; .*change=\['data'\] \(--change data\)"):
        train(network, VPSDE(), DATA + 1, **rest)


@pytest.mark.parametrize("change", [{"steps": 40}, {"lr": 1e-4}, {"predicts": "eps"}, {"seed": 7}, {"about": {"a": 1}}])
def test_other_settings_are_refused_by_name(tmp_path, change):
    stopped(tmp_path)
    name = "a" if "about" in change else next(iter(change))
    way = "init=" if name == "predicts" else rf"change=\['{name}'\] \(--change {name}\)"
    with pytest.raises(ValueError, match=rf"{name} = .* \(now .*{way}"):
        run(tmp_path, resume=True, **change)


CHANGED = {
    "lr": 1e-2, "steps": 40, "batch": 8, "warmup": 200, "schedule": "constant", "weight_decay": 0.1, "clip": 1e-4,
    "ema": 0.5, "seed": 3, "times": "lognormal", "bf16": True,
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGED)
def test_what_is_named_may_change_and_has_its_effect(tmp_path, caplog, name):
    """The steps done are kept, those to come are others, the log says so, and what comes after compares with it."""
    before = run(tmp_path / "whole")[1]
    stopped(tmp_path / "parts")
    changed = {name: CHANGED[name]}
    after = run(tmp_path / "parts", resume=True, change=[name], **changed)[1]
    assert len(after.losses) == changed.get("steps", 30)
    assert torch.equal(after.losses[:20], before.losses[:20])
    weights = [torch.cat([w.flatten() for w in trained.network.parameters()]) for trained in (before, after)]
    assert not torch.equal(*weights)
    (line,) = (tmp_path / "parts" / "log.txt").read_text().splitlines()
    assert line.startswith(f"step 20: {name} {CHANGED[name]!r}, was ")
    assert [record.getMessage() for record in caplog.records] == [line]
    again = run(tmp_path / "parts", resume=True, **changed)[1]
    assert torch.equal(again.losses, after.losses)
    with pytest.raises(ValueError, match=f"{name} = "):
        run(tmp_path / "parts", resume=True)


def test_a_changed_run_does_from_there_what_it_would_have_done(tmp_path):
    """A constant rate halved after 20 steps, against the same by hand: Adam's way of one weight is the sum of rates."""

    class Level(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.level = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t):
            return x * 0 + self.level

    options = {"predicts": "x0", "schedule": "constant", "warmup": 0, "batch": 8, "device": "cpu", "out": tmp_path}
    for lr, steps, more in ((1e-2, 20, {}), (5e-3, 30, {"resume": True, "change": ["lr", "steps", "data"]})):
        network = Level()
        far = torch.full((8, 1), 1e4 * (1 if not more else 2))
        train(network, VPSDE(), far, lr=lr, steps=steps, **options, **more)
    assert float(network.level.detach()) == pytest.approx(20 * 1e-2 + 10 * 5e-3, rel=0.01)
    said = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in said if "the data's mean is" not in line] == [
        "step 20: other data", "step 20: lr 0.005, was 0.01", "step 20: steps 30, was 20",
    ]  # fmt: skip


def test_items_that_are_gone_are_other_data(tmp_path):
    stopped(tmp_path)
    rest = {"steps": 30, "batch": 16, "every": 10, "warmup": 5, "device": "cpu", "out": tmp_path, "resume": True}
    network = build("MLP", dim=2, width=16, layers=1)
    with pytest.raises(ValueError, match=r"other data, items = 40 \(now 39\).*change=\['data'\]"):
        train(network, VPSDE(), DATA[:39], **rest)
    assert len(train(network, VPSDE(), DATA[:39], change=["data"], **rest).losses) == 30


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"change": ["lr"]}, ValueError, r"change is for a run that goes on: pass resume=True"),
        ({"change": "lr", "resume": True}, TypeError, r"must be a list of names, as \['lr'\], got 'lr'"),
        ({"change": ["step"], "resume": True}, ValueError, r"unknown setting to change 'step': did you mean 'steps'"),
        ({"change": ["predicts"], "resume": True}, ValueError, r"change cannot name predicts: .*init="),
        ({"change": ["lr"], "resume": True, "seed": 9}, ValueError, r"change=\['lr', 'seed'\] \(--change lr seed\)"),
        ({"change": ["steps"], "resume": True, "steps": 19}, ValueError, r"steps must be at least 20, .*got 19"),
    ],
)
def test_a_change_that_cannot_be_is_refused(tmp_path, options, error, message):
    stopped(tmp_path)
    with pytest.raises(error, match=message):
        run(tmp_path, **options)


def test_a_change_of_nothing_is_fine(tmp_path):
    stopped(tmp_path)
    assert torch.equal(run(tmp_path, resume=True, change=["lr"])[1].losses, run(None)[1].losses)
    assert not (tmp_path / "log.txt").exists()
    with pytest.raises(ValueError, match="unknown setting to change 'lrr'"):
        run(tmp_path / "new", resume=True, change=["lrr"])


def damaged(folder, old, new):
    """The two states of a run, each "good", "cut", "foreign" or "gone"."""
    for file, state in zip(states(folder), (old, new), strict=True):
        if state == "cut":
            file.write_bytes(file.read_bytes()[:1000])
        elif state == "foreign":
            write_tensors(file, {"x": torch.zeros(2)}, FORMAT, {})
        elif state == "gone":
            file.unlink()


@pytest.mark.parametrize("new", ["good", "cut", "foreign", "gone"])
@pytest.mark.parametrize("old", ["good", "cut", "foreign", "gone"])
def test_a_run_goes_on_from_the_newest_state_that_is_whole(tmp_path, old, new):
    """To the bits of a run that nothing happened to; the log says what was left aside."""
    _, whole = run(tmp_path / "whole")
    stopped(tmp_path / "parts")
    damaged(tmp_path / "parts", old, new)
    bad = [state for state in (old, new) if state in ("cut", "foreign")]
    log = tmp_path / "parts" / "log.txt"
    if bad and "good" not in (old, new):
        files = ".*".join(f"{file.name} (is truncated|has the format)" for file in reversed(states(tmp_path / "parts")))
        with pytest.raises(ValueError, match=f"no state in .*parts can be read: .*{files}.*Begin a run in another"):
            run(tmp_path / "parts", resume=True)
        for file in states(tmp_path / "parts"):  # who takes them away begins anew
            file.unlink()
    _, rest = run(tmp_path / "parts", resume=True)
    assert torch.equal(rest.losses, whole.losses)
    steps = [row.split(",")[0] for row in (tmp_path / "parts" / "metrics.csv").read_text().splitlines()]
    assert steps == ["step", "10", "20", "30"]
    said = log.read_text() if log.exists() else ""
    if new == "good":
        assert said == ""
    elif old == "good":
        assert said.count("\n") == (new != "gone")
        assert (f"step 10: left aside, {tmp_path}" in said) == (new != "gone")
        assert ("000000020.safetensors" in said) == (new != "gone")
    else:
        assert said == f"step 0: no state in {tmp_path / 'parts'} to go on from, so the run begins\n"


def test_a_bad_state_is_not_the_one_that_is_kept(tmp_path):
    """Of two good ones and a later one that cannot be read, the two are kept."""
    stopped(tmp_path)
    (tmp_path / "state-000000999.safetensors").write_bytes(b"bad")
    run(tmp_path, resume=True)
    assert [int(file.stem[-9:]) for file in states(tmp_path)] == [20, 30, 999]


def test_a_pickle_is_no_state(tmp_path):
    stopped(tmp_path)
    for file in states(tmp_path):
        torch.save({"step": 20}, file)
    with pytest.raises(ValueError, match="no safetensors file"):
        run(tmp_path, resume=True)


def test_a_state_of_another_network_is_refused(tmp_path):
    stopped(tmp_path)
    with pytest.raises(ValueError, match="no state of this network"):
        train(build("MLP", dim=2, width=32, layers=1), VPSDE(), DATA, steps=30, batch=16, every=10, warmup=5,
              device="cpu", out=tmp_path, resume=True)  # fmt: skip


def test_kill_9_at_random_moments(tmp_path):
    """By the command line, in processes of their own: killed, resumed, killed, ... and the last weights bit-equal to
    those of a run in this one.
    """
    np.savez(tmp_path / "data.npz", x=DATA.numpy())
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    flags = ["--steps", "250", "--batch", "32", "--every", "7", "--network-args", "width=32", "--device", "cpu"]

    def start(name, *more):
        command = [sys.executable, "-m", "sdekit", "train", "--data", tmp_path / "data.npz", *flags, *more]
        return subprocess.Popen(
            [*command, "--out", tmp_path / name], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )

    main(["train", "--data", str(tmp_path / "data.npz"), *flags, "--out", str(tmp_path / "whole")])
    moments = random.Random(0)
    for kill in range(2):
        process = start("parts", "--resume")
        seen = states(tmp_path / "parts")
        while process.poll() is None and len(set(states(tmp_path / "parts")) - set(seen)) == 0:
            time.sleep(0.005)  # until it has gone on by at least one state
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it was over before kill {kill}: {process.stderr.read()}"
    last = start("parts", "--resume")
    assert last.wait(timeout=200) == 0, last.stderr.read()
    files = ("score.safetensors", "state-000000250.safetensors")
    for file in files:
        a, b = (safetensors.torch.load_file(tmp_path / name / file) for name in ("whole", "parts"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), file
    assert not list((tmp_path / "parts").glob("*.part"))  # what a kill left behind is gone


def test_a_state_with_other_bits_is_left_aside(tmp_path):
    """Whole, of the right format, and damaged in the middle: its numbers are not those that were written."""
    stopped(tmp_path)
    newest = states(tmp_path)[-1]
    content = bytearray(newest.read_bytes())
    place = len(content) - len(content) // 3
    content[place] ^= 0x10
    newest.write_bytes(content)
    run(tmp_path, resume=True)
    assert "is damaged: it does not hold what was written" in (tmp_path / "log.txt").read_text()


def test_a_state_that_says_another_step_is_left_aside(tmp_path):
    """One bit of what it says of itself, in which it is valid."""
    stopped(tmp_path)
    newest = states(tmp_path)[-1]
    content = newest.read_bytes()
    assert content.count(rb"\"step\": 20") == 1
    newest.write_bytes(content.replace(rb"\"step\": 20", rb"\"step\": 10"))
    _, whole = run(tmp_path / "whole")
    _, rest = run(tmp_path, resume=True)
    assert "is damaged" in (tmp_path / "log.txt").read_text()
    assert torch.equal(whole.losses, rest.losses)


def test_a_run_of_before_a_setting_goes_on(tmp_path):
    """What its state has no word for is what is not set; what is set is a change."""
    stopped(tmp_path)
    for path in states(tmp_path):
        about, tensors = read_tensors(path, RUN)
        for name in ("objective", "mask", "time", "output", "init"):
            del about["settings"][name]
        write_tensors(path, tensors, RUN, about)
    with pytest.raises(ValueError, match=r"mask = None \(now 0\)"):
        run(tmp_path, resume=True, mask=0)
    run(tmp_path, resume=True)


def test_a_folder_is_no_state(tmp_path):
    stopped(tmp_path)
    (tmp_path / "state-000000099.safetensors").mkdir()
    run(tmp_path, resume=True)


def test_another_objective_is_a_change(tmp_path):
    stopped(tmp_path)
    with pytest.raises(ValueError, match=r"objective = None \(now 'sliced'\).*--change objective"):
        run(tmp_path, resume=True, objective=sliced())
    run(tmp_path, resume=True, objective=sliced(), change=["objective"])


def test_init_is_the_same_by_another_path(tmp_path, monkeypatch):
    run(tmp_path / "first")
    stopped(tmp_path / "next", init=tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "next", init="./first/", resume=True)
