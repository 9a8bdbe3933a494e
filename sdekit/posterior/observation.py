"""What was observed of x_0: y = A x_0 + std eps."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sdekit import _checks
from sdekit.batch import asked
from sdekit.noise.keyed import Noise
from sdekit.system import made_outside, ordinary

Map = Callable[[Tensor], Tensor]


class Observation:
    """y = A x_0 + std eps,  eps standard normal.

    ``y``: (*seen) for all samples or (B, *seen), each sample's own, which follows it. ``A``: a callable
    (B, *event) -> (B, *seen) that treats all samples alike, or a matrix (d_y, d) of flattened events; then y is (d_y,)
    or (B, d_y). ``std``: > 0, a number or one for each entry, like y. ``adjoint``: of a linear A, (B, *seen) ->
    (B, *event); by vector-Jacobian products of A unless given. A given one is checked with random vectors before its
    first use.

    What was seen is flattened: ``entries`` numbers a sample, from the first :meth:`check` on, and ``linear`` says
    whether A is (a constant is allowed). Raises ValueError or TypeError that names the argument.
    """

    def __init__(
        self, y: Any, A: Map | Tensor | Sequence[Any] | np.ndarray, std: Any, adjoint: Map | None = None
    ) -> None:
        self.y = ordinary(_checks.state(torch.as_tensor(y), "y"))
        r = torch.as_tensor(std, dtype=torch.float64)
        if not (torch.isfinite(r).all() and (r > 0).all()):
            got = std if r.numel() == 1 else f"a smallest of {float(r.min()):g}"
            raise ValueError(
                f"std must be finite and > 0, got {got}: the observation's noise is what its precision is; for what is "
                "known exactly take one that is small against the data"
            )
        self.std = ordinary(r)
        if adjoint is not None and not callable(adjoint):
            raise TypeError(f"adjoint must be a callable (B, *seen) -> (B, *event), got {type(adjoint).__name__}")
        self._adjoint, self._matrix = adjoint, None
        if callable(A):
            self._map = A
        else:
            self._matrix = ordinary(torch.as_tensor(A))
            if self._matrix.ndim != 2 or not torch.isfinite(self._matrix).all():
                raise ValueError(f"A must be a callable or a finite matrix (d_y, d), got {tuple(self._matrix.shape)}")
            self._map = self._by_matrix
        self.entries, self.linear = 0, True
        self._seen: tuple[int, ...] | None = None
        self._constant: Tensor | None = None
        self._known: dict[Any, Tensor] = {}  # the matrix of A, for a kind of state
        self._checked: set[Any] = set()

    def _by_matrix(self, x: Tensor) -> Tensor:
        assert self._matrix is not None
        flat, a = x.reshape(x.shape[0], -1), self._matrix
        if flat.shape[1] != a.shape[1]:
            raise ValueError(f"A has {a.shape[1]} columns, and x {flat.shape[1]} entries a sample, {tuple(x.shape)}")
        return flat @ a.to(x).mT

    def check(self, x: Tensor) -> None:
        """Raise ValueError where A, its adjoint, y or std do not fit states like x, (B, *event)."""
        key = (x.shape[1:], x.dtype, x.device)
        if key not in self._checked:
            self._probe(x)
            self._checked.add(key)
        self._rows(x)

    def _probe(self, x: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            dtype = torch.promote_types(x.dtype, torch.float32)  # half precision is too coarse to tell
            draw = Noise(torch.empty(2, *x.shape[1:], dtype=dtype, device=x.device), 0, purpose="probe")
            u, v = draw.normal(), draw.normal()
            of_u, of_v, of_both, of_none = (self._called(z) for z in (u, v, u + v, 0 * u))
            self._fit(tuple(of_u.shape[1:]))
            tolerance = 10 * torch.finfo(dtype).eps ** 0.5
            size = float((of_u - of_none).norm() + (of_v - of_none).norm())
            off = float((of_both + of_none - of_u - of_v).norm())
            self.linear = off <= tolerance * max(size, float(of_none.norm()))
            self._constant = of_none[:1].reshape(1, -1) if of_none.any() else None
            self.entries = math.prod(of_u.shape[1:])
            if self._adjoint is not None:
                # <A u, w> of a w that has A u in it: of independent draws both sides are small, whatever the adjoint
                of_u, w = of_u - of_none, of_u + of_v - 2 * of_none
                back = self._adjoint(w)
                if not isinstance(back, Tensor) or back.shape != x[:1].expand(2, *x.shape[1:]).shape:
                    got = tuple(back.shape) if isinstance(back, Tensor) else type(back).__name__
                    raise ValueError(f"adjoint must return x's shape {(2, *x.shape[1:])} for two samples, got {got}")
                first, second = (float((a.double() * b.double()).sum()) for a, b in ((of_u, w), (u, back)))
                apart = abs(first - second)
                if not apart <= 1e3 * torch.finfo(dtype).eps * float(of_u.norm() * w.norm() + u.norm() * back.norm()):
                    raise ValueError(
                        f"adjoint is not A's: for random u and w, <A u, w> = {first:g} and <u, adjoint(w)> = "
                        f"{second:g}, off by {100 * apart / max(abs(first), abs(second)):.3g} %; leave it out, and "
                        "it is taken from A by automatic differentiation"
                    )

    def _fit(self, seen: tuple[int, ...]) -> None:
        """That y and std are of what A returns for a sample."""
        shape = tuple(self.y.shape)
        if shape != seen and shape[1:] != seen:
            raise ValueError(f"y must have the shape of A(x), {seen} or (B, *{seen}), got {shape}")
        own = tuple(self.std.shape)
        if own not in ((), seen) and own != shape:
            raise ValueError(f"std must be a number or of the shape of A(x), {seen}, got {own}")
        self._seen = seen

    def _called(self, x: Tensor) -> Tensor:
        with made_outside("A"):
            out = self._map(x)
        if not isinstance(out, Tensor) or not out.is_floating_point() or out.shape[:1] != x.shape[:1]:
            got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"A must return a floating tensor ({x.shape[0]}, *seen) for {tuple(x.shape)}, got {got}")
        return out

    def _rows(self, x: Tensor) -> tuple[Tensor | None, int]:
        here = asked()
        rows, total = (None, x.shape[0]) if here is None else here
        if self.y.ndim > len(self._seen or ()) and len(self.y) not in (1, total):
            raise ValueError(f"y was given for {len(self.y)} samples, and x has {total}: one for each, or one for all")
        return rows, total

    def values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and std of the samples that x are, flattened: (B or 1, entries) each."""
        rows, total = self._rows(x)

        def own(y: Tensor) -> Tensor:
            y = y.to(x)
            if y.ndim <= len(self._seen or ()):
                return y.expand(self._seen or ()).reshape(1, -1)
            y = y[rows] if rows is not None and len(y) == total else y
            return y.reshape(len(y), -1)

        return own(self.y), own(self.std)

    def of(self, x: Tensor) -> Tensor:
        """A x, flattened: (B, entries)."""
        return self._called(x).reshape(x.shape[0], -1)

    def change(self, x: Tensor) -> Tensor:
        """A x without its constant, flattened."""
        out = self.of(x)
        return out if self._constant is None else out - self._constant

    def transpose(self, x: Tensor, graph: bool = False) -> Map:
        """u (B, entries) -> A' u like x; of an A that is not linear, the adjoint of its derivative at x."""
        if self._matrix is not None and self._adjoint is None:
            a = self._matrix.to(x)
            return lambda u: (u @ a).reshape(x.shape)
        if self._adjoint is not None:
            adjoint = self._adjoint

            def given(u: Tensor) -> Tensor:
                with made_outside("adjoint"):
                    return adjoint(u.reshape(-1, *(self._seen or ())))

            return given
        with torch.enable_grad():
            at = x if graph and x.requires_grad else x.detach().requires_grad_()
            out = self._called(at)
        if not out.requires_grad:
            raise ValueError("A must be differentiable in x, or come with its adjoint")

        def pull(u: Tensor) -> Tensor:
            (back,) = torch.autograd.grad(out, at, u.reshape(out.shape), retain_graph=True, create_graph=graph)
            return back

        return pull

    def matrix(self, x: Tensor) -> Tensor:
        """The matrix of a linear A for states like x, (entries, d)."""
        key = (x.shape[1:], x.dtype, x.device)
        if key not in self._known:
            with torch.inference_mode(False):
                unit = torch.eye(self.entries, dtype=x.dtype, device=x.device)
                back = self.transpose(x.new_zeros(self.entries, *x.shape[1:]))
                self._known[key] = back(unit).reshape(self.entries, -1).detach()
        return self._known[key]


