"""The command line: one config in three forms, a checkpoint that is enough for all the rest, errors in a line."""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from sdekit import VPSDE, GaussianMixture, as_score, load_calibration, sample
from sdekit.cli import main
from sdekit.training.checkpoint import load_checkpoint, save_checkpoint
from sdekit.training.config import HELP, Config, add_flags, from_flags
from sdekit.training.networks import build

DIGITS = str(resources.files("sdekit") / "assets" / "digits.safetensors")
CONDITIONAL = str(Path(__file__).parents[1] / "benchmarks" / "networks" / "eps_conditional.safetensors")
SMALL = "--network-args width=8 multipliers=[1,1] --batch 16 --device cpu"


def run(flags, **paths):
    """The command line ``flags``, with paths filled in."""
    main([flag.format(**paths) for flag in flags.split()])


def refused(capsys, flags, message, **paths):
    """The command line ends with status 2, and a line that says so on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(flags, **paths)
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert re.search(message, said.err), said.err


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(flags))


def test_a_config_is_the_same_as_flags_as_json_and_as_itself(tmp_path):
    flags = (
        "--data a.npz --size 32 --process VESDE --process-args sigma_max=20 --conditional --sigma-data 0.5 --lr 0.1 "
        "--network-args width=16 multipliers=[1,2] --steps 7"
    )
    config = parsed(*flags.split())
    assert config == Config(
        data="a.npz",
        size=32,
        process="VESDE",
        process_args={"sigma_max": 20},
        conditional=True,
        network_args={"width": 16, "multipliers": [1, 2]},
        sigma_data=0.5,
        lr=0.1,
        steps=7,
    )
    (tmp_path / "config.json").write_text(json.dumps(config.json()))
    assert parsed("--config", str(tmp_path / "config.json")) == config
    assert parsed("--config", str(tmp_path / "config.json"), "--steps", "9", "--no-conditional") == dataclasses.replace(
        config, steps=9, conditional=False
    )
    assert parsed() == Config()
    assert list(HELP) == [option.name for option in dataclasses.fields(Config)]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", ValueError, "no JSON"),
        ("[1]", ValueError, "JSON object"),
        ('{"step": 3}', ValueError, "did you mean 'steps'"),
        ('{"steps": "3"}', TypeError, "steps in .* must be int, got '3'"),
        ('{"steps": true}', TypeError, "steps in .* must be int"),
        ('{"size": 1.5}', TypeError, "size in .* must be int or NoneType"),
    ],
)
def test_a_bad_config_is_named(tmp_path, content, error, message):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(error, match=message):
        parsed("--config", str(tmp_path / "c.json"))


def test_train_sample_nll(tmp_path, capsys):
    """Small and short: the files are there, and a checkpoint's path is all that sample and nll need."""
    out, score = tmp_path / "run", str(tmp_path / "run" / "score.safetensors")
    run(f"train --steps 4 --every 2 --overfit 32 --conditional --out {{out}} {SMALL}", out=out)
    steps = {
        f"{kind}-00000000{k}.{end}" for kind, end in (("samples", "png"), ("state", "safetensors")) for k in (2, 4)
    }
    assert {p.name for p in out.iterdir()} == {"metrics.csv", "score.safetensors", *steps}
    with safetensors.safe_open(score, "pt") as file:
        about = json.loads(file.metadata()["about"])
    assert Config.of(about["config"], "the checkpoint") == parsed("--config", score)
    assert parsed("--config", score).steps == 4
    assert about["network"]["arguments"]["classes"] == 10

    run(
        "sample {score} --number 5 --nfe 3 --batch 2 --label 7 --out {out} --device cpu",
        score=score,
        out=tmp_path / "s",
    )
    x = np.load(tmp_path / "s.npz")["x"]
    sde, loaded = load_checkpoint(score)
    assert (loaded.event, loaded.levels, loaded.data_range) == ((1, 8, 8), 17, (-1.0, 1.0))
    one = sample(sde, loaded.given(7), (1, 1, 8, 8), nfe=3, seed=0, ids=[4])
    assert torch.allclose(torch.from_numpy(x[4:]), one, atol=1e-4)
    assert (tmp_path / "s.png").is_file()

    capsys.readouterr()
    run("nll {score} --number 3 --probes 1 --tol 0.1 --device cpu", score=score)
    printed = capsys.readouterr().out
    assert "bits/dim, 17 levels" in printed
    assert 0 < float(printed.split()[0]) < 20


