"""Data come with what a checkpoint must know of them; bad sources say what was found instead."""

import gzip
import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

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


def tiff(grey, **tags):
    """A grey TIFF of 16 bits, some of its header's numbers replaced: what Pillow reads and does not write."""
    file = io.BytesIO()
    Image.fromarray(grey).save(file, "TIFF")
    content = file.getvalue()
    for name, (old, new) in tags.items():
        entry = {"bits": 258, "photometric": 262}[name]
        before, after = (struct.pack("<HHIHH", entry, 3, 1, value, 0) for value in (old, new))
        assert content.count(before) == 1
        content = content.replace(before, after)
    return content


def levels16():
    """All that 16 bits can say of which are 256 multiples of 257, and two levels on each side of these."""
    near = np.arange(256)[:, None] * 257 + np.arange(-2, 3)
    return np.resize(near.clip(0, 65535), (40, 40)).astype(np.uint16)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["I;16.png", "I.png", "I;16.tiff", "I;16B.tiff", "white is zero.tiff"])
def test_16_bits_are_read_by_their_own_range(tmp_path, monkeypatch, kind, channels):
    grey, file = levels16(), tmp_path / f"a.{kind[-3:]}"
    if kind == "I;16B.tiff":
        image = Image.new("I;16B", (40, 40))
        image.frombytes(grey.astype(">u2").tobytes())
        image.save(file, "TIFF")
    elif kind == "white is zero.tiff":
        file.write_bytes(tiff(65535 - grey, photometric=(1, 0)))
    else:
        Image.fromarray(grey).save(file, "PNG" if kind.endswith("png") else "TIFF")
    if kind == "I.png":  # as older versions of Pillow open it
        monkeypatch.setattr(PngImagePlugin, "_MODES", {**PngImagePlugin._MODES, (16, 0): ("I", "I;16B")})
    if kind[0] == "I":
        assert Image.open(file).mode == kind.split(".")[0]
    if file.suffix != ".png":
        file = file.rename(tmp_path / "a.tif")
    data = load_data(str(tmp_path), size=40, channels=channels)
    assert (data.event, data.levels, data.data_range) == ((channels, 40, 40), 65536, (-1.0, 1.0))
    expected = torch.from_numpy(grey.astype(np.float64) / 32767.5 - 1).expand(channels, -1, -1)
    assert data.items[0].dtype is torch.float32
    torch.testing.assert_close(data.items[0].double(), expected, rtol=0, atol=1e-7)  # a level is 3e-5


def test_8_bits_among_16_lie_on_their_levels(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey * np.uint16(257)).save(tmp_path / "b.png")
    data = load_data(str(tmp_path), size=16, channels=1)
    assert data.levels == 65536
    for image in data.part(0, 2).items:
        torch.testing.assert_close((image + 1) * 32767.5, torch.from_numpy(grey * 257.0)[None].float())


@pytest.mark.parametrize(("low", "high"), [(80, 175), (0, 255)])
def test_16_bits_are_resized_as_8_are(tmp_path, low, high):
    """The same picture in both, on its own levels; within rounding of each of two passes where nothing is clipped."""
    picture = np.where(np.random.default_rng(0).integers(0, 2, (24, 30)), high, low).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    Image.fromarray(picture * np.uint16(257)).save(tmp_path / "b.png")
    eight, sixteen = ((image.double() + 1) / 2 for image in load_data(str(tmp_path), size=31).part(0, 2).items)
    if low:
        assert float((eight - sixteen).abs().max()) < 1.2 / 255
    else:  # bicubic weights overshoot; Pillow clips 8 bits between the passes as well
        assert (float(sixteen.min()), float(sixteen.max())) == (0, 1)
    level = sixteen * 65535
    assert float((level - level.round()).abs().max()) < 0.01