def inpainting(mask: Tensor, y: Tensor, std: Any) -> Observation:
    """The entries of x_0 where ``mask`` is True.

    ``mask``: bool, of the shape of one sample. ``y``: like one sample or (B, *event); what the mask hides is not read.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True where x is seen, got {got}; convert with .bool()")
    y = torch.as_tensor(y)
    if mask.shape not in (y.shape, y.shape[1:]):
        raise ValueError(f"mask must have the shape of one sample of y, {tuple(y.shape)}, got {tuple(mask.shape)}")
    if not mask.any():
        raise ValueError("mask must be True somewhere: nothing is seen")
    if isinstance(std, Tensor) and std.shape[-mask.ndim :] == mask.shape:
        std = std[..., mask]

    return Observation(y[..., mask], partial(_picked, mask=mask), std, partial(_put, mask=mask))


def _picked(x: Tensor, mask: Tensor) -> Tensor:
    if x.shape[1:] != mask.shape:
        raise ValueError(f"mask must have the shape of one sample, {tuple(x.shape[1:])}, got {tuple(mask.shape)}")
    return x[:, mask.to(x.device)]


def _put(u: Tensor, mask: Tensor) -> Tensor:
    x = u.new_zeros(len(u), *mask.shape)
    x[:, mask.to(u.device)] = u
    return x


def colourisation(y: Tensor, std: Any, weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)) -> Observation:
    """The grey picture sum_c w_c x_c of pictures (B, C, H, W), C weights.

    ``y``: (1, H, W) or (B, 1, H, W). After an orthogonal change of channels whose first row is w/|w| it is the first
    channel times |w|, and colouring is inpainting the others  (Song et al. 2021, appendix I.3).
    """
    w = torch.as_tensor(weights, dtype=torch.float64)
    if w.ndim != 1 or not torch.isfinite(w).all() or not (w != 0).any():
        raise ValueError(f"weights must be one finite number a channel, not all 0, got {weights}")

    return Observation(y, partial(_grey, weights=w), std, partial(_coloured, weights=w))


def _grey(x: Tensor, weights: Tensor) -> Tensor:
    _picture(x, len(weights))
    return torch.einsum("bchw,c->bhw", x, weights.to(x))[:, None]


def _coloured(u: Tensor, weights: Tensor) -> Tensor:
    return u * weights.to(u).reshape(1, -1, 1, 1)


def blur(kernel: Any, y: Tensor, std: Any, *, padding: str = "reflect") -> Observation:
    """Pictures (B, C, H, W) convolved with a kernel (h, w) of odd sides, channel by channel, of the same size.

    ``padding``: "reflect", "replicate", "circular" or "constant" (zeros).
    """
    k = torch.as_tensor(kernel)
    if k.ndim != 2 or not all(side % 2 for side in k.shape):
        raise ValueError(f"kernel must be (h, w) with odd sides, got {tuple(k.shape)}")
    _checks.lookup(dict.fromkeys(("reflect", "replicate", "circular", "constant")), padding, "padding")
    return Observation(y, partial(_blurred, kernel=k, padding=padding), std)


def _blurred(x: Tensor, kernel: Tensor, padding: str) -> Tensor:
    channels, (high, wide) = _picture(x), kernel.shape
    weight = kernel.to(x).flip(0, 1).expand(channels, 1, high, wide)
    padded = functional.pad(x, [wide // 2, wide // 2, high // 2, high // 2], mode=padding)
    return functional.conv2d(padded, weight, groups=channels)


def downsample(factor: int, y: Tensor, std: Any) -> Observation:
    """The means of pictures (B, C, H, W) over squares of ``factor`` x ``factor``; y is (C, H/factor, W/factor)."""
    factor = _checks.count(factor, "factor", minimum=2)

    return Observation(y, partial(_means, factor=factor), std, partial(_spread, factor=factor))


def _means(x: Tensor, factor: int) -> Tensor:
    _picture(x)
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"factor = {factor} must divide the picture's sides, {tuple(x.shape[2:])}")
    return functional.avg_pool2d(x, factor)


def _spread(u: Tensor, factor: int) -> Tensor:
    return u.repeat_interleave(factor, 2).repeat_interleave(factor, 3) / factor**2


def _picture(x: Tensor, channels: int | None = None) -> int:
    if x.ndim != 4 or channels not in (None, x.shape[1]):
        raise ValueError(f"x must be pictures (B, {channels or 'C'}, H, W), got {tuple(x.shape)}")
    return x.shape[1]
