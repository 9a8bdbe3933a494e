"""Which sampler for this model, and how many evaluations: everything that there is, against the model's own flow."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdekit import _checks
from sdekit.batch import samples
from sdekit.evaluation.comparison import Comparison, Entry
from sdekit.evaluation.metrics import Extractor, frechet_distance, sliced_wasserstein
from sdekit.models.derived import Derived
from sdekit.processes.counted import as_model, ask, counting
from sdekit.processes.sde import SDE
from sdekit.sampling.calibrate import price
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.fixed import sample
from sdekit.sampling.samplers import SAMPLERS, Sampler, as_sampler
from sdekit.solvers.solution import rms
from sdekit.solvers.solve import solve
from sdekit.solvers.steppers import StepRule
from sdekit.system import Score

BUDGETS = (5, 6, 8, 10, 20, 50)
ADAPTIVE = {"adams": (0.03, 0.01, 0.001), "flow_rk45": (0.01, 0.001), "rk45": (0.01, 0.001)}
_FINE = "unipc_2", 300  # the row and the steps that the model's own flow is taken from
_PRICED = (6, 10)
_LEAST = 8  # samples, however little time there is


def compare(
    sde: SDE,
    score: Score,
    shape: Sequence[int],
    *,
    nfe: Sequence[int] = BUDGETS,
    samplers: Mapping[str, Sampler | StepRule | Calibration] | None = None,
    features: Extractor | None = None,
    seconds: float = 120.0,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Comparison:
    """All rows of ``SAMPLERS`` and the adaptive methods on this model, with no data: which to take, for how much.

    ``shape``: (B, *event), as for :func:`sdekit.sample`; B noises, or as many as there is time for in about
    ``seconds``, and at least 8. Conditions of the model are those of B samples.
    Rows without noise, and adaptive methods, are held to where the model's own probability flow takes the same noise
    (in 300 steps): sample by sample, so that some tens of noises suffice. Rows with noise are held to its law: the
    distance of their samples to the flow's from other noises, Fréchet's in ``features`` (N, *event) -> (N, F) where
    these are given, else sliced 2-Wasserstein; it takes hundreds of samples to tell good rows apart, and
    ``floor`` is what two sets of the flow's samples have.
    ``nfe``: budgets. ``samplers``: others to compare, by name: a rule of your own, a calibration.
    Every entry of a sample counts, so padded ones are not for it: take a shape without padding.
    It says nothing of the model, which :func:`sdekit.check_score` does: an error of its flow is no error here.

    Raises ValueError or TypeError that names the argument, and FloatingPointError for a score that is not finite.
    """
    _checks.instance(sde)
    size, allowed = _checks.event_shape(shape), _checks.positive(seconds, "seconds")
    if len(size) < 2:
        raise ValueError(f"shape must be (B, *event), B noises of an event with an axis at least, got {tuple(size)}")
    if samplers is not None and not isinstance(samplers, Mapping):
        raise TypeError(f"samplers must be a mapping, name -> rule, Sampler or calibration, got {samplers!r}")
    if isinstance(nfe, int) or not len(nfe):
        raise ValueError(f"nfe must be budgets, one at least, such as (6, 10), got {nfe!r}")
    budgets = sorted({_checks.count(n, "nfe", minimum=2) for n in nfe})
    own = {name: as_sampler(row) if not isinstance(row, Calibration) else row for name, row in (samplers or {}).items()}
    for name in own:
        if name in SAMPLERS or name in ADAPTIVE:
            raise ValueError(f"samplers: {name!r} is the name of one that is compared anyway; give yours another")
    with torch.no_grad():
        return _Run(sde, score, size, budgets, own, features, allowed, seed, device, dtype, progress).comparison()


class _Watched(Derived):
    """The model, which counts the calls of its networks; a copy counts with it."""

    def __init__(self, score: Score, sde: SDE) -> None:
        super().__init__(score, as_model(score, sde))
        self.calls = [0]

    def prepare(self, times: Sequence[float], x: Tensor) -> Sequence[Any]:
        """What the model makes of the times."""
        return self.inside.prepare(times, x)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """What the model says."""
        with counting() as made:
            out = ask(self.inside, x, time, ready)
        self.calls[0] += made[0]
        return out


class _Run:
    """The work of :func:`compare`."""

    def __init__(
        self, sde: SDE, score: Score, size: torch.Size, budgets: list[int], own: Mapping[str, Any],
        features: Extractor | None, seconds: float, seed: int, device: Any, dtype: Any, progress: bool,
    ) -> None:  # fmt: skip
        self.sde, self.score, self.budgets, self.features, self.seed = sde, score, budgets, features, seed
        self.rows: dict[str, Any] = {**own, **SAMPLERS}
        self.start, self.until, self.total = time.perf_counter(), time.perf_counter() + seconds, size[0]
        device = device or getattr(score, "device", None)
        self.common: dict[str, Any] = {"device": device, "dtype": dtype}
        evaluations = sum(budgets) * len(self.rows) + 2.5 * _FINE[1] + 40 * sum(map(len, ADAPTIVE.values()))
        few, many = min(size[0], _LEAST), min(size[0], 64)
        paces = self._pace(size, few), self._pace(size, many)
        self.each = paces[1] / many  # seconds of an evaluation of a sample, in a batch
        more = max(paces[1] - paces[0], 0.0) / max(many - few, 1)  # a call of n takes a + b n seconds
        most = (0.8 * seconds / evaluations - paces[0]) / max(more, 1e-9) + few
        self.n = int(max(few, min(size[0], most)))
        self.calls: int = getattr(as_model(score, sde), "network_calls", 1)  # of an evaluation
        self.shape = (self.n, *size[1:])
        self.bar = tqdm(total=len(budgets) * len(self.rows) + sum(map(len, ADAPTIVE.values())), desc="comparing",
                        disable=not progress, leave=False)  # fmt: skip

    def _samples(self) -> Any:
        return samples(torch.arange(self.n), self.total)

    def _pace(self, size: torch.Size, n: int) -> float:
        """Seconds of an evaluation of n samples at once: the least of some, of which the first sets things up."""
        spent = []
        with samples(torch.arange(n), size[0]):
            for _ in range(4):
                start = time.perf_counter()
                sample(self.sde, self.score, (n, *size[1:]), steps=3, seed=self.seed, **self.common)
                spent.append((time.perf_counter() - start) / 4)
        return min(spent)

    def comparison(self) -> Comparison:
        """All of it, until the time is over."""
        with self._samples(), self.bar:
            draw_fine = {"sampler": _FINE[0], **self.common}
            self.x_T = self.sde.prior_sample(self.shape, seed=self.seed, **self.common)
            self.exact = sample(self.sde, self.score, self.shape, x_T=self.x_T, steps=_FINE[1], **draw_fine)
            rougher = sample(self.sde, self.score, self.shape, x_T=self.x_T, steps=_FINE[1] // 2, **draw_fine)
            other = sample(self.sde, self.score, self.shape, steps=_FINE[1] // 2, seed=self.seed + 1, **draw_fine)
            self.law = other if self.features is None else self.features(other)
            entries, refused, left = [], {}, []
            for budget in self.budgets:
                for name, row in self.rows.items():
                    self.bar.update()
                    if isinstance(row, Calibration) and self._first(row) != budget:
                        continue
                    if time.perf_counter() > self.until:
                        left.append(f"{name} in {budget}")
                        continue
                    try:
                        entries.append(self._fixed(name, row, budget))
                    except (ValueError, FloatingPointError) as error:
                        if "nfe must be at least" not in str(error):  # too few evaluations for a step of this row
                            refused[name] = str(error)
            for name, row in self.rows.items():
                if isinstance(row, Calibration) and self._first(row) is None:
                    refused[name] = f"it takes {self.calls * row.nfe} evaluations, and no budget is as large"
            for method, tolerances in ADAPTIVE.items():
                for tolerance in tolerances:
                    self.bar.update()
                    if time.perf_counter() > self.until:
                        left.append(f"{method} at {tolerance:g}")
                    else:
                        entries.append(self._adaptive(method, tolerance))
        work = {n: price(max(2, n // self.calls)) for n in _PRICED}
        prices = {n: (self.calls * samples_asked, samples_asked * self.each) for n, samples_asked in work.items()}
        settings = {
            "process": type(self.sde).__name__, "predicts": getattr(self.score, "predicts", "score"),
            "samples": self.n, "event": tuple(self.shape[1:]), "seed": self.seed,
            "reference": f"{_FINE[0]} in {_FINE[1]} steps", "seconds": round(time.perf_counter() - self.start, 1),
            "distance": "Fréchet distance of features" if self.features else "sliced 2-Wasserstein distance",
        }  # fmt: skip
        reference = float(rms(rougher - self.exact).mean())
        return Comparison(tuple(entries), self._distance(self.exact), reference, prices, refused, tuple(left), settings)

    def _first(self, row: Calibration) -> int | None:
        """The least budget that is enough."""
        return next((n for n in self.budgets if self.calls * row.nfe <= n), None)

    def _distance(self, x: Tensor) -> float:
        if self.n < 2:
            return math.nan
        if self.features is None:
            return sliced_wasserstein(x, self.law)
        return frechet_distance(self.features(x), self.law)

    def _fixed(self, name: str, row: Any, budget: int) -> Entry:
        watched = _Watched(self.score, self.sde)
        given: dict[str, Any] = {} if isinstance(row, Calibration) else {"nfe": budget}
        noisy = not isinstance(row, Calibration) and row.stochastic
        given |= {"seed": self.seed + 2} if noisy else {"x_T": self.x_T}
        x = sample(self.sde, watched, self.shape, row, **given, **self.common)
        return self._entry(name, budget, None, float(watched.calls[0]), x, noisy)

    def _adaptive(self, method: str, tolerance: float) -> Entry:
        times = torch.tensor([self.sde.T, self.sde.t_min], dtype=torch.float64)
        flow = self.sde.probability_flow(self.score)
        out = solve(flow, self.x_T, times, method, rtol=tolerance, atol=tolerance, denoise=True)
        return self._entry(method, None, tolerance, float(out.nfe_per_sample.double().mean()), out.x, False)

    def _entry(
        self, name: str, budget: int | None, tolerance: float | None, evaluations: float, x: Tensor, noisy: bool
    ) -> Entry:
        off = rms(x - self.exact).double()
        error = math.nan if noisy else float(off.mean())
        spread = math.nan if noisy or self.n < 2 else float(off.std() / self.n**0.5)
        return Entry(name, budget, tolerance, evaluations, error, spread, self._distance(x))
