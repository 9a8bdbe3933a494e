"""What the likelihood integrates: state and log-density together, errors measured as what log p is off by."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdekit import _checks
from sdekit.batch import Padding, entries
from sdekit.noise.keyed import Noise
from sdekit.processes.counted import Moment
from sdekit.processes.reverse import Reverse
from sdekit.solvers.adams import Adams
from sdekit.solvers.adaptive import State
from sdekit.solvers.frame import FlowFrame, moment
from sdekit.system import differentiating, expand

_VJP_NUMBERS = 2**24  # vector-Jacobian products are batched up to this many numbers at a time
_MOST = 2**32  # bytes of the unit vectors of an exact divergence
NO_GRADIENT = "score must be differentiable in x for its divergence; take no_grad or detach out of it"


_plain: list[Any] = []  # what chose the kernels, while anybody wants the plain one: the choice is the process's
_lock = threading.Lock()
_wanted = 0


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Within, attention has second derivatives, which the fused kernels have not. Threads may be within together."""
    global _wanted
    with _lock:
        if _wanted == 0:
            _plain.append(sdpa_kernel(SDPBackend.MATH))
            _plain[0].__enter__()
        _wanted += 1
    try:
        yield
    finally:
        with _lock:
            _wanted -= 1
            if _wanted == 0:
                _plain.pop().__exit__(None, None, None)


