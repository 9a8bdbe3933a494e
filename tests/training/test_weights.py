"""The weights that a run begins with, and those that it leaves alone."""

import pytest
import torch
from torch import nn

from sdekit import VPSDE
from sdekit.training.checkpoint import load_checkpoint, read_tensors, save_checkpoint, write_tensors
from sdekit.training.ema import EMA
from sdekit.training.networks import build, seeded
from sdekit.training.state import FORMAT, states
from sdekit.training.trainer import train

DATA = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


def mlp(seed=0, **sizes):
    return build("MLP", seed=seed, **({"dim": 2, "width": 8, "layers": 1} | sizes))


def run(network, **options):
    return train(network, VPSDE(), DATA, **({"steps": 10, "batch": 8, "warmup": 0, "device": "cpu"} | options))


def equal(a, b):
    return all(torch.equal(u, v) for u, v in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["checkpoint", "run", "a run whose newest state is cut"])
def test_a_run_begins_with_the_weights_of_another(tmp_path, kind):
    """A rate of almost 0 leaves them; of a run it is the averaged ones."""
    before = run(mlp(), out=tmp_path / "a", every=5).network
    path = tmp_path / "a"
    if kind == "checkpoint":
        path = tmp_path / "a.safetensors"
        save_checkpoint(path, before, VPSDE(), "v")
    elif kind != "run":
        newest = states(path)[-1]
        newest.write_bytes(newest.read_bytes()[:500])
        _, tensors = read_tensors(states(path)[0], FORMAT)
        with torch.no_grad():
            for name, weight in before.named_parameters():
                weight.copy_(tensors[f"average.{name}"])
    network = mlp(seed=1)
    trained = run(network, init=path, lr=1e-30, steps=1, out=tmp_path / "b")
    assert equal(network, before)
    assert equal(trained.network, before)
    assert (tmp_path / "b" / "log.txt").read_text() == f"step 0: begins with the weights of {path}\n"


def test_other_predictions_are_said(tmp_path):
    run(mlp(), out=tmp_path / "a")
    run(mlp(), init=tmp_path / "a", predicts="eps", out=tmp_path / "b")
    assert "a, which predicted v\n" in (tmp_path / "b" / "log.txt").read_text()


def test_the_weights_to_begin_with_are_of_the_beginning(tmp_path):
    """A run that goes on has its own: the same flags as at first, or without init; another init is refused."""
    run(mlp(seed=3), out=tmp_path / "a")
    run(mlp(seed=4), out=tmp_path / "other")
    whole = run(mlp(), init=tmp_path / "a", steps=20, out=tmp_path / "whole")

    def stop(step, network):
        if step == 10:
            raise KeyboardInterrupt

    parts, same = tmp_path / "parts", {"steps": 20, "every": 10, "out": tmp_path / "parts"}
    with pytest.raises(KeyboardInterrupt):
        run(mlp(), init=tmp_path / "a", callback=stop, **same)
    with pytest.raises(ValueError, match=r"init = '.*a' \(now '.*other'\); init cannot change in a run"):
        run(mlp(), init=tmp_path / "other", resume=True, **same)
    rest = run(mlp(), resume=True, **same)
    assert torch.equal(rest.losses, whole.losses)
    again = run(mlp(), init=tmp_path / "a", resume=True, **same)
    assert torch.equal(again.losses, whole.losses)
    assert (parts / "log.txt").read_text().count("begins with") == 1
    fresh = run(mlp(), init=tmp_path / "a", steps=20, out=tmp_path / "new", resume=True)  # which holds no run
    assert torch.equal(fresh.losses, whole.losses)


def test_a_run_that_is_there_is_not_begun_again(tmp_path):
    run(mlp(), out=tmp_path)
    network = mlp(seed=2)
    with pytest.raises(FileExistsError):
        run(network, init=tmp_path, out=tmp_path)
    assert not (tmp_path / "log.txt").exists()


@pytest.mark.parametrize("sizes", [{"width": 16}, {"layers": 2}, {"classes": 3}])
def test_weights_of_another_network_are_refused(tmp_path, sizes):
    save_checkpoint(tmp_path / "a", mlp(**sizes), VPSDE(), "v")
    name = {"width": r"first.bias \(16,\) \(here \(8,\)\)", "layers": r"layers.1.bias \(8,\) \(here nowhere\)"}
    message = name.get(next(iter(sizes)), r"time.vectors.weight \(4, 8\) \(here nowhere\)")
    with pytest.raises(ValueError, match=f"init .*a has the weights of another network: {message}"):
        run(mlp(), init=tmp_path / "a")


