"""A classifier of noisy data learns log p_t(y|x): against a mixture's own, through files, and as a guide."""

import math

import pytest
import torch

from sdekit import VPSDE, GaussianMixture, HeatODE, guidance, sample
from sdekit.cli import main
from sdekit.training import build, classification, load_checkpoint, save_checkpoint, train

SDE = VPSDE()
ONES = [
    GaussianMixture([[-1.0, 0.3]], [[[0.3, 0.1], [0.1, 0.2]]]),
    GaussianMixture([[0.8, 0.0]], [[[0.2, 0], [0, 0.5]]]),
]
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)
BOTH = GaussianMixture(torch.cat([g.means for g in ONES]), torch.cat([g.covs for g in ONES]), WEIGHTS)


def labelled(n, seed):
    """Data, and the component that each is of."""
    counts = [round(0.3 * n), n - round(0.3 * n)]
    x = torch.cat([g.sample(k, seed=seed + j) for j, (g, k) in enumerate(zip(ONES, counts, strict=True))])
    return x, torch.arange(2).repeat_interleave(torch.tensor(counts))


def exact(sde, x, t):
    """log p_t(y|x) of both labels, (B, 2)."""
    parts = [w.log() + g.at(sde, t).log_prob(x.double()) for w, g in zip(WEIGHTS, ONES, strict=True)]
    return torch.stack(parts, 1).log_softmax(1)


def fitted(sde=SDE, **kwargs):
    x, labels = labelled(4000, 0)
    network = build("Classifier", dim=2, classes=2, width=32, layers=2)
    options = {"steps": 1500, "batch": 512, "lr": 5e-3, "label_drop": 0.0, "objective": classification(), **kwargs}
    return train(network, sde, x, labels=labels, **options)


@pytest.fixture(scope="module")
def classifier():
    return fitted().network


@pytest.mark.parametrize("t", [0.01, 0.1, 0.3, 0.6, 0.9])
def test_it_learns_what_noisy_data_say_of_their_labels(classifier, t):
    """On 20,000 new data, at every t, the cross-entropy is within .01 nats of the exact one, the least."""
    x, labels = labelled(20_000, 10)
    x = SDE.perturb(x, t, seed=3)
    want = exact(SDE, x, t)
    said = torch.stack([classifier(x, torch.tensor(t), torch.full((len(x),), k)) for k in (0, 1)], 1)
    torch.testing.assert_close(said.exp().sum(1), torch.ones(len(x)))
    least = -want[torch.arange(len(x)), labels].mean()
    assert abs(float(-said[torch.arange(len(x)), labels].mean()) - float(least)) < 0.01
    assert float((want.exp() * (want - said)).sum(1).mean()) < 0.01
    if t == 0.01:
        assert float(least) < 0.2  # where labels are all but known; knowing nothing is .61
    if t == 0.9:
        assert float(least) > 0.55


def test_it_guides_an_unconditional_model_to_a_component(classifier):
    """Means and spreads within a tenth, at scale 1; each label goes with its samples."""
    labels = torch.arange(2).repeat(1500)
    guided = guidance.classifier_guidance(BOTH.score(SDE), classifier, given=(labels,))
    x = sample(SDE, guided, (3000, 2), "unipc_2", steps=20, seed=0, dtype=torch.float64)
    for k, g in enumerate(ONES):
        mine = x[labels == k]
        assert float((mine.mean(0) - g.means[0]).abs().max()) < 0.1
        assert float((mine.T.cov() - g.covs[0]).abs().max()) < 0.1


def test_it_comes_back_from_a_file_as_what_guides(tmp_path, classifier, capsys):
    path = tmp_path / "classifier.safetensors"
    save_checkpoint(path, classifier, SDE, "log_prob", event=(2,))
    sde, log_prob = load_checkpoint(path)
    x, labels = labelled(10, 0)
    t = torch.linspace(0.1, 0.9, 10, dtype=torch.float64)
    assert torch.equal(log_prob(x, t, labels), classifier(x, t, labels))
    assert log_prob(x.double(), t[0], labels).dtype == torch.float64
    assert log_prob.event == (2,)
    guided = guidance.classifier_guidance(BOTH.score(sde), log_prob, 2.0, given=(labels,))
    assert guided(x, 0.5).shape == x.shape
    with pytest.raises(SystemExit) as ended:
        main(["sample", str(path), "--number", "2"])
    assert ended.value.code == 2
    assert "holds a classifier, which guides a score" in capsys.readouterr().err
    for network, predicts in ((classifier, "v"), (build("MLP"), "log_prob")):
        with pytest.raises(ValueError, match="a Classifier predicts 'log_prob'"):
            save_checkpoint(path, network, SDE, predicts)


def test_a_run_is_fixed_by_its_seed_and_begins_knowing_nothing():
    sde = HeatODE(T=5.0)
    whole = fitted(sde, steps=40, batch=32, seed=1)
    assert torch.equal(fitted(sde, steps=40, batch=32, seed=1).losses, whole.losses)
    assert not torch.equal(fitted(sde, steps=40, batch=32, seed=2).losses, whole.losses)
    assert float(whole.losses[0]) == pytest.approx(math.log(2), abs=1e-6)


def test_what_is_wrong_is_named(classifier):
    x, labels = labelled(100, 0)
    network = build("Classifier", dim=2)
    with pytest.raises(ValueError, match="classification needs labels"):
        train(network, SDE, x, objective=classification(), label_drop=0.0, steps=1)
    with pytest.raises(ValueError, match="or set it to 0"):
        train(network, SDE, x, labels=labels, objective=classification(), steps=1)
    with pytest.raises(ValueError, match="give it labels, as guidance by given"):
        sample(SDE, guidance.classifier_guidance(BOTH.score(SDE), classifier), (2, 2), steps=2)
