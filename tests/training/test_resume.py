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

from sdekit import VPSDE
from sdekit.cli import main
from sdekit.training.checkpoint import FORMAT, write_tensors
from sdekit.training.networks import build
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


def test_resume_without_a_run_starts_one(tmp_path):
    assert torch.equal(run(tmp_path, resume=True)[1].losses, run(None)[1].losses)


def test_a_run_is_not_overwritten(tmp_path):
    run(tmp_path)
    with pytest.raises(FileExistsError, match="resume=True"):
        run(tmp_path)


def test_another_process_or_other_data_are_refused(tmp_path):
    stopped(tmp_path)
    rest = {"steps": 30, "batch": 16, "every": 10, "warmup": 5, "device": "cpu", "out": tmp_path, "resume": True}
    with pytest.raises(ValueError, match="process = "):
        train(build("MLP", dim=2, width=16, layers=1), VPSDE(beta_max=10.0), DATA, **rest)
    with pytest.raises(ValueError, match="data's digest = "):
        train(build("MLP", dim=2, width=16, layers=1), VPSDE(), DATA + 1, **rest)


@pytest.mark.parametrize("change", [{"steps": 40}, {"lr": 1e-4}, {"predicts": "eps"}, {"seed": 7}, {"about": {"a": 1}}])
def test_other_settings_are_refused_by_name(tmp_path, change):
    stopped(tmp_path)
    with pytest.raises(ValueError, match=f"{'a' if 'about' in change else next(iter(change))} = .* \\(now "):
        run(tmp_path, resume=True, **change)


def test_a_truncated_state_says_so_and_the_one_before_is_whole(tmp_path):
    _, whole = run(tmp_path / "whole")
    stopped(tmp_path / "parts")
    before, last = states(tmp_path / "parts")
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"truncated.*delete it to go on from {before.name}"):
        run(tmp_path / "parts", resume=True)
    last.unlink()
    assert torch.equal(run(tmp_path / "parts", resume=True)[1].losses, whole.losses)


def test_foreign_files_are_refused(tmp_path):
    stopped(tmp_path)
    last = states(tmp_path)[-1]
    write_tensors(last, {"x": torch.zeros(2)}, FORMAT, {})
    with pytest.raises(ValueError, match="has the format 'sdekit-score-1', not 'sdekit-run-1'"):
        run(tmp_path, resume=True)
    torch.save({"step": 20}, last)  # a pickle
    with pytest.raises(ValueError, match="no safetensors file"):
        run(tmp_path, resume=True)


def test_a_state_of_another_network_is_refused(tmp_path):
    stopped(tmp_path)
    with pytest.raises(ValueError, match="no state of this network"):
        train(build("MLP", dim=2, width=32, layers=1), VPSDE(), DATA, steps=30, batch=16, every=10, warmup=5,
              device="cpu", out=tmp_path, resume=True)  # fmt: skip


def test_kill_9_at_three_random_moments(tmp_path):
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
    for kill in range(3):
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
