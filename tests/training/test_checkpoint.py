"""A checkpoint comes back as it was, or says why not; no half-written file, nothing executed."""

import json
import pickle
import struct

import pytest
import safetensors.torch
import torch

from sdekit import VESDE, VPSDE, BetaTable, CosineVP, HeatODE, RectifiedFlow, SigmaTable, SubVPSDE, as_score
from sdekit.training import checkpoint
from sdekit.training.checkpoint import load_checkpoint, save_checkpoint
from sdekit.training.networks import build


def network(seed=0):
    made = build("MLP", dim=2, width=8, layers=1, seed=seed)
    torch.nn.init.constant_(made.last.weight, 0.125)  # zero read-outs would make all checkpoints alike
    return made


def rewrite(path, **changes):
    """The same tensors under another description."""
    about, tensors = checkpoint.read_tensors(path, checkpoint.FORMAT)
    checkpoint.write_tensors(path, tensors, checkpoint.FORMAT, about | changes, torch.float32)


@pytest.mark.parametrize(
    "sde",
    [
        VPSDE(0.2, 15.0),
        SubVPSDE(0.3, 12.0),
        VESDE(0.02, 30.0),
        HeatODE(T=40.0),
        RectifiedFlow(3.0),
        CosineVP(0.01),
        BetaTable(torch.linspace(0.01, 0.3, 30, dtype=torch.float64)),
        SigmaTable([0.1, 0.7, 3.3]),
    ],
    ids=lambda sde: type(sde).__name__,
)
@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_a_score_comes_back_as_it_was(tmp_path, sde, predicts):
    path = tmp_path / "score.safetensors"
    save_checkpoint(path, network(), sde, predicts, event=(2,), data_range=(-1, 1))
    loaded, score = load_checkpoint(path)
    assert type(loaded) is type(sde)
    assert (loaded.T, loaded.t_min) == (sde.T, sde.t_min)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    for t in (0.3 * sde.T, sde.T):
        assert torch.equal(score(x, t), as_score(network(), sde, predicts=predicts)(x, t))
    assert score.event == (2,)
    assert score.data_range == (-1.0, 1.0)


def test_half_precision_is_on_disk_only(tmp_path):
    sizes = {}
    for dtype in (torch.float16, torch.float32):
        path = tmp_path / f"{dtype}"
        save_checkpoint(path, build("MLP", width=128), VPSDE(), "v", dtype=dtype)
        sizes[dtype] = path.stat().st_size
        _, score = load_checkpoint(path)
        assert {weight.dtype for weight in score.network.parameters()} == {torch.float32}
    assert sizes[torch.float16] < 0.6 * sizes[torch.float32]


def test_loading_leaves_the_global_rng(tmp_path):
    save_checkpoint(tmp_path / "a", network(), VPSDE(), "v")
    before = torch.random.get_rng_state()
    load_checkpoint(tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_interrupted_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "score.safetensors"
    save_checkpoint(path, network(), VPSDE(), "v")
    old = path.read_bytes()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, network(1), VPSDE(), "eps")
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_weights_that_overflow_half_precision_are_refused(tmp_path):
    big = network()
    torch.nn.init.constant_(big.last.bias, 1e6)
    with pytest.raises(ValueError, match=r"last\.bias.*float32"):
        save_checkpoint(tmp_path / "a", big, VPSDE(), "v", dtype=torch.float16)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "a"
    save_checkpoint(path, network(), VPSDE(), "v")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated"):
        load_checkpoint(path)


def test_a_foreign_file_is_refused_and_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was run",))

    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="no safetensors file"):
        load_checkpoint(tmp_path / "pickle")
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="format None"):
        load_checkpoint(tmp_path / "other")


def test_the_file_is_plain_safetensors_with_json(tmp_path):
    save_checkpoint(tmp_path / "a", network(), VPSDE(0.2, 15.0), "v")
    raw = (tmp_path / "a").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    about = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["about"])
    assert about["process"] == {"name": "VPSDE", "arguments": {"beta_min": 0.2, "beta_max": 15.0}}
    assert about["network"]["name"] == "MLP"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process": {"name": "VPSED", "arguments": {}}}, "did you mean 'VPSDE'"),
        ({"process": {"name": "VPSDE", "arguments": {"beta_min": 0.1}}}, "beta_max"),
        ({"process": {"name": "VPSDE", "arguments": {"beta_min": 20.0, "beta_max": 0.1}}}, "beta_min"),
        ({"process": None}, "rebuilt"),
        ({"network": {"name": "Transformer", "arguments": {}}}, "unknown network"),
        ({"network": {"name": "MLP", "arguments": {"dim": 2, "width": 16, "layers": 1}}}, "size mismatch"),
        ({"predicts": "y"}, "unknown prediction"),
    ],
)
def test_a_description_that_cannot_be_rebuilt_is_named(tmp_path, changes, message):
    path = tmp_path / "a"
    save_checkpoint(path, network(), VPSDE(), "v")
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path)


class Mine(VPSDE):
    pass


def late():
    sde = VPSDE()
    sde.t_min = 1e-2
    return sde


@pytest.mark.parametrize("sde", [HeatODE(sigma=lambda t: 2 * t), Mine(), late()], ids=["sigma", "subclass", "t_min"])
def test_a_process_that_a_name_and_numbers_do_not_make_is_refused(tmp_path, sde):
    with pytest.raises(ValueError, match="saved"):
        save_checkpoint(tmp_path / "a", network(), sde, "eps")
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_another_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Identity"):
        save_checkpoint(tmp_path / "a", torch.nn.Identity(), VPSDE(), "v")