class Divergence:
    """What the model says and its divergence, in one network pass: exact, or one estimate for each probe."""

    def __init__(self, vectors: Tensor, exact: bool) -> None:
        self.vectors, self.exact = vectors, exact  # (n, B, *event)
        self.columns = 1 if exact else len(vectors)
        self.batched: bool | None = None  # whether autograd can batch the model's operations; None until it is tried

    def __call__(self, system: Reverse, x: Tensor, t: Moment, run: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
        """The output o at t like x, and (b, columns): v . (do/dx)^T v of every v, or its sum over unit vectors."""
        # Of fused attention there is no second derivative.
        with differentiating("score"), _plain_attention() if graph else nullcontext():
            x = x if graph and x.requires_grad else x.detach().requires_grad_()
            score = system.model(x, t)
            if not score.requires_grad:
                raise ValueError(NO_GRADIENT)
            chunks = self.vectors.split(max(1, _VJP_NUMBERS // x.numel()))
            products = []
            for i, chunk in enumerate(chunks):
                v = chunk[:, run]
                jv = self._pulled(score, x, v, graph or i + 1 < len(chunks), graph)
                if jv is None:  # a graph to parameters, none to x
                    raise ValueError(NO_GRADIENT)
                products.append((v * jv).reshape(*v.shape[:2], -1).sum(2))
        out = torch.cat(products)
        # Row by row in memory: the sum of a lone column rounds otherwise than the same one among others.
        div = out.T.contiguous().sum(1, keepdim=True) if self.exact else out.T
        return (score, div) if graph else (score.detach(), div)

    def _pulled(self, out: Tensor, x: Tensor, v: Tensor, more: bool, graph: bool) -> Tensor | None:
        """(do/dx)^T v of every v, (n, *x.shape); None where o does not depend on x. ``more``: the graph is kept.

        In one batched pass where autograd has a rule for that (none for GroupNorm of channels_last, as attention leaves
        it), else one by one. So also with ``graph``: the batched second derivative of GroupNorm is an error for some
        shapes, and a wrong number for others (torch 2.13).
        """
        if self.batched is not False and not graph:
            keep = more or self.batched is None  # what fails half way must leave the graph as it was
            try:
                (jv,) = torch.autograd.grad(out, x, v, is_grads_batched=True, retain_graph=keep, allow_unused=True)
                self.batched = True
                return jv
            except RuntimeError:  # if it is not the batching, the other way raises it again
                if self.batched:
                    raise
                self.batched = False
        each = []
        for i, one in enumerate(v, start=1):
            keep = more or i < len(v)
            (jv,) = torch.autograd.grad(out, x, one, retain_graph=keep, create_graph=graph, allow_unused=True)
            if jv is None:
                return None
            each.append(jv)
        return torch.stack(each)


def make_divergence(
    x: Tensor,
    divergence: str,
    probes: int,
    seed: int | None,
    ids: Sequence[int] | None,
    padding: Padding | None = None,
) -> Divergence:
    """The divergence of that name, for a batch like x."""
    probes = _checks.count(probes, "probes")
    if _checks.lookup({"exact": True, "hutchinson": False}, divergence, "divergence"):
        d = x[0].numel()
        size = d**2 * x.element_size()
        if size > _MOST:
            raise ValueError(
                f'divergence="exact" takes {d:,} vector-Jacobian products a step for items {tuple(x.shape[1:])}, whose '
                f'vectors alone take {size / 2**30:,.0f} GiB: use divergence="hutchinson", probes=4'
            )
        unit = torch.eye(d, dtype=x.dtype, device=x.device).reshape(d, 1, *x.shape[1:])
        return Divergence(unit.expand(d, *x.shape), exact=True)
    draw = Noise(x, seed, ids, purpose="probe", mask=padding)
    return Divergence(
        torch.stack([torch.where(draw.normal() < 0, -1.0, 1.0).to(x) for _ in range(probes)]), exact=False
    )


def column(n: Any, like: Tensor) -> Any:
    """What :func:`sdekit.batch.entries` says, as it multiplies (b, columns)."""
    return n if isinstance(n, int) else n[:, None].to(like)


class Density(Adams):
    """Columns [y | integrals of div_y, one per probe | sum of error sizes] in the frame's variable u."""

    def __init__(
        self, system: Reverse, x: Tensor, divergence: Divergence, rtol: float, atol: float, graph: bool
    ) -> None:
        super().__init__(self._slopes, rtol, atol)
        self.system, self.divergence, self.graph = system, divergence, graph
        self.frame, self.event, self.d = FlowFrame(system), x.shape[1:], x[0].numel()
        self.n = entries(x)  # D, of what is real
        # What sums in x's dtype resolve is not asked for: with D terms of size 1, about D roundings.
        self.nats = atol + rtol * self.n**0.5 + 8 * torch.finfo(x.dtype).eps * self.n
        # score and divergence at both ends, for the corrections: the last evaluation of a sample there is the one kept
        self.seen = {end: (torch.zeros_like(x), torch.zeros_like(x), x.new_zeros(len(x))) for end in ("t_min", "T")}

    def clock(self, t: Tensor) -> Tensor:
        """The frame's u."""
        u = self.frame.clock(t)
        self.ends = {"t_min": float(u.min()), "T": float(u.max())}
        return u

    def time(self, u: Tensor) -> Tensor:
        """The frame's t."""
        return self.frame.time(u)

    def start(self, y: Tensor, u: Tensor, ends: Tensor, run: Tensor) -> tuple[State, Tensor, int]:
        """As any Adams, with a first step that is small against u: that of t_min may be far below the interval's."""
        state, first, nfe = super().start(y, u, ends, run)
        return state, torch.minimum(first, u / 4), nfe

    def _slopes(self, columns: Tensor, u: Tensor, run: Tensor) -> Tensor:
        lv = self.frame.levels(u)
        n = lv.alpha + lv.sigma
        x = columns[:, : self.d].reshape(-1, *self.event) * expand(n, columns).reshape(-1, *(1,) * len(self.event))
        out, div = self.divergence(self.system, x, moment(lv, x), run, self.graph)
        flat, out = x.reshape(-1, self.d), out.reshape(-1, self.d)
        c, own = (expand(y, flat) for y in self.system.score_of(lv))
        d: Any = self.d
        self._nats = self.nats
        if isinstance(self.n, Tensor):  # what is real of each of these samples
            d, self._nats = self.n.cpu().double()[run.cpu()], self.nats[run]
        score = (c * out + own * flat).detach()
        for end, (points, scores, divs) in self.seen.items():
            there = u == self.ends[end]
            if there.any():
                at = run[there]
                points[at], scores[at] = x.detach()[there], score.reshape(x.shape)[there]
                divs[at] = (c * div + own * column(d, flat)).detach().mean(1)[there]
        a, b = self.frame.linear(lv)
        self._pull = expand(n, flat) * score  # grad log q(y)
        slope = expand(a, flat) * out + expand(b, flat) * flat
        grown = expand(n * a, flat) * div + expand(n * b * d, flat)
        return torch.cat([slope, grown, torch.zeros_like(flat[:, :1])], 1)

    def judge(
        self, y: Tensor, predicted: Tensor, corrected: Tensor, lower: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The step's error as what it does to log p, and the state's own."""
        with torch.no_grad():
            off = corrected - lower()
            nats = ((self._pull * off[:, : self.d]).sum(1) + off[:, self.d : -1].mean(1)).abs()
            _, state = super().judge(y[:, : self.d], predicted[:, : self.d], corrected[:, : self.d], lower)
        y_new = torch.cat([corrected[:, :-1], corrected[:, -1:] + nats[:, None]], 1)
        return y_new, torch.maximum(nats / self._nats, state)
