"""What a step sees of the data: x_0, and the conditions of the same items, each in its place."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from sdekit import _checks
from sdekit.batch import Padding
from sdekit.training.draws import Order

_WHOLE = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def checked(
    data: Any, labels: Any, classes: int | None, dropped: bool, mask: int | None, sde: Any
) -> tuple[Tensor | Dataset[Any], tuple[Tensor, ...]]:
    """The data, with 0 in a tensor's padding, and the conditions of its items.

    ``dropped``: whether class labels are, at times. ValueError or TypeError for what cannot be trained on.
    """
    if isinstance(data, DataLoader):
        raise TypeError(
            "data must be a tensor or a dataset, got a DataLoader: pass its dataset (loader.dataset) and batch=, "
            "workers=, since train draws the order itself, for a run that can be resumed"
        )
    known = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if not known or isinstance(data, IterableDataset | Mapping | str):
        raise TypeError(
            f"data must be a tensor or a dataset with a length and items by number, got {type(data).__name__}: give it "
            "__len__ and __getitem__, or pass list(data) where the items fit in memory"
        )
    if len(data) == 0:
        raise ValueError(f"data must hold at least one item, got an empty {type(data).__name__}")
    if labels is None:
        return _floating(data) if isinstance(data, Tensor) else data, ()
    given = tuple(labels) if isinstance(labels, tuple | list) else (labels,)
    for one in given:
        if not isinstance(one, Tensor):
            raise TypeError(
                f"labels must be a tensor or a tuple of tensors, got {type(one).__name__}: use torch.tensor"
            )
        if not (isinstance(data, Tensor) and one.ndim and len(one) == len(data)):
            raise ValueError("labels must be one for each item of a data tensor; a dataset brings its own")
    given, place = _fit(given, classes, dropped), label_in(given)
    padding = padding_in(given, mask, data, sde)
    data = _floating(data, padding)
    if place is not None and classes and int(given[place].min()) > 0 and int(given[place].max()) == classes:
        raise ValueError(
            f"labels must count from 0, got {int(given[place].min())} ... {classes}, of which {classes} is "
            "network.classes, the label that stands for none: subtract 1"
        )
    return data, given


def size_of(data: Any, conditions: tuple[Tensor, ...], mask: int | None, sde: Any) -> list[float]:
    """Standard deviation and mean of what is real of a tensor's first items; nothing of a dataset's."""
    if not isinstance(data, Tensor):
        return []
    some = data[:1024].double()
    padding = padding_in(tuple(c[:1024] for c in conditions), mask, some, sde)
    return [float(y) for y in torch.std_mean(some if padding is None else some[padding.real.to(some.device)])]


def label_in(conditions: tuple[Tensor, ...]) -> int | None:
    """Which of the conditions is a class label: the first one of whole numbers (b,)."""
    whole = [k for k, c in enumerate(conditions) if c.ndim == 1 and c.dtype in _WHOLE]
    return whole[0] if whole else None


def padding_in(conditions: tuple[Tensor, ...], mask: int | None, x0: Tensor, sde: Any) -> Padding | None:
    """What condition number ``mask`` says of these items. Raises ValueError or TypeError where it is no mask."""
    if mask is None:
        return None
    if mask >= len(conditions):
        raise ValueError(f"mask = {mask} names a condition, from 0, and the data have {len(conditions)}")
    return Padding.of(conditions[mask], x0.shape, sde)


def batches(
    data: Tensor | Dataset[Any],
    conditions: tuple[Tensor, ...],
    order: Order,
    dtype: torch.dtype,
    workers: int,
    classes: int | None,
    dropped: bool,
) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
    """(x_0, its conditions) of one step after another, on the draws' device; floating ones in ``dtype``."""
    device = order.draws.device

    def there(y: Tensor) -> Tensor:
        return y.to(device, dtype if y.is_floating_point() else y.dtype, non_blocking=True)

    if isinstance(data, Tensor):
        data, conditions = there(data), tuple(map(there, conditions))
        for chosen in order:
            index = torch.tensor(chosen, device=device)
            yield data[index], tuple(c[index] for c in conditions)
        return
    # its own generator, or the loader would take a seed for its workers from the global one
    loader: DataLoader[Any] = DataLoader(
        data, batch_sampler=order, num_workers=workers, pin_memory=device.type == "cuda", generator=torch.Generator(),
        collate_fn=_together,
    )  # fmt: skip
    for x0, *rest in loader:
        yield there(_floating(x0)), tuple(map(there, _fit(tuple(rest), classes, dropped)))


def _floating(x: Tensor, padding: Padding | None = None) -> Tensor:
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(
            f"data must be a floating tensor of about unit size, got {x.dtype}: scale levels to [-1, 1], bytes by "
            "x.float() / 127.5 - 1"
        )
    return _checks.state(x if padding is None else padding.only(x), "data")


def _fit(conditions: tuple[Tensor, ...], classes: int | None, dropped: bool) -> tuple[Tensor, ...]:
    """The conditions, a class label in int64. ValueError for a label out of range, and for what is not finite."""
    place, fit = label_in(conditions), []
    for k, condition in enumerate(conditions):
        if place is None and classes and dropped and condition.dtype in _WHOLE and condition.shape[1:] == (1,):
            raise ValueError(
                f"condition {k + 1} of the data is of whole numbers {tuple(condition.shape)}, and class labels are "
                "(b,), or they are never dropped: take squeeze(1), or label_drop=0.0"
            )
        if condition.is_floating_point():
            _checks.state(condition, f"condition {k + 1} of the data")
        if k == place:
            condition = condition.long()
            if classes:
                _checks.labels(condition, classes)
        fit.append(condition)
    return tuple(fit)


def _together(items: list[Any]) -> list[Tensor]:
    """A batch of items, x or (x, *conditions): each part of all of them in one tensor."""
    rows = [tuple(item) if isinstance(item, tuple | list) else (item,) for item in items]
    if len({len(row) for row in rows}) > 1:
        raise ValueError("the items of data must have as many entries each, (x, *conditions); some have more")
    for row in rows:
        for k, part in enumerate(row):
            if not isinstance(part, Tensor | np.ndarray | np.generic | int | float):
                raise TypeError(
                    f"an item of data must be x or (x, *conditions), of tensors, arrays or numbers; {_unfit(k, part)}"
                )
    shapes = [sorted({tuple(np.shape(part)) for part in column}) for column in zip(*rows, strict=True)]
    for k, found in enumerate(shapes):
        if len(found) > 1:
            raise ValueError(f"the items of data must be of one shape; their entry {k} has {found[0]} and {found[1]}")
    return [default_collate(list(column)) for column in zip(*rows, strict=True)]


def _unfit(k: int, part: Any) -> str:
    """What is wrong with entry k of an item, and what would do."""
    if isinstance(part, Mapping):
        names = list(part)
        return f"got a {type(part).__name__} of {', '.join(map(repr, names))}: return a tuple of its values, x first"
    if part is None:
        return f"its entry {k} is None: leave it out, or put in what stands for nothing, as zeros"
    if isinstance(part, str):
        return f"its entry {k} is the text {part!r:.40}: return numbers, as its tokens or an embedding"
    if isinstance(part, tuple | list):
        return f"its entry {k} is a {type(part).__name__}: put what is in it side by side, (x, a, b)"
    return f"its entry {k} is a {type(part).__name__}: make a tensor of it"