def test_bad_images_are_named_or_left_out_and_counted(tmp_path, capsys):
    images, out, score = tmp_path / "images", tmp_path / "run", str(tmp_path / "run" / "score.safetensors")
    images.mkdir()
    for name, level in (("a", 0), ("b", 128), ("c", 255)):
        Image.new("L", (8, 8), level).save(images / f"{name}.png")
    bad = images / "b.png"
    bad.write_bytes(bad.read_bytes()[:40])
    flags = f"train --data {{images}} --size 8 --channels 1 --steps 2 --out {{out}} {SMALL}"
    message = rf"(?m)^sdekit train: {re.escape(str(bad))} cannot be read as an image .*--skip-bad\)$"
    refused(capsys, flags, message, images=images, out=tmp_path / "no")
    run(f"{flags} --skip-bad", images=images, out=out)
    left_out = f"1 bad file left out ({bad})"
    assert f"2 items (1, 8, 8) of 256 levels, {left_out}, " in capsys.readouterr().out
    refused(capsys, f"{flags} --resume", "skip_bad = True", images=images, out=out)
    run(f"{flags} --skip-bad --resume", images=images, out=out)
    capsys.readouterr()
    run("nll {score} --number 2 --probes 1 --tol 0.1 --device cpu", score=score)
    assert f"items 0 ... 1 of {images}, {left_out}; " in capsys.readouterr().out
    nll = "nll {score} --data {images} --number 2 --probes 1 --tol 0.1 --device cpu"
    run(f"{nll} --skip-bad", score=score, images=images)
    assert left_out in capsys.readouterr().out
    refused(capsys, nll.replace("2", "9", 1), "fewer than skip [+] number = 9", score=score, images=images)
    for state in out.glob("state-*"):
        state.unlink()
    for way in ("", "--resume"):  # the weights that are left are not written over
        message = "of a run whose states are gone.*--init .*score.safetensors"
        refused(capsys, f"{flags} --skip-bad {way}", message, images=images, out=out)
    refused(
        capsys, f"train --skip-bad --steps 2 --out {{out}} {SMALL}", "skip_bad are for a folder", out=tmp_path / "d"
    )


def test_guidance_is_none_and_the_scale_times_what_a_label_adds(tmp_path):
    """Scale 1 and 0 are the model with the label and without, and 3 is u + 3 (c - u)."""
    sde, score = load_checkpoint(CONDITIONAL)
    draws = {}
    for scale in (0, 1, 3):
        flags = f"--number 3 --nfe 4 --label 7 --guidance {scale} --device cpu"
        run(f"sample {{score}} {flags} --out {{out}}", score=CONDITIONAL, out=tmp_path / "s")
        draws[scale] = torch.from_numpy(np.load(tmp_path / "s.npz")["x"])
    for scale, label in ((0, None), (1, 7)):
        x = sample(sde, score.given(label), (3, 1, 8, 8), nfe=4, seed=0)
        assert torch.allclose(draws[scale], x, atol=1e-4), scale

    def by_hand(x, t):
        c, u = (score.network(x, t, torch.full((len(x),), label)) for label in (7, 10))
        return u + 3 * (c - u)

    x = sample(sde, as_score(by_hand, sde, predicts="eps"), (3, 1, 8, 8), nfe=4, seed=0)
    assert torch.allclose(draws[3], x, atol=1e-4)
    assert (draws[3] - draws[1]).square().mean().sqrt() > 0.1


def test_a_model_that_never_was_without_labels_is_not_asked_without(tmp_path, capsys):
    out, score = tmp_path / "run", str(tmp_path / "run" / "score.safetensors")
    run(f"train --steps 3 --overfit 32 --conditional --label-drop 0 --out {{out}} {SMALL}", out=out)
    run("sample {score} --number 2 --nfe 2 --label 7 --out {out} --device cpu", score=score, out=tmp_path / "s")
    for flags, way in (("", "give --label"), ("--label 7 --guidance 2", "leave --guidance out")):
        draw = f"sample {{score}} --number 2 --nfe 2 {flags} --out {{out}} --device cpu"
        refused(capsys, draw, f"never trained without labels: {way}", score=score, out=out)


