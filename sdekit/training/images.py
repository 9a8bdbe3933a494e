"""The images of a folder: read from their files as they look, whatever these hold."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp"}
_MAY_BE_DEEP = {".png", ".tif", ".tiff"}  # the rest have 8 bits a channel at most
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF: BitsPerSample, PhotometricInterpretation
# What Pillow makes of a level of PNG's, by its rawmode: its transparent colour stays as the file has it.
_SCALED = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}


class BadImageError(ValueError):
    """A file that cannot be read as an image; ``text`` names it and says what would do."""

    def __init__(self, text: str) -> None:
        # Torch's loader raises what a worker raised anew, with all of the traceback for its text.
        super().__init__(text.rpartition(f"{type(self).__qualname__}: ")[2].strip())


class ImageFolder(Dataset[Tensor]):
    """Images (channels, size, size) in [-1, 1] of files, decoded when they are asked for.

    Resized ones are rounded to their own type's levels again; ``levels`` (256, or 65536): no file may have more.
    """

    def __init__(self, files: list[Path], size: int, channels: int, levels: int = 256) -> None:
        self.files, self.size, self.channels, self.levels = files, size, channels, levels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Tensor:
        from PIL import ImageOps

        file = self.files[index]
        plain, white = _decoded(file, self.channels)
        if white >= self.levels:
            raise BadImageError(
                f"{file} holds {white + 1} levels, and its folder was taken for one of {self.levels}: save it with "
                "8 bits, or under the name of its type (.png, .tif) and load the folder anew"
            )
        square = np.asarray(ImageOps.fit(plain, (self.size, self.size)), dtype=np.float32)
        if white > 255:  # resized as floating numbers, where bicubic weights overshoot
            square = square.clip(0, white).round()
        square = square.reshape(self.size, self.size, -1)
        array = np.broadcast_to(square / (white / 2) - 1, (self.size, self.size, self.channels))
        return torch.from_numpy(array.copy()).movedim(-1, 0)


def _decoded(file: Path, channels: int) -> tuple[Any, int]:
    """The upright image without transparency, of bytes or floating numbers, and which value is white.

    Raises BadImageError.
    """
    from PIL import Image, ImageOps

    try:
        # A TIFF that is turned comes out wrong where Pillow (13.0) maps the file itself into memory.
        with open(file, "rb") as content, Image.open(content) as image:
            white, negative, key = _white(image, file), getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0, _key(image)
            image.load()  # Pillow turns a TIFF itself, and then says that nothing is left to turn
            upright = ImageOps.exif_transpose(image)
            if key is not None:
                upright.info["transparency"] = key
            mode = "L" if channels == 1 else "RGB"
            return (_deep(upright, negative) if white > 255 else _on_white(upright).convert(mode)), white
    except BadImageError:
        raise
    except Exception as error:  # Pillow's are OSError, SyntaxError, struct.error, DecompressionBombError and more
        raise BadImageError(
            f"{file} cannot be read as an image ({error}): save it anew as RGB or grey, take it out, or leave such "
            "files out with skip_bad=True (--skip-bad)"
        ) from error


def _white(image: Any, file: Path) -> int:
    """The value that is white by an image's own type; BadImageError for a type whose range says nothing of white."""
    bits = getattr(image, "tag_v2", {}).get(_BITS, (16,))[0]
    if (image.mode.startswith("I;16") and bits == 16) or (image.mode == "I" and image.format == "PNG"):
        return 65535  # which of the two modes a PNG has depends on Pillow's version
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return 255
    kind = {"I": "signed or 32-bit integers", "F": "floating numbers"}.get(image.mode, f"{bits}-bit integers")
    raise BadImageError(
        f"{file} is a {image.format} of {kind} (Pillow's mode {image.mode!r}), of which nobody knows what is white: "
        "save it with 8 or 16 bits and no sign, or put the images into a .npy file of floats in [-1, 1]"
    )


def _key(image: Any) -> Any:
    """The colour that a PNG has for transparent, as it will be in the decoded image; None where there is none."""
    key = image.info.get("transparency")
    if image.format != "PNG" or image.mode == "P" or key is None:  # of a palette it is alphas
        return None
    scale = _SCALED.get(image.tile[0][3], 1)
    return int(key * scale) if isinstance(key, int) else tuple(int(part * scale) for part in key)


def _deep(image: Any, negative: bool) -> Any:
    """16 bits of grey as floating numbers, which every version of Pillow resizes; on white where transparent."""
    from PIL import Image

    grey = np.asarray(image).astype(np.float32)
    if "transparency" in image.info:
        grey[grey == image.info["transparency"]] = 65535
    return Image.fromarray(65535 - grey if negative else grey)  # Pillow turns it round for 8 bits alone


def _on_white(image: Any) -> Any:
    """An image as it looks on white: itself where all of it is opaque."""
    from PIL import Image

    if image.getbands()[-1] != "A" and "transparency" not in image.info:
        return image
    whole = image.convert("RGBA")
    white = Image.new("RGB", whole.size, "white")
    white.paste(whole, mask=whole)
    return white


def readable(files: list[Path], channels: int) -> tuple[list[Path], tuple[Path, ...], int]:
    """Those that can be decoded, the others, and the most levels that one of the former has."""
    good, bad, most = [], [], 0
    for file in files:
        try:
            most = max(most, _decoded(file, channels)[1] + 1)
            good.append(file)
        except BadImageError as error:
            bad.append(file)
            last = error
    if not good:
        raise ValueError(f"data: none of {len(files)} images can be read; the last: {last}")
    return good, tuple(bad), most


def most_levels(files: list[Path]) -> int:
    """The most levels that a file has, by the headers of those that may have more than 8 bits.

    The levels of 8 bits are every 257th of 16, so both may lie in one folder.
    """
    from PIL import Image

    white = 255
    for file in files:
        if file.suffix.lower() in _MAY_BE_DEEP:
            try:
                image = Image.open(file)
            except Exception:  # one that cannot be read is reported by whoever asks for it
                continue
            with image:
                white = max(white, _white(image, file))
    return white + 1
