"""Data to train on: the bundled sets, folders of images, arrays; with the transform that a checkpoint keeps."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sdekit import _checks
from sdekit.training.images import SUFFIXES, ImageFolder, most_levels, readable

_WHITE = {"b1": 1, "u1": 255, "u2": 65535}  # of arrays, by kind and bytes: the last of the levels


@dataclass
class Data:
    """``items``: (N, *event) float32, or a dataset of them; ``labels`` (N,), int64, or None.

    ``levels``, ``data_range``: discrete values are levels 0 ... levels - 1, evenly from low to high
    (:class:`sdekit.likelihood.quantization.Quantization`); None for continuous data, which are taken as they are.
    ``skipped``: the files that ``skip_bad`` left out.
    """

    items: Tensor | Dataset[Any]
    event: tuple[int, ...]
    labels: Tensor | None = None
    levels: int | None = None
    data_range: tuple[float, float] | None = None
    skipped: tuple[Path, ...] = ()

    @property
    def classes(self) -> int:
        """How many kinds the labels name; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    @property
    def left_out(self) -> str:
        """What to say of the files left out, with a comma before it; nothing where there are none."""
        n, names = len(self.skipped), ", ".join(map(str, self.skipped[:3]))
        return f", {n} bad file{'s' * (n > 1)} left out ({names}{', ...' * (n > 3)})" if n else ""

    def part(self, skip: int, number: int) -> "Data":
        """``number`` items after the first ``skip``, in memory."""
        _checks.count(skip, "skip", minimum=0)
        end = skip + _checks.count(number, "number of items")
        if end > len(self.items):  # type: ignore[arg-type]
            raise ValueError(f"the data hold {len(self.items)} items, fewer than skip + number = {end}")  # type: ignore[arg-type]
        whole = isinstance(self.items, Tensor)
        items = self.items[skip:end] if whole else torch.stack([self.items[i] for i in range(skip, end)])
        labels = None if self.labels is None else self.labels[skip:end]
        return Data(items, self.event, labels, self.levels, self.data_range, self.skipped)


def load_data(source: str, *, size: int | None = None, channels: int | None = None, skip_bad: bool = False) -> Data:
    """The data that ``source`` names.

    "digits": scikit-learn's 1,797 digits, 8x8, 17 levels, with labels. A folder with IDX files (the format of MNIST and
    Fashion-MNIST): their training images, with labels. Any other folder: its images, at any depth, in the order of
    their names, but macOS's ._* files; each is turned as its EXIF orientation says, laid on white where it is
    transparent, cropped to a square about its middle and resized to ``size``, with 1 or 3 ``channels`` (default 3).
    White is the largest value of a file's own type: grey images of 16 bits keep them, and make the folder one of 65,536
    levels, else 256; Pillow reads 16-bit colour, and 16-bit grey with an alpha channel, as 8-bit. A file that cannot be
    read is an error when its turn comes; ``skip_bad``: decode each file once now, and leave out those that cannot be
    (``Data.skipped``). A .npz or .npy file: the array "x" (or the only one) and, if there, "labels"; arrays of uint8,
    uint16 and bool are levels 0 ... 255, 65535 and 1, laid out (N, H, W), (N, H, W, C) or (N, C, H, W); floating arrays
    (N, *event) are taken as they are. Levels become values in [-1, 1].
    Raises ValueError, TypeError or FileNotFoundError that says what was found instead.
    """
    path = Path(source)
    if not is_image_folder(source) and (size, channels, skip_bad) != (None, None, False):
        raise ValueError(f"size, channels and skip_bad are for a folder of images, which {source!r} is not")
    if source == "digits":
        from sdekit.training.digits import load_digits

        images, labels = load_digits()
        return Data(images, (1, 8, 8), labels, 17, (-1.0, 1.0))
    if path.is_dir() and not is_image_folder(source):
        images = torch.from_numpy(read_idx(path, "train-images-idx3-ubyte"))[:, None]
        labels = torch.from_numpy(read_idx(path, "train-labels-idx1-ubyte").astype(np.int64))
        return _levels(images, labels)
    if path.is_dir():
        return _folder(path, size, channels, skip_bad)
    if path.suffix in (".npz", ".npy") and path.is_file():
        return _array(path)
    raise FileNotFoundError(f"data must be 'digits', a folder of images or a .npz or .npy file; {source!r} is none")


