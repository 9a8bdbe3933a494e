"""The images of a folder are what their files look like, and a file that cannot be read is named or left out."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch._utils import ExceptionWrapper

from sdekit.training.data import load_data

TURNED = {  # by the value of EXIF's tag, from what is stored to what is seen
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


def seen(folder, size, channels=1):
    """The levels of the folder's first image, (size, size, channels), as whole numbers."""
    data = load_data(str(folder), size=size, channels=channels)
    found = (data.items[0].double() + 1) * (data.levels - 1) / 2
    torch.testing.assert_close(found, found.round(), rtol=0, atol=0.01)
    return found.round().long().movedim(0, -1).numpy()


def png(depth, kind, rows, **chunks):
    """A PNG file of so many bits a channel and a kind of colour (0 grey, 2 colour, 3 palette, 4 and 6 with alpha)."""
    side = len(rows)
    parts = {
        "IHDR": struct.pack(">2I5B", side, side, depth, kind, 0, 0, 0),
        **chunks,
        "IDAT": zlib.compress(b"".join(b"\0" + row for row in rows)),
        "IEND": b"",
    }
    packed = [
        struct.pack(">I", len(body)) + name.encode() + body + struct.pack(">I", zlib.crc32(name.encode() + body))
        for name, body in parts.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def on_white(colour, alpha, white=255):
    """colour (H, W, C) laid on white, alpha (H, W) from 0 to 255, to the nearest level."""
    colour, alpha = colour.astype(np.int64), alpha.astype(np.int64)[..., None]
    return (2 * (colour * alpha + white * (255 - alpha)) + 255) // 510


def luma(colour):
    """(H, W, 1) of colours (H, W, 3)."""
    return np.asarray(Image.fromarray(colour.astype(np.uint8)).convert("L"))[..., None]


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["L png", "RGB png", "16 png", "L tif", "16 tif", "RGB jpg"])
def test_images_are_upright_before_they_are_cropped(tmp_path, kind, orientation):
    """6 x 10: the square about the middle of what is seen."""
    mode, ending = kind.split()
    numbers = np.random.default_rng(0).integers(0, 256 if mode != "16" else 65536, (10, 6, 3 if mode == "RGB" else 1))
    stored = numbers.astype(np.uint16 if mode == "16" else np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"a.{ending}"
    Image.fromarray(stored if mode == "RGB" else stored[..., 0]).save(file, exif=exif)
    if ending == "jpg":
        stored = np.asarray(Image.open(file))  # its losses
    turned = TURNED[orientation](stored)
    expected = turned[2:8] if len(turned) == 10 else turned[:, 2:8]
    assert np.array_equal(seen(tmp_path, 6, stored.shape[-1]), expected)


ROW = np.arange(16, dtype=np.uint8).reshape(4, 4)
COLOUR = np.stack([ROW * 16, 255 - ROW, ROW], -1)
ALPHA = np.resize(np.array([0, 1, 127, 128, 254, 255, 64], np.uint8), (4, 4))  # in every order with the colours


def transparent(kind):
    """(file's bytes or image, ending, colours (4, 4, 3), alpha (4, 4)), 8 bits each."""
    grey = np.repeat(ROW[..., None] * 17, 3, -1)
    two = np.where(ROW[..., None] % 2, 255, 0).repeat(3, -1)
    palette = Image.fromarray(ROW)
    palette.putpalette(COLOUR.tobytes())
    one = np.where(ROW == 5, 0, 255)
    if kind == "RGBA":
        return Image.fromarray(np.dstack([COLOUR, ALPHA])), "png", COLOUR, ALPHA
    if kind == "RGBA tif":
        return Image.fromarray(np.dstack([COLOUR, ALPHA])), "tif", COLOUR, ALPHA
    if kind == "LA":
        return Image.fromarray(np.dstack([grey[..., 0], ALPHA])), "png", grey, ALPHA
    if kind == "PA":
        palette.putalpha(Image.fromarray(ALPHA))
        assert palette.mode == "PA"
        return palette, "tif", COLOUR, ALPHA
    if kind == "P":
        palette.info["transparency"] = ALPHA.tobytes()
        return palette, "png", COLOUR, ALPHA
    if kind == "P gif":
        palette.info["transparency"] = 5
        return palette, "gif", COLOUR, one
    if kind == "L":
        return png(8, 0, [bytes(r) for r in grey[..., 0]], tRNS=struct.pack(">H", 5 * 17)), "png", grey, one
    if kind == "L of 4 bits":
        rows = [bytes(r[::2] * 16 + r[1::2]) for r in ROW]
        return png(4, 0, rows, tRNS=struct.pack(">H", 5)), "png", grey, one
    if kind == "1":
        return png(1, 0, [b"\x50"] * 4, tRNS=struct.pack(">H", 0)), "png", two, two[..., 0]
    if kind == "RGB":
        return png(8, 2, [r.tobytes() for r in COLOUR], tRNS=struct.pack(">3H", *COLOUR[1, 1])), "png", COLOUR, one
    deep = (COLOUR.astype(int) * 256 + 77).astype(">u2")  # of which Pillow keeps 8 bits
    if kind == "RGB of 16 bits":
        return png(16, 2, [r.tobytes() for r in deep], tRNS=deep[1, 1].tobytes()), "png", COLOUR, one
    if kind == "RGBA of 16 bits":
        whole = np.dstack([deep, ALPHA.astype(">u2") * 256 + 77])
        return png(16, 6, [r.astype(">u2").tobytes() for r in whole]), "png", COLOUR, ALPHA
    assert kind == "LA of 16 bits"
    whole = np.dstack([grey[..., :1].astype(">u2"), ALPHA.astype(">u2")]) * 256 + 77
    return png(16, 4, [r.astype(">u2").tobytes() for r in whole]), "png", grey, ALPHA


KINDS = ["RGBA", "RGBA tif", "LA", "PA", "P", "P gif", "L", "L of 4 bits", "1", "RGB", "RGB of 16 bits"]


@pytest.mark.parametrize("kind", [*KINDS, "RGBA of 16 bits", "LA of 16 bits"])
def test_what_is_transparent_is_laid_on_white(tmp_path, kind):
    content, ending, colour, alpha = transparent(kind)
    file = tmp_path / f"a.{ending}"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        content.save(file)
    expected = on_white(colour, alpha)
    assert np.array_equal(seen(tmp_path, 4, 3), expected)
    assert np.array_equal(seen(tmp_path, 4, 1), luma(expected))


def test_a_transparent_level_of_16_bits_is_white(tmp_path):
    grey = (ROW.astype(int) * 4000).astype(">u2")
    (tmp_path / "a.png").write_bytes(png(16, 0, [r.tobytes() for r in grey], tRNS=struct.pack(">H", 5 * 4000)))
    assert np.array_equal(seen(tmp_path, 4)[..., 0], np.where(ROW == 5, 65535, grey))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_opaque_alpha_changes_no_bit(tmp_path, mode, channels):
    shape = (9, 7, 3) if mode == "RGB" else (9, 7)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    image.save(tmp_path / "a.png")
    image.putalpha(255)
    image.save(tmp_path / "b.png")
    data = load_data(str(tmp_path), size=5, channels=channels)
    assert torch.equal(data.items[0], data.items[1])


def picture(path, **how):
    """A file with a picture of noise, as its name ends."""
    numbers = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(numbers).save(path, **how)


def cut(path):
    """All but the second half of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def spoil(folder, kind):
    """A file that cannot be read as an image."""
    file = folder / {"jpg": "b.jpg", "tif": "b.tif", "gif": "b.gif", "webp": "b.webp"}.get(kind, "b.png")
    if kind in ("jpg", "png", "tif", "gif", "webp"):
        picture(file)
        cut(file)
    elif kind == "a palette of 16 bits":
        file.write_bytes(png(16, 3, [bytes(8)] * 4, PLTE=bytes(48)))
    elif kind == "a broken checksum":
        content = bytearray(png(8, 0, [bytes(4)] * 4))
        content[20] ^= 1
        file.write_bytes(content)
    elif kind == "a bomb":
        file.write_bytes(png(8, 0, [bytes(4)] * 4).replace(*(struct.pack(">2I", n, n) for n in (4, 30000))))
        content = file.read_bytes()
        head = content[12:29]
        file.write_bytes(content[:29] + struct.pack(">I", zlib.crc32(head)) + content[33:])
    else:
        file.write_text({"empty": "", "text": "no image"}[kind])
    return file


BAD = ["jpg", "png", "tif", "gif", "webp", "empty", "text", "a bomb", "a broken checksum", "a palette of 16 bits"]


@pytest.mark.parametrize("kind", BAD)
def test_a_file_that_cannot_be_read_is_named_and_what_would_do(tmp_path, kind):
    """Also as torch raises it anew for a worker, with all of the traceback for its text."""
    file = spoil(tmp_path, kind)
    picture(tmp_path / "a.png")
    data = load_data(str(tmp_path), size=8)
    assert len(data.items) == 2
    with pytest.raises(ValueError) as error:
        list(data.items)
    line = rf"{re.escape(str(file))} cannot be read as an image \(.+\): .*skip_bad=True \(--skip-bad\)"
    assert re.fullmatch(line, str(error.value))
    with pytest.raises(ValueError) as again:
        ExceptionWrapper((type(error.value), error.value, error.tb), "in DataLoader worker process 0").reraise()
    assert re.fullmatch(line, str(again.value))


def test_the_files_of_macos_are_passed_over(tmp_path):
    (tmp_path / "__MACOSX" / "deep").mkdir(parents=True)
    for name in ("._a.png", "__MACOSX/deep/._b.jpg"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
    with pytest.raises(ValueError, match="no images"):
        load_data(str(tmp_path), size=8)
    picture(tmp_path / "a.png")
    data = load_data(str(tmp_path), size=8)
    assert len(data.items) == 1
    assert data.skipped == ()


def test_bad_files_are_left_out_and_counted(tmp_path):
    for kind in BAD:
        (tmp_path / kind).mkdir()
        spoil(tmp_path / kind, kind)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "floats.tif")
    with pytest.raises(ValueError, match="none of 11 images can be read; the last: .*cannot be read as an image"):
        load_data(str(tmp_path), size=4, skip_bad=True)
    Image.fromarray(ROW * 17).save(tmp_path / "m.png")
    Image.fromarray(ROW * np.uint16(4000)).save(tmp_path / "n.jpg", "PNG")  # known by what it is, not by its name
    data = load_data(str(tmp_path), size=4, channels=1, skip_bad=True)
    assert [file.name for file in data.items.files] == ["m.png", "n.jpg"]
    assert {file.parent.name for file in data.skipped} == {*BAD, tmp_path.name}
    assert len(data.skipped) == len(data.part(0, 1).skipped) == len(BAD) + 1
    assert data.left_out.startswith(f", 11 bad files left out ({data.skipped[0]}, ")
    assert data.levels == 65536
    assert np.array_equal(((data.items[0][0] + 1) * 127.5).round().numpy(), ROW * 17)
    assert np.array_equal(((data.items[1][0] + 1) * 32767.5).round().numpy(), ROW * np.float32(4000))


def test_a_folder_with_the_name_of_an_image_is_none(tmp_path):
    (tmp_path / "b.png").mkdir()
    picture(tmp_path / "b.png" / "a.png")
    assert len(load_data(str(tmp_path), size=8).items) == 1


def test_bad_files_are_of_folders_of_images_alone(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    for source in ("digits", str(tmp_path / "a.npy")):
        with pytest.raises(ValueError, match="size, channels and skip_bad are for a folder of images"):
            load_data(source, skip_bad=True)


def test_without_bad_files_nothing_is_said(tmp_path):
    picture(tmp_path / "a.png")
    data = load_data(str(tmp_path), size=4, skip_bad=True)
    assert (data.skipped, data.left_out, data.levels, len(data.items)) == ((), "", 256, 1)
