"""A step whose gradient is not finite is no step; a run that has no other ends, with its last good weights."""

import copy
import csv
import math

import pytest
import torch
from torch import nn

from sdekit import VPSDE, as_score
from sdekit.training.networks import build, seeded
from sdekit.training.state import states
from sdekit.training.steps import Steps
from sdekit.training.trainer import train

DATA = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))


class Normed(nn.Module):
    """With weights, and with buffers that a call changes."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm, self.out = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.norm(self.inner(x)))


def everything(stepper):
    moments = {i: dict(s) for i, s in stepper.optimizer.state_dict()["state"].items()}
    return copy.deepcopy((dict(stepper.network.state_dict()), moments))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


def flat(y):
    return [leaf for value in y for leaf in flat(value)] if isinstance(y, list | tuple) else (
        flat(list(y.values())) if isinstance(y, dict) else [y]
    )  # fmt: skip


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_leaves_every_bit_as_it_was(fused, bad):
    """``fused``: as on a GPU, where nobody looks at the norm; here by the same kernels of the CPU."""
    stepper = Steps(seeded(Normed, 0, {}), 1e-2, 0.1, 1.0, fused=fused)

    def step(x):
        stepper.begin(1e-2)
        return stepper.take(stepper.network(x).square().mean())

    for k in range(3):
        step(DATA[8 * k : 8 * k + 8])
    before = everything(stepper)
    worse = DATA[:8].clone()
    worse[0, 0] = bad
    assert not math.isfinite(step(worse))
    assert same(before, everything(stepper))
    assert math.isfinite(step(DATA[:8]))
    after = everything(stepper)
    assert not same(before, after)

    other = Steps(seeded(Normed, 0, {}), 1e-2, 0.1, 1.0, fused=fused)  # which never saw it
    for x in (DATA[:8], DATA[8:16], DATA[16:24], DATA[:8]):
        other.begin(1e-2)
        other.take(other.network(x).square().mean())
    assert same(everything(other), after)


class Odd(nn.Module):
    """``bad(step)`` -> what a network's output is multiplied by; ``held``: its weight before the first bad step."""

    held = None

    def __init__(self, bad):
        super().__init__()
        self.bad, self.calls, self.weight = bad, 0, nn.Parameter(torch.full((2, 2), 0.1))

    def forward(self, x, t):
        self.calls += 1
        factor = self.bad(self.calls)
        if factor != 1 and self.held is None:
            self.held = self.weight.detach().clone()
        return x @ self.weight * factor


def run(bad, **options):
    network = Odd(bad)
    return network, train(network, VPSDE(), DATA, **({"batch": 8, "warmup": 0, "device": "cpu"} | options))


def test_some_bad_steps_are_skipped_and_said(tmp_path, caplog):
    bad = (12, 13, 40)
    network, trained = run(lambda step: math.nan if step in bad else 1, steps=60, out=tmp_path)
    assert torch.isfinite(network.weight).all()
    assert (~torch.isfinite(trained.losses)).nonzero().flatten().tolist() == [step - 1 for step in bad]
    line = "step 50: 3 of the last 50 steps skipped: gradients not finite, first at step 12"
    assert (tmp_path / "log.txt").read_text() == line + "\n"
    assert [record.getMessage() for record in caplog.records] == [line]
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    finite = trained.losses[:50][torch.isfinite(trained.losses[:50])]
    assert float(rows[0]["loss"]) == pytest.approx(float(finite.mean()), rel=1e-5)


def test_a_saved_step_may_be_a_bad_one(tmp_path):
    """Looks are at every save too, and one bad step is not the end."""
    _, trained = run(lambda step: math.nan if step == 7 else 1, steps=10, every=1, out=tmp_path)
    assert (~torch.isfinite(trained.losses)).nonzero().flatten().tolist() == [6]
    assert (tmp_path / "log.txt").read_text().startswith("step 7: 1 of the last 1 steps skipped")


@pytest.mark.parametrize("every", [7, 1000])
def test_where_all_steps_are_bad_it_stops_with_the_last_good_weights(tmp_path, every):
    network = Odd(lambda step: math.nan if step >= 7 else 1)
    options = {"steps": 200, "batch": 8, "warmup": 0, "device": "cpu", "out": tmp_path, "every": every}
    with pytest.raises(FloatingPointError, match="no step from step 7 to .* finite.*lower lr.*before step 7, the last"):
        train(network, VPSDE(), DATA, lr=0.1, **options)
    assert torch.equal(network.weight, network.held)
    assert network.calls <= 106  # two looks
    if every == 1000:
        assert not states(tmp_path)  # and a new run may begin here
        train(Odd(lambda step: 1), VPSDE(), DATA, **options)
        return
    _, trained = run(lambda step: 1, lr=0.01, resume=True, change=["lr"], **options)
    assert len(trained.losses) == 200
    assert torch.isfinite(trained.losses[-100:]).all()
    assert "lr 0.01, was 0.1" in (tmp_path / "log.txt").read_text()


