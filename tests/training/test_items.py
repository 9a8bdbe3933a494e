"""What a network is told in training is what belongs to the very items that it sees; what cannot be told is refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from sdekit import VPSDE, GaussianMixture, as_score
from sdekit.training import classification
from sdekit.training.networks import build, seeded
from sdekit.training.trainer import train

SDE = VPSDE()
N = 60
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
VECTOR, IMAGE = 3 * X, X[:, :, None, None].expand(N, 2, 2, 2).clone()
LABELS = torch.arange(N) % 3


class Items(Dataset):
    """Item i as ``make(i)``."""

    def __init__(self, make, n=N):
        self.make, self.n = make, n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return self.make(i)


class Watch(nn.Module):
    """Keeps what it is told."""

    def __init__(self, classes=None, dtype=torch.float32):
        super().__init__()
        self.told, self.weight, self.classes = [], nn.Parameter(torch.ones(1, dtype=dtype)), classes

    def forward(self, x, t, *conditions):
        self.told.append(conditions)
        return x * self.weight

    def columns(self):
        return [torch.cat(column) for column in zip(*self.told, strict=True)]


class Sees(Watch):
    """Keeps x_0 too, which almost is x_t at times near 0."""

    def forward(self, x, t, *conditions):
        self.told.append((x.detach(), *conditions))
        return x * self.weight


def told(data, labels=None, network=None, **options):
    network = network or Sees()
    options = {"steps": 6, "batch": 20, "times": lambda u: 1e-5 + 0 * u, "device": "cpu"} | options
    train(network, SDE, data, labels=labels, **options)
    return network.columns()


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("make", "tensors", "of_x"),
    [
        (lambda i: (X[i], VECTOR[i]), VECTOR, [lambda x: 3 * x]),
        (lambda i: (X[i], IMAGE[i]), (IMAGE,), [lambda x: x[:, :, None, None].expand(-1, 2, 2, 2)]),
        (
            lambda i: (X[i].numpy(), VECTOR[i].numpy(), float(X[i, 0])),
            (VECTOR, X[:, 0]),
            [lambda x: 3 * x, lambda x: x[:, 0]],
        ),
    ],
    ids=["vector", "image", "two"],
)
def test_every_condition_is_that_of_its_item(make, tensors, of_x, workers):
    """Of a dataset and of a tensor, the same; floating ones in the weights' dtype."""
    columns = told(Items(make), workers=workers)
    x, *conditions = columns
    for found, expected in zip(conditions, of_x, strict=True):
        assert found.dtype is torch.float32
        torch.testing.assert_close(found, expected(x), atol=0.1, rtol=0)  # sigma(t_min) is 1e-3 or so
    if not workers:
        same = told(X, tensors)
        assert all(torch.equal(a, b) for a, b in zip(columns, same, strict=True))


def test_float64_conditions_come_in_the_weights_dtype():
    _, vector, flag = told(Items(lambda i: (X[i], VECTOR[i].double(), i % 2 == 0)), network=Sees(dtype=torch.float64))
    assert (vector.dtype, flag.dtype) == (torch.float64, torch.bool)
    assert told(X, VECTOR.double())[1].dtype is torch.float32


def test_only_the_class_label_is_dropped():
    """The first whole numbers (b,); no vector of them, no floating number, no second one."""
    pairs = torch.stack([LABELS, LABELS], 1)
    columns = told(X, (VECTOR, pairs, LABELS, 100 + LABELS), Watch(classes=3), steps=60, label_drop=0.5)
    vector, pair, label, second = columns
    dropped = label == 3
    assert dropped.double().mean() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(60 * 20))
    assert torch.equal(pair[:, 0], second - 100)
    assert torch.equal(label[~dropped], pair[~dropped, 0])
    assert set(vector.flatten().tolist()) == set(VECTOR.flatten().tolist())


