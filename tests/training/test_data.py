"""Data come with what a checkpoint must know of them; bad sources say what was found instead."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from sdekit.training.data import load_data
from sdekit.training.pictures import save_grid


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_the_digits():
    data = load_data("digits")
    assert data.items.shape == (1797, *data.event) == (1797, 1, 8, 8)
    assert (data.levels, data.data_range, data.classes) == (17, (-1.0, 1.0), 10)
    levels = (data.items.double() + 1) * 8
    assert torch.equal(levels, levels.round())


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path, packed):
    images = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    for name, array in (
        ("train-images-idx3-ubyte", images),
        ("train-labels-idx1-ubyte", np.array([2, 0, 1], np.uint8)),
    ):
        content = idx(array)
        (tmp_path / f"{name}{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)
    data = load_data(str(tmp_path))
    assert torch.equal(((data.items + 1) * 127.5).round(), torch.from_numpy(images)[:, None].float())
    assert data.labels.tolist() == [2, 0, 1]
    assert (data.event, data.levels, data.classes) == ((1, 4, 5), 256, 3)


def test_a_truncated_idx_file_says_so(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((3, 4, 5), np.uint8))[:-7])
    with pytest.raises(ValueError, match="truncated"):
        load_data(str(tmp_path))


def test_a_folder_of_images(tmp_path):
    (tmp_path / "deep").mkdir()
    Image.fromarray(np.full((6, 10, 3), 255, np.uint8)).save(tmp_path / "b.png")
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(tmp_path / "deep" / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    data = load_data(str(tmp_path), size=4)
    assert len(data.items) == 2
    assert data.event == (3, 4, 4)
    assert torch.equal(data.items[0], torch.ones(3, 4, 4))
    assert torch.equal(data.items[1], -torch.ones(3, 4, 4))
    grey = load_data(str(tmp_path), size=4, channels=1)
    assert grey.items[0].shape == grey.event == (1, 4, 4)
    assert torch.equal(grey.part(1, 1).items, -torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 4, 6, 3), (5, 3, 4, 6)])
def test_arrays_of_bytes_are_images(tmp_path, shape):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, labels=np.arange(5))
    data = load_data(str(tmp_path / "a.npz"))
    assert data.event == ((1, 4, 6) if len(shape) == 3 else (3, 4, 6))
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    first = x[0].transpose(2, 0, 1) if shape[-1] == 3 else x[0].reshape(data.event)
    assert torch.equal(((data.items[0] + 1) * 127.5).round(), torch.from_numpy(first.copy()).float())


def test_floating_arrays_are_taken_as_they_are(tmp_path):
    x = np.random.default_rng(0).normal(size=(7, 3))
    np.save(tmp_path / "a.npy", x)
    data = load_data(str(tmp_path / "a.npy"))
    assert torch.equal(data.items, torch.from_numpy(x).float())
    assert (data.event, data.levels, data.data_range, data.classes) == ((3,), None, None, 0)


def bad_sources(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros(3), b=np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "labels.npz", x=np.zeros((3, 2)), labels=np.zeros(2, np.int64))
    np.save(tmp_path / "nan.npy", np.array([[np.nan]]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "images").mkdir()
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "images" / "a.png")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("two.npz", ValueError, "got a, b"),
        ("objects.npy", ValueError, "without pickle"),
        ("labels.npz", ValueError, "labels in .* must be 3 whole numbers >= 0"),
        ("nan.npy", ValueError, "non-finite"),
        ("empty", ValueError, "no images"),
        ("images", ValueError, "size must be given"),
        ("nowhere", FileNotFoundError, "none"),
    ],
)
def test_bad_sources_are_named(tmp_path, source, error, message):
    bad_sources(tmp_path)
    with pytest.raises(error, match=message):
        load_data(str(tmp_path / source))


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match="1797"):
        load_data("digits").part(1000, 1000)


def test_a_grid_shows_every_image_once_and_clips(tmp_path):
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])
    save_grid(tmp_path / "a.png", values[:, None, None, None].expand(5, 1, 32, 32), (-1.0, 1.0))
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (2 * 65, 3 * 66 - 2, 3)  # 2 rows and 3 columns, each pixel twice, gaps of one
    assert [picture[10, 10, 0], picture[10, 80, 0], picture[10, 150, 0]] == [0, 0, 128]
    assert [picture[80, 10, 0], picture[80, 80, 0]] == [255, 255]
    with pytest.raises(ValueError, match="images"):
        save_grid(tmp_path / "b.png", torch.zeros(3, 2, 4, 4), None)