def is_image_folder(source: str) -> bool:
    """True for a folder without IDX files, whose images have a size of their own each."""
    path = Path(source)
    return source != "digits" and path.is_dir() and not any(path.glob("train-images-idx3-ubyte*"))


def read_idx(folder: Path, name: str) -> np.ndarray:
    """The bytes of an IDX file, gzip or plain, as an array; FileNotFoundError, or ValueError for a broken one."""
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            break
    else:
        raise FileNotFoundError(f"neither {name} nor {name}.gz in {folder}")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        rank = content[3]
        shape = np.frombuffer(content, ">u4", rank, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
    except (OSError, EOFError, IndexError, ValueError) as error:
        raise ValueError(f"{file} is no IDX file of bytes, or is truncated: {error}") from None


def _folder(path: Path, size: int | None, channels: int | None, skip_bad: bool) -> Data:
    # macOS puts what it knows of a.png into ._a.png
    found = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("._"))
    files = sorted(p for p in found if p.is_file())
    if not files:
        raise ValueError(f"data: no images ({', '.join(sorted(SUFFIXES))}) in {path}")
    if size is None:
        raise ValueError(f"size must be given for a folder of images: the side that {path}'s are resized to")
    channels = 3 if channels is None else channels
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}")
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("folders of images need Pillow: pip install 'sdekit[train]'") from error
    size = _checks.count(size, "size")
    files, bad, levels = readable(files, channels) if skip_bad else (files, (), most_levels(files))
    return Data(ImageFolder(files, size, channels, levels), (channels, size, size), None, levels, (-1.0, 1.0), bad)


def _array(path: Path) -> Data:
    try:
        loaded = np.load(path, allow_pickle=False)  # pickles may run code
        arrays = {"x": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} cannot be read as arrays without pickle: {error}") from error
    labels = arrays.pop("labels", None)
    if "x" not in arrays and len(arrays) != 1:
        raise ValueError(f"{path} must hold an array 'x' (and perhaps 'labels'), got {', '.join(arrays) or 'none'}")
    x = arrays["x"] if "x" in arrays else next(iter(arrays.values()))
    if labels is not None:
        if labels.shape != (len(x),) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise ValueError(f"labels in {path} must be {len(x)} whole numbers >= 0, got {labels.dtype} {labels.shape}")
        labels = torch.from_numpy(labels.astype(np.int64))
    if x.dtype.kind == "f" and x.dtype.itemsize <= 8:
        native = torch.from_numpy(x.astype(x.dtype.newbyteorder("="), copy=False))
        items = _checks.state(native, f"the array in {path}").float()
        return Data(items, tuple(items.shape[1:]), labels)
    white = _WHITE.get(f"{x.dtype.kind}{x.dtype.itemsize}")
    if white is None:
        raise TypeError(
            f"the array in {path} is of {x.dtype}, whose range says nothing of its values': save levels from black to "
            "white as uint8, uint16 or bool, anything else as float32, scaled as the network is to see it"
        )
    levels = torch.from_numpy(x.astype(np.float32))
    if x.ndim == 3:
        levels = levels[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        levels = levels.movedim(3, 1)
    return _levels(levels, labels, white)


def _levels(x: Tensor, labels: Tensor | None, white: int = 255) -> Data:
    return Data(x.float() / (white / 2) - 1, tuple(x.shape[1:]), labels, white + 1, (-1.0, 1.0))