def test_nll_of_vectors_is_the_density_s(tmp_path, capsys):
    """A Gaussian learnt in a few steps: nats near its entropy, which both a sign and a missing term would miss."""
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 1
    np.save(tmp_path / "x.npy", x.numpy())
    flags = "--steps 400 --batch 256 --lr 1e-2 --ema 0.98 --network-args width=32 layers=2 --device cpu"
    run(f"train --data {{data}} {flags} --out {{out}}", data=tmp_path / "x.npy", out=tmp_path / "run")
    capsys.readouterr()
    score = str(tmp_path / "run" / "score.safetensors")
    run("nll {score} --data {data} --number 500 --probes 0 --device cpu", score=score, data=tmp_path / "x.npy")
    printed = capsys.readouterr().out
    assert "nats" in printed
    truth = GaussianMixture(torch.ones(1, 2), 0.25 * torch.eye(2)[None])
    assert float(printed.split()[0]) == pytest.approx(-float(truth.log_prob(x[:500]).mean()), abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--process", "VPSD"], "did you mean 'VPSDE'"),
        (["train", "--process-args", "beta_mx=3"], "did you mean 'beta_max'"),
        (["train", "--objective", "denoise"], "did you mean 'denoising'"),
        (["train", "--weighting", "minsnr"], "did you mean 'min_snr'"),
        (["train", "--network", "MLP"], "does not fit items"),
        (["train", "--network-args", "widht=3"], "not \\['widht'\\]"),
        (["train", "--data", "nowhere"], "'nowhere' is none"),
        (["train", "--overfit", "5000"], "1797"),
        (["train", "--overfit", "-3"], "number of items must be at least 1"),
        (["train", "--size", "32"], "size, channels and skip_bad are for a folder"),
        (["train", "--sigma-data", "0.5"], "set predicts to x0, got v"),
        (["train", "--objective", "sliced", "--weighting", "edm"], "weighting is of denoising"),
        (["train", "--times", "table"], "BetaTable, SigmaTable.*got VPSDE"),
        (["train", "--label-drop", "1.5"], "label_drop must be a fraction"),
        (["train", "--device", "nosuch"], "device 'nosuch' cannot be used"),
        (["nll", DIGITS, "--data", "digits", "--batch", "0"], "--batch must be at least 1"),
        (["nll", DIGITS, "--data", "x.npy"], "holds items .* of None levels .*, and .* 17"),
        (["nll", DIGITS], "config"),
        (["sample", DIGITS, "--number", "0"], "--number must be at least 1"),
        (["sample", DIGITS, "--label", "3"], "--label must be one of .* 0 classes, got 3; sdekit train --conditional"),
        (["sample", DIGITS, "--label", "3", "--guidance", "2"], "--label must be one of .* 0 classes"),
        (["sample", DIGITS, "--guidance", "2"], "give --label too"),
        (["sample", CONDITIONAL, "--label", "10"], "--label must be one of .* 10 classes, got 10"),
        (["sample", CONDITIONAL, "--label", "3", "--guidance", "nan"], "scale must be a finite number"),
        (["sample", "nothing.safetensors"], "no checkpoint at nothing"),
        (["check", "nothing.safetensors"], "no checkpoint at nothing"),
        (["check", DIGITS], "config"),
        (["check", DIGITS, "--data", "digits", "--out", "a.txt"], "must end in .html or .json, got 'a.txt'"),
        (["check", DIGITS, "--data", "flat.npy"], "flat.npy holds items .*, and .* is of .1, 8, 8"),
        (["check", DIGITS, "--data", "digits", "--samples", "2"], "samples must be at least 16"),
        (["check", "."], ". must hold unet/ or transformer/, and scheduler/"),
        (["compare", DIGITS, "--nfe", "1"], "nfe must be at least 2"),
        (["compare", DIGITS, "--number", "1"], "--number must be at least 2"),
        (["compare", DIGITS, "--figure", "a.gif"], "must end in .png or .svg, got 'a.gif'"),
        (["compare", DIGITS, "--calibration", "a.json"], "a.json"),
        (["compare", DIGITS, "--guidance", "2"], "give --label too"),
        (["compare", DIGITS, "--features", "nosuch.pth"], "nosuch.pth"),
        (["calibrate", DIGITS, "--nfe", "1", "--out", "a.json"], "nfe must be at least 2"),
        (["calibrate", DIGITS, "--nfe", "4", "--out", "a.csv"], "must end in .json, got 'a.csv'"),
    ],
)
def test_bad_input_ends_with_a_line_that_names_it(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((200, 1, 8, 8), np.float32))
    np.save("flat.npy", np.zeros((200, 3), np.float32))
    out = ["--out", "run", "--steps", "1"] if arguments[0] == "train" else []
    device = [] if "--device" in arguments else ["--device", "cpu"]
    refused(capsys, " ".join([*arguments, *out, *device]), f"^sdekit {arguments[0]}: .*{message}")