def other(mode):
    """A picture of 4 x 4 of a mode, what it is in grey, and in colour."""
    row = np.arange(16, dtype=np.uint8).reshape(4, 4)
    grey, colour = row * 17, np.stack([row * 16, 255 - row, row], -1)
    luma = np.asarray(Image.fromarray(colour).convert("L"))
    if mode == "1":
        return Image.fromarray(row % 2 == 1), row % 2 * 255, np.repeat((row % 2 * 255)[..., None], 3, -1)
    if mode == "L":
        return Image.fromarray(grey), grey, np.repeat(grey[..., None], 3, -1)
    whole = Image.fromarray(colour)
    if mode == "P":
        whole = Image.fromarray(row)
        whole.putpalette(colour.tobytes())
    return whole, luma, colour


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_other_modes_are_of_8_bits(tmp_path, mode):
    image, grey, colour = other(mode)
    image.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == mode
    for channels, expected in ((1, grey[..., None]), (3, colour)):
        data = load_data(str(tmp_path), size=4, channels=channels)
        assert data.levels == 256
        found = ((data.items[0] + 1) * 127.5).round().movedim(0, -1)
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("32 bits", np.full((4, 4), 70000, np.int32), "signed or 32-bit integers .*mode 'I'"),
        ("floats", np.full((4, 4), 0.5, np.float32), "floating numbers .*mode 'F'"),
        ("12 bits", tiff(np.zeros((4, 4), np.uint16), bits=(16, 12)), "12-bit integers .*mode 'I;16'"),
    ],
)
def test_types_without_a_white_are_refused_by_name(tmp_path, name, content, kind):
    file = tmp_path / f"{name}.tif"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        Image.fromarray(content).save(file)
    with pytest.raises(ValueError, match=rf"{name}.tif is a TIFF of {kind}.*save it with 8 or 16 bits"):
        load_data(str(tmp_path), size=4)


def test_a_file_with_more_levels_than_its_folder_is_refused(tmp_path):
    """Where the file was replaced later, or hides behind the name of a type that has 8 bits."""
    Image.fromarray(levels16()).save(tmp_path / "a.jpg", "PNG")
    data = load_data(str(tmp_path), size=4)
    assert data.levels == 256
    with pytest.raises(ValueError, match=r"a.jpg holds 65536 levels, .*one of 256: save it"):
        data.items[0]


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 4, 6, 3), (5, 3, 4, 6)])
def test_arrays_of_bytes_are_images(tmp_path, shape):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x, labels=np.arange(5))
    data = load_data(str(tmp_path / "a.npz"))
    assert data.event == ((1, 4, 6) if len(shape) == 3 else (3, 4, 6))
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    first = x[0].transpose(2, 0, 1) if shape[-1] == 3 else x[0].reshape(data.event)
    assert torch.equal(((data.items[0] + 1) * 127.5).round(), torch.from_numpy(first.copy()).float())


@pytest.mark.parametrize(("dtype", "levels"), [(np.uint16, 65536), (">u2", 65536), (np.bool_, 2), (np.uint8, 256)])
@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 4, 6, 3), (5, 12)])
def test_arrays_of_other_levels_are_read_by_their_own_range(tmp_path, dtype, levels, shape):
    x = np.random.default_rng(0).integers(0, levels, shape)
    x.flat[:2] = 0, levels - 1
    np.save(tmp_path / "a.npy", x.astype(dtype))
    data = load_data(str(tmp_path / "a.npy"))
    assert (data.levels, data.data_range) == (levels, (-1.0, 1.0))
    assert (float(data.items.min()), float(data.items.max())) == (-1, 1)
    expected = {3: lambda: x[:, None], 4: lambda: x.transpose(0, 3, 1, 2), 2: lambda: x}[len(shape)]()
    found = (data.items.double() + 1) * (levels - 1) / 2
    torch.testing.assert_close(found, torch.from_numpy(expected.astype(np.float64)), rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint32, np.int64, np.complex64, "U3"])
def test_arrays_without_a_range_are_refused_by_name(tmp_path, dtype):
    np.save(tmp_path / "a.npy", np.ones((3, 4), dtype))
    with pytest.raises(TypeError, match=rf"a.npy is of {np.dtype(dtype)}, .*uint8, uint16 or bool, .*float32"):
        load_data(str(tmp_path / "a.npy"))


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