def test_without_class_labels_nothing_has_to_stand_for_none():
    assert len(told(X, VECTOR)) == 2  # label_drop is 0.1
    assert len(told(Items(lambda i: (X[i], VECTOR[i])))) == 2


@pytest.mark.parametrize("kind", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_every_width_are_labels(kind):
    (label,) = told(X, LABELS.to(kind), Watch(classes=3), steps=60, label_drop=0.2)
    assert label.dtype is torch.int64
    assert set(label.tolist()) == {0, 1, 2, 3}


class Linear(nn.Module):
    """Of x, c and features of t."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, t, c):
        t = t[:, None]
        return self.inner(torch.cat([x, c, t, torch.sin(math.pi * t), torch.cos(math.pi * t)], 1))


@pytest.mark.parametrize("dataset", [False, True])
def test_the_score_of_a_linear_gaussian_model_given_its_condition(dataset):
    """c ~ N(0, 1), x|c ~ N(c, 0.3^2): for each c the score of its own Gaussian, far from that of all x."""
    c, noise = torch.randn(2, 4000, 1, generator=torch.Generator().manual_seed(1))
    x = c + 0.3 * noise
    data = (TensorDataset(x, c), None) if dataset else (x, c)
    network = seeded(Linear, 0, {})
    trained = train(network, SDE, data[0], labels=data[1], steps=600, batch=256, lr=5e-3, ema=0.99, device="cpu")
    score = as_score(trained.network, SDE, predicts="v")
    grid, t = torch.linspace(-1.5, 1.5, 31)[:, None], 0.3

    def exact(mean, variance):
        return GaussianMixture([[mean]], [[[variance]]]).score(SDE)(grid, t)

    for value in (-1.0, 0.0, 1.0):
        with torch.no_grad():
            found = score.given(torch.full((31, 1), value))(grid, t)
        apart = (exact(value, 0.09) - exact(0.0, 1.09)).square().mean().sqrt()
        assert (found - exact(value, 0.09)).square().mean().sqrt() < 0.15 * apart, value


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


class Endless(Dataset):
    def __getitem__(self, i):
        return X[i]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (DataLoader(TensorDataset(X)), TypeError, r"got a DataLoader: pass its dataset \(loader.dataset\) and batch="),
        (Stream(), TypeError, r"got Stream: give it __len__ and __getitem__, or pass list\(data\)"),
        (iter(X), TypeError, r"a length and items by number, got generator|got .*iterator"),
        (Endless(), TypeError, "got Endless: give it __len__"),
        ({"x": X}, TypeError, "got dict"),
        ([], ValueError, "at least one item, got an empty list"),
        (Items(lambda i: {"image": X[i], "label": 0}), TypeError, "a dict of 'image', 'label': return a tuple of its"),
        (Items(lambda i: (X[i], None)), TypeError, "its entry 1 is None: leave it out"),
        (Items(lambda i: (X[i], 0.0 if i % 2 else None)), TypeError, "its entry 1 is None"),
        (Items(lambda i: (X[i], "a cat")), TypeError, "its entry 1 is the text 'a cat': return numbers"),
        (Items(lambda i: (X[i], (VECTOR[i], 1))), TypeError, "its entry 1 is a tuple: put what is in it side by side"),
        (Items(lambda i: (X[i], object())), TypeError, "its entry 1 is a object: make a tensor of it"),
        (Items(lambda i: (X[i], *range(i % 2))), ValueError, "as many entries each"),
        (Items(lambda i: (X[i], X[i, : 1 + i % 2])), ValueError, r"their entry 1 has \(1,\) and \(2,\)"),
        (Items(lambda i: (X[i], X[i] / 0)), ValueError, "condition 1 of the data holds .* non-finite"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused_in_words(data, error, message):
    with pytest.raises(error, match=message):
        told(data)


def test_a_list_of_items_is_a_dataset():
    a, b = told([(x, c) for x, c in zip(X, VECTOR, strict=True)]), told(X, VECTOR)
    assert all(torch.equal(u, v) for u, v in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (LABELS[:-1], ValueError, "one for each item of a data tensor"),
        ((VECTOR, LABELS[:-1]), ValueError, "one for each item of a data tensor"),
        (LABELS.tolist(), TypeError, "a tensor or a tuple of tensors, got int"),
        (LABELS.numpy(), TypeError, "got ndarray: use torch.tensor"),
        (VECTOR / 0, ValueError, "condition 1 of the data holds"),
        (LABELS - 1, ValueError, r"labels must be 0 ... 2, or 3 for none of them, got -1"),
        ((VECTOR, LABELS + 2), ValueError, "labels must be 0 ... 2, or 3 for none of them, got 4"),
        (LABELS + 1, ValueError, "labels must count from 0, got 1 ... 3, .*subtract 1"),
    ],
)
def test_labels_that_cannot_be_are_refused_before_the_first_step(labels, error, message):
    network = Watch(classes=3)
    with pytest.raises(error, match=message):
        told(X, labels, network)
    assert not network.told


@pytest.mark.parametrize("label", [-1, 4, np.int64(7)])
def test_labels_of_a_dataset_are_looked_at_batch_by_batch(label):
    network = build("MLP", dim=2, width=8, layers=1, classes=3)
    with pytest.raises(ValueError, match=f"labels must be 0 ... 2, or 3 for none of them, got {label}"):
        told(Items(lambda i: (X[i], label if i == 17 else 0)), network=network)


@pytest.mark.parametrize("label", [-1, 12])
def test_a_label_out_of_range_is_named_when_sampling(label):
    score = as_score(build("MLP", dim=2, width=8, layers=1, classes=10), SDE, predicts="v")
    assert score.given(10)(X, 0.5).shape == X.shape  # which stands for none
    with pytest.raises(ValueError, match=f"labels must be 0 ... 9, or 10 for none of them, got {label}"):
        score.given(label)(X, 0.5)


def test_a_classifier_has_no_label_for_none():
    network = build("Classifier", dim=2, classes=3, width=8, layers=1)
    with pytest.raises(ValueError, match="labels must be 0 ... 2, got 3; or build"):
        train(network, SDE, X, labels=LABELS + 1, objective=classification(), label_drop=0.0, device="cpu")


@pytest.mark.parametrize(
    "data", [(255 * torch.rand(8, 2, generator=torch.Generator())).byte(), torch.arange(16).reshape(8, 2)]
)
def test_levels_are_to_be_scaled(data):
    """What .float() alone would make of them is far from unit size."""
    for given in (data, TensorDataset(data)):
        with pytest.raises(TypeError, match=r"about unit size, got torch\.(uint8|int64): scale levels to \[-1, 1\]"):
            train(build("MLP", dim=2, width=8, layers=1), SDE, given, steps=1, batch=4, device="cpu")


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.uint16])
def test_labels_in_a_column_are_refused(kind):
    """(N, 1) would reach the network, and never be dropped."""
    network = build("MLP", dim=2, width=8, layers=1, classes=3)
    column = LABELS[:, None].to(kind)
    for data, labels in ((X, column), (TensorDataset(X, column), None)):
        with pytest.raises(ValueError, match=r"whole numbers \(.*, 1\), and class labels are.*take squeeze\(1\)"):
            train(network, SDE, data, labels=labels, steps=1, batch=4, device="cpu")
    seen = Watch(classes=3)  # where nothing is to be dropped they are the network's own affair
    train(seen, SDE, X, labels=column, label_drop=0.0, steps=1, batch=4, device="cpu")


def test_unsigned_labels_are_labels():
    network = build("MLP", dim=2, width=8, layers=1, classes=3)
    with pytest.raises(ValueError, match="labels must"):
        train(network, SDE, X, labels=(LABELS + 4).to(torch.uint16), steps=1, batch=4, device="cpu")
    train(network, SDE, X, labels=LABELS.to(torch.uint16), steps=1, batch=4, device="cpu")