def test_init_of_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere"):
        run(mlp(), init=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="init must be a checkpoint or a run's folder, and .*has no state"):
        run(mlp(), init=tmp_path / "empty")


class Quantised(nn.Module):
    """A frozen matrix in int8 before a layer that learns."""

    def __init__(self):
        super().__init__()
        codes = torch.arange(-8, 8).reshape(2, 8).to(torch.int8)
        self.codes, self.out = nn.Parameter(codes, requires_grad=False), nn.Linear(8, 2)

    def forward(self, x, t):
        return self.out(torch.tanh(x @ self.codes.to(x.dtype) / 8))


def test_whole_numbers_stay_and_the_rest_learns(tmp_path):
    options = {"steps": 60, "every": 30, "lr": 1e-1, "predicts": "eps"}
    network = seeded(Quantised, 0, {})
    codes, first = network.codes.clone(), network.out.weight.detach().clone()
    trained = run(network, **options, out=tmp_path / "whole")
    for side in (network, trained.network):
        assert side.codes.dtype is torch.int8
        assert torch.equal(side.codes, codes)
        assert not torch.equal(side.out.weight, first)
    assert trained.losses[-20:].mean() < 0.7 * trained.losses[:10].mean()
    again = seeded(Quantised, 0, {})
    states(tmp_path / "whole")[-1].unlink()
    rest = run(again, **options, out=tmp_path / "whole", resume=True)
    assert torch.equal(rest.losses, trained.losses)
    assert torch.equal(again.out.weight, network.out.weight)
    other = seeded(Quantised, 1, {})
    with torch.no_grad():
        other.codes.zero_()
    run(other, steps=1, lr=1e-30, init=tmp_path / "whole")
    assert torch.equal(other.codes, codes)


def test_an_average_copies_whole_numbers():
    network = seeded(Quantised, 0, {})
    average = EMA(network, 0.5)
    with torch.no_grad():
        network.codes.fill_(7)
        network.out.bias.fill_(1.0)
    average.update(network)
    assert (average.network.codes == 7).all()
    assert not torch.equal(average.network.out.weight, torch.ones(2, 8))
    assert 0 < float(average.network.out.bias.mean()) <= 1


def test_frozen_layers_keep_their_bits_and_whole_tensors_their_type(tmp_path):
    network = mlp()
    network.first.requires_grad_(False)
    held = [w.clone() for w in network.first.parameters()]
    trained = run(network, weight_decay=0.1, lr=1e-2, steps=30, out=tmp_path, every=15)
    for side in (network, trained.network):
        assert all(torch.equal(a, b) for a, b in zip(held, side.first.parameters(), strict=True))
    assert not equal(network, mlp())
    save_checkpoint(tmp_path / "a", network, VPSDE(), "v")
    assert equal(load_checkpoint(tmp_path / "a")[1].network, network)
    # thawed, the run goes on: what has no moments yet begins with none
    states(tmp_path)[-1].unlink()
    thawed = mlp()
    run(thawed, weight_decay=0.1, lr=1e-2, steps=30, out=tmp_path, every=15, resume=True)
    assert not torch.equal(thawed.first.weight, held[0])
    write_tensors(tmp_path / "b", {"n": torch.tensor([3]), "w": torch.ones(2)}, "f", {}, torch.float16)
    kept = read_tensors(tmp_path / "b", "f")[1]
    assert (kept["n"].dtype, kept["w"].dtype) == (torch.int64, torch.float32)


def test_a_network_without_a_weight_that_may_learn_is_refused(tmp_path):
    save_checkpoint(tmp_path / "a", mlp(), VPSDE(), "v")
    network = load_checkpoint(tmp_path / "a")[1].network
    with pytest.raises(ValueError, match=r"no weight that requires a gradient .*network.requires_grad_\(True\)"):
        run(network)
    network.requires_grad_(True)
    run(network)
    assert not equal(network, mlp())

    class Codes(Quantised):
        def __init__(self):
            super().__init__()
            del self.out

    with pytest.raises(ValueError, match="network must have weights to train, Codes has none"):
        run(seeded(Codes, 0, {}))