def test_the_message_says_how_to_go_on(tmp_path):
    with pytest.raises(FloatingPointError, match=r"state-000000007.safetensors goes on .*change=\['lr'\] \(--resume"):
        run(lambda step: math.nan if step >= 8 else 1, steps=99, every=7, out=tmp_path)
    assert [path.name for path in states(tmp_path)] == ["state-000000007.safetensors"]  # no later one is any better
    assert "no step from step 8 to 63 has a finite gradient" in (tmp_path / "log.txt").read_text()


def test_a_run_whose_last_step_is_lost_ends_as_it_would_have(tmp_path):
    """Also where it goes on for this step alone."""

    def scale(step):
        return math.nan if step == 40 else 1

    options = {"steps": 40, "batch": 8, "warmup": 0, "device": "cpu", "every": 39}
    _, whole = run(scale, **options, out=tmp_path / "whole")

    def stop(step, network):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(scale, **options, out=tmp_path / "parts", callback=stop)
    _, rest = run(lambda step: math.nan, **options, out=tmp_path / "parts", resume=True)
    assert torch.equal(whole.losses.isnan(), rest.losses.isnan())
    for a, b in zip(whole.network.parameters(), rest.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_many_skipped_steps_are_counted_in_the_end(caplog):
    with caplog.at_level("WARNING", "sdekit"):
        run(lambda step: math.nan if step % 3 == 0 else 1, steps=60, batch=8, device="cpu")
    assert "20 of 60 steps were skipped: what is learnt is in doubt" in caplog.messages[-1]


def test_what_has_no_gradient_is_said_before_the_first_step():
    class Cut(Odd):
        def forward(self, x, t):
            return super().forward(x, t).detach()

    with pytest.raises(ValueError, match="the loss has no gradient to the network's weights: take no_grad or detach"):
        train(Cut(lambda step: 1), VPSDE(), DATA, steps=2, batch=8, device="cpu")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"leave torch\.inference_mode"):
        train(Odd(lambda step: 1), VPSDE(), DATA, steps=2, batch=8, device="cpu")
    score = as_score(Odd(lambda step: 1), VPSDE(), "v")
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module, got NetworkScore; take score\.network"):
        train(score, VPSDE(), DATA, steps=2, batch=8, device="cpu")


def test_a_loss_that_is_finite_where_its_gradient_is_not_is_told_apart():
    class Rooted(Odd):
        def forward(self, x, t):
            return super().forward(x, t) + (0 * self.weight.sum()).sqrt()  # 0, of slope infinity times 0

    with pytest.raises(FloatingPointError, match=r"set_detect_anomaly.*look for it in the network and in the data"):
        train(Rooted(lambda step: 1), VPSDE(), DATA, steps=5, batch=8, device="cpu")


def test_a_short_run_without_a_good_step_raises_in_the_end():
    with pytest.raises(FloatingPointError, match="from step 1 to 10"):
        run(lambda step: math.inf, steps=10)


class Slope(nn.Module):
    """An output of ordinary size whose gradient is infinite."""

    def __init__(self):
        super().__init__()
        self.w, self.calls = nn.Parameter(torch.ones(1)), 0

    def forward(self, x, t):
        self.calls += 1
        return x * self.w + ((self.w - self.w.detach()).abs().sqrt() if self.calls == 3 else 0)


def test_a_finite_loss_with_an_infinite_gradient_is_skipped(caplog):
    network = Slope()
    trained = train(network, VPSDE(), DATA, steps=10, batch=8, device="cpu")
    assert torch.isfinite(trained.losses).all()
    assert torch.isfinite(network.w).all()
    assert "1 of the last 10 steps skipped: gradients not finite, first at step 3" in caplog.text


def outlier():
    data = DATA.clone()
    data[3] = 1e30  # whose square is no float32
    return data


def test_a_run_that_skips_resumes_with_the_same_bits(tmp_path):
    """Data with one item that overflows, as a broken file has: its batches are skipped, and the rest is learnt."""

    def go(out, stop=None, **more):
        def callback(step, network):
            if step == stop:
                raise KeyboardInterrupt

        network = build("MLP", dim=2, width=16, layers=1)
        options = {"steps": 30, "batch": 8, "every": 10, "device": "cpu", "callback": callback, "out": out}
        return network, train(network, VPSDE(), outlier(), **options, **more)

    network, whole = go(tmp_path / "whole")
    assert int((~torch.isfinite(whole.losses)).sum()) == 6  # once in an epoch of five steps
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "parts", stop=20)
    again, rest = go(tmp_path / "parts", resume=True)
    assert torch.equal(whole.losses.nan_to_num(), rest.losses.nan_to_num())
    for a, b in ((network, again), (whole.network, rest.network)):
        assert all(torch.equal(u, v) for u, v in zip(a.parameters(), b.parameters(), strict=True))
        assert all(torch.isfinite(u).all() for u in a.parameters())


def test_an_infinite_loss_is_skipped_though_its_slope_is_finite():
    stepper = Steps(seeded(Normed, 0, {}), 1e-2, 0.0, 1.0)
    before = everything(stepper)
    stepper.begin(1e-2)
    loss = stepper.network(DATA).mean() + torch.tensor(math.inf)
    assert not math.isfinite(stepper.take(loss))
    assert same(before, everything(stepper))