def test_check_says_by_its_status_whether_all_is_right(tmp_path, capsys):
    run("check {score} --data digits --no-search --out {out} --device cpu", score=DIGITS, out=tmp_path / "r.json")
    printed = capsys.readouterr().out
    assert "ok: " in printed
    assert "NOT ok" not in printed
    process, score = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert process["ok"]
    assert score["ok"]

    rng = np.random.default_rng(0)
    np.save(tmp_path / "noise.npy", rng.normal(size=(64, 1, 8, 8)).astype(np.float32))
    with pytest.raises(SystemExit) as ended:
        run("check {score} --data {data} --no-search --device cpu", score=DIGITS, data=tmp_path / "noise.npy")
    assert ended.value.code == 1
    assert "NOT ok" in capsys.readouterr().out


def test_check_gives_labels_to_a_model_that_knows_them(capsys):
    run("check {score} --data digits --no-search --device cpu", score=CONDITIONAL)
    assert "pass  conditions" in capsys.readouterr().out


def test_a_classifier_is_no_score(tmp_path, capsys):
    network = build("Classifier", dim=2, classes=2, width=8, layers=1)
    save_checkpoint(tmp_path / "c.safetensors", network, VPSDE(), "log_prob", event=(2,))
    for command in ("check {score} --data digits", "compare {score}"):
        refused(capsys, f"{command} --device cpu", "holds a classifier", score=tmp_path / "c.safetensors")


def test_calibrate_and_compare(tmp_path, capsys):
    """Fitted a little, kept, compared; and compared again with it beside the rows."""
    paths = {"score": tmp_path / "s.safetensors", "fit": tmp_path / "new" / "three.json", "out": tmp_path / "c.json"}
    save_checkpoint(paths["score"], build("MLP", dim=2, width=8, layers=1), VPSDE(), "v", event=(2,))
    flags = "--nfe 3 --noises 8 --iterations 2 --batch 4 --seed 1 --device cpu"
    run(f"calibrate {{score}} {flags} --out {{fit}}", **paths)
    assert "of the best fixed row's" in capsys.readouterr().out
    assert load_calibration(paths["fit"]).nfe == 3
    flags = "--nfe 3 --number 8 --seconds 60 --device cpu"
    run(f"compare {{score}} {flags} --calibration {{fit}} --out {{out}}", **paths)
    printed = capsys.readouterr().out
    assert "| three.json |" in printed
    assert "best: " in printed
    assert json.loads(paths["out"].read_text(encoding="utf-8"))["settings"]["samples"] == 8


def test_compare_of_a_label_with_guidance(capsys):
    run(
        "compare {score} --label 3 --guidance 2 --nfe 3 --number 2 --features digits --seconds 60 --device cpu",
        score=CONDITIONAL,
    )
    assert "best: " in capsys.readouterr().out


def test_a_refused_run_leaves_the_one_that_is_there(tmp_path, capsys):
    flags = f"train --steps 1 --overfit 16 --out {tmp_path / 'run'} {SMALL}"
    run(flags)
    refused(capsys, f"{flags} --weighting edm", "--resume")
    refused(capsys, f"{flags} --weighting edm --resume", r"weighting = 'simple' \(now 'edm'\)")
    (tmp_path / "run" / "score.safetensors").unlink()  # as if it had been killed between the state and this
    run(f"{flags} --resume")
    assert (tmp_path / "run" / "score.safetensors").is_file()


def test_resuming_with_another_config_needs_its_name(tmp_path, capsys):
    out = tmp_path / "run"
    flags = f"train --overfit 16 --out {out} {SMALL}"
    run(f"{flags} --steps 1")
    run(f"{flags} --steps 1 --resume --every 3")
    new = f"{flags} --steps 3 --weighting edm"
    way = r"steps = 1 \(now 3\), weighting = 'simple' \(now 'edm'\); .*\(--change steps weighting\)"
    refused(capsys, f"{new} --resume", way)
    refused(capsys, f"{new} --resume --change weighting", r"with steps = 1 \(now 3\).*\(--change weighting steps\)")
    refused(capsys, f"{new} --change weighting steps", r"pass resume=True \(--resume\) too")
    refused(capsys, f"{new} --resume --change predicts", "change cannot name predicts: .*--init")
    refused(capsys, f"{new} --resume --predicts eps", "predicts cannot change in a run: .*--init")
    refused(capsys, f"{new} --resume --change weigting", "did you mean 'weighting'")
    capsys.readouterr()
    run(f"{new} --resume --change weighting steps")
    lines = ["step 1: steps 3, was 1", "step 1: weighting 'edm', was 'simple'"]
    assert (out / "log.txt").read_text().splitlines() == lines
    assert parsed("--config", str(out / "score.safetensors")).weighting == "edm"
    run(f"{new} --resume")


def test_images_that_are_gone_do_not_end_a_run(tmp_path, capsys):
    """One that cannot be read stops it; without it the run goes on as one of other data."""
    images = tmp_path / "images"
    images.mkdir()
    for k in range(5):
        Image.fromarray(np.full((8, 8), 40 * k, np.uint8)).save(images / f"{k}.png")
    flags = f"train --data {images} --size 8 --channels 1 --every 1 --out {tmp_path / 'run'} {SMALL}".replace("16", "2")
    run(f"{flags} --steps 1")
    (images / "2.png").write_bytes(b"broken")
    refused(capsys, f"{flags} --steps 4 --resume --change steps", "cannot identify image file")
    (images / "2.png").unlink()
    refused(capsys, f"{flags} --steps 4 --resume --change steps", r"items = 5 \(now 4\).*\(--change steps data\)")
    run(f"{flags} --steps 4 --resume --change steps data")
    said = (tmp_path / "run" / "log.txt").read_text()
    assert re.search("^step [12]: items 4, was 5$", said, re.M), said


def test_a_run_begins_with_the_weights_of_a_checkpoint(tmp_path, capsys):
    """And its config, with init in it, is that of the run when it goes on."""
    a, b = tmp_path / "a", tmp_path / "b"
    run(f"train --overfit 16 --steps 2 --out {a} {SMALL}")
    flags = f"--config {a / 'score.safetensors'} --lr 1e-30 --device cpu"
    run(f"train {flags} --init {a / 'score.safetensors'} --steps 1 --out {b}")
    weights = [safetensors.torch.load_file(folder / "score.safetensors") for folder in (a, b)]
    assert all(torch.allclose(w, weights[1][name], rtol=0, atol=1e-20) for name, w in weights[0].items())
    run(f"train --config {b / 'score.safetensors'} --resume --out {b} --device cpu")
    refused(capsys, f"train {flags} --init nowhere.safetensors --out {tmp_path / 'c'}", "no checkpoint at nowhere")


def test_every_process_trains_and_comes_back(tmp_path, capsys):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32))
    tables = {"BetaTable": "betas=[0.1,0.2,0.4]", "SigmaTable": "sigmas=[0.1,1.0,3.0]"}
    for process in ("VPSDE", "SubVPSDE", "VESDE", "HeatODE", "RectifiedFlow", "CosineVP", *tables):
        more = f"--process-args {tables[process]} --times table" if process in tables else ""
        out = tmp_path / process
        flags = f"--process {process} {more} --steps 2 --batch 8 --network-args width=8 --device cpu"
        run(f"train --data {{data}} {flags} --out {{out}}", data=tmp_path / "x.npy", out=out)
        sde, _ = load_checkpoint(out / "score.safetensors")
        assert type(sde).__name__ == process
    flags = f"train --data {{data}} --process RectifiedFlow --predicts eps --out {tmp_path / 'no'}"
    refused(capsys, flags, "zero terminal SNR.*predicts eps says nothing of x_0 there", data=tmp_path / "x.npy")


def torchrun(processes, flags):
    if processes == 1:  # this one
        main(flags.split())
        return
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
    command = [sys.executable, *launch, "-m", "sdekit", *flags.split()]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_two_processes_do_what_one_does(tmp_path):
    """gloo on the CPU: the same draws, so the same losses but for rounding; and the same samples, bit for bit."""
    for world in (1, 2):
        torchrun(world, f"train --steps 60 --warmup 0 --every 30 --overfit 200 --out {tmp_path / str(world)} {SMALL}")
    states = [safetensors.torch.load_file(tmp_path / f"{w}" / "state-000000060.safetensors") for w in (1, 2)]
    one, two = (state["losses"] for state in states)
    assert one.shape == two.shape == (60,)
    assert torch.allclose(one, two, rtol=1e-4)
    assert one[-10:].mean() < 0.8 * one[:10].mean()  # and it learnt
    for part in ("network.", "average."):
        a, b = (torch.cat([w.flatten() for name, w in s.items() if name.startswith(part)]) for s in states)
        assert (a - b).norm() < 0.01 * a.norm(), part  # AdamW makes whole steps of gradients that are rounding alone
    score = tmp_path / "1" / "score.safetensors"
    for world in (1, 2):
        flags = f"--number 11 --batch 4 --nfe 5 --out {tmp_path / f's{world}'} --device cpu"
        torchrun(world, f"sample {score} {flags}")
    a, b = (np.load(tmp_path / f"s{w}.npz")["x"] for w in (1, 2))
    assert a.shape == (11, 1, 8, 8)
    assert np.array_equal(a, b)
