"""A run of a fixed-grid sampler turned inside out: the caller evaluates the model, and tells what it said."""

import copy
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdekit import _checks
from sdekit.noise.keyed import Noise
from sdekit.processes.kinds import KINDS
from sdekit.processes.law import require_centred
from sdekit.processes.sde import SDE
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.fixed import Plan, plan
from sdekit.sampling.grids import Grid
from sdekit.sampling.samplers import Sampler
from sdekit.sampling.starts import bridge
from sdekit.solvers.steppers import StepRule


class _Question(Exception):  # noqa: N818
    """Where the model is asked for what nobody has told yet."""

    def __init__(self, x: Tensor, t: float) -> None:
        self.x, self.t = x, t


class _Answers:
    """A model that says what it was told, evaluation by evaluation of one part of a run, and then asks."""

    def __init__(self, sde: SDE, predicts: str) -> None:
        self.sde, self.predicts = sde, predicts
        self.told: list[Tensor] = []
        self.said = 0

    def prepare(self, times: Sequence[float], x: Tensor) -> list[None]:
        """Nothing."""
        return [None] * len(times)

    def output(self, x: Tensor, time: Tensor, ready: Any = None) -> Tensor:
        """The next answer. Raises _Question where there is none."""
        if self.said == len(self.told):
            raise _Question(x, float(time))
        self.said += 1
        return self.told[self.said - 1]

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        raise TypeError("a rule under AskTell works with what the model says (system.model), not with a score")


class AskTell:
    """The run that ``sample(sde, score, x_T.shape, sampler, x_T=x_T, ...)`` makes, without the score.

        run = AskTell(sde, x_T, "unipc_2", predicts="eps", nfe=10)
        while run.t is not None:
            run.tell(network(run.x, run.t))
        run.x

    For programs that call the network themselves. ``t``: the time at which the model is to be asked next, a float, None
    when the run is at its end; ``x``: the state to ask it at (not to be changed), in the end the samples. The same
    step rules run here as there: each part of the run (the analytic first step, a step, the denoising) is begun again
    from where it began whenever one more of its evaluations is known, which costs the sums of the step, no evaluation.

    ``predicts``: what the caller's model says, a kind of :func:`as_score`. ``change``: a function of models, such as a
    threshold, ``lambda model: static_threshold(sde, model, (-1, 1))``, between what is told and the rules; it must
    evaluate the model once, at the x that it is given. Everything else as in :func:`sample`, whose errors this raises
    too; x keeps its dtype whatever that of the answers. A rule's state may be changed in place where it is a list, a
    deque, a dict or a set, or an object of its own way to be copied, also within a tuple: each try has a copy.
    """

    def __init__(
        self,
        sde: SDE,
        x_T: Tensor,
        sampler: str | Sampler | StepRule | Calibration = "unipc_2",
        *,
        predicts: str,
        steps: int | None = None,
        nfe: int | None = None,
        grid: Grid | None = None,
        denoise: bool = True,
        seed: int | None = None,
        ids: Sequence[int] | None = None,
        start: float | None = None,
        change: Callable[[Any], Any] = lambda model: model,
    ) -> None:
        _checks.instance(sde)
        made = plan(sde, sampler, steps, nfe, grid, denoise, start, x_T)
        self._begin(sde, x_T, made, predicts, denoise, seed, ids, change, nfe)

    @classmethod
    def of(
        cls,
        sde: SDE,
        x_T: Tensor,
        made: Plan,
        *,
        predicts: str,
        denoise: bool = True,
        seed: int | None = None,
        ids: Sequence[int] | None = None,
        change: Callable[[Any], Any] = lambda model: model,
    ) -> "AskTell":
        """The run by a plan that was made before (:func:`sdekit.sampling.fixed.plan`)."""
        run = cls.__new__(cls)
        run._begin(sde, x_T, made, predicts, denoise, seed, ids, change)
        return run

    def _begin(
        self,
        sde: SDE,
        x_T: Tensor,
        made: Plan,
        predicts: str,
        denoise: bool,
        seed: Any,
        ids: Any,
        change: Any,
        budget: int | None = None,
    ) -> None:
        _checks.lookup(KINDS, predicts, "prediction")
        require_centred(sde, "AskTell")
        self._budget, self._asked = budget, 0
        self._answers = _Answers(sde, predicts)
        self._system = sde.reverse(change(self._answers), made.row.churn)
        self._system.replayed = True
        made.row.rule.check(self._system)
        self.t: float | None = made.top
        self._x = self.x = _checks.state(x_T.detach(), "x_T") * made.scale
        self._state: Any = None
        self._known: Any = None  # what the model was told to be known of the part's first x
        self._parts = self._listed(made, Noise(self.x, seed, ids, root=sde.root), denoise)
        self._steps = len(made.times) - 1 + denoise
        self._next()

    @property
    def done(self) -> int:
        """How many steps of the grid are done: the question is one of the step from the time of that number."""
        return max(0, self._steps - len(self._parts))

    @property
    def within(self) -> bool:
        """Whether the question is one within a step, at a state that is the rule's own: the caller must not move it."""
        return self.x is not self._x

    def _listed(self, made: Plan, noise: Noise, denoise: bool) -> list[Any]:
        """The parts of the run, each from x and a rule's state to the next."""
        system, rule, top, times = self._system, made.row.rule, made.top, made.times.tolist()

        def begin(x: Tensor, state: Any) -> tuple[Tensor, Any]:
            between = [t + c * (s - t) for t, s in pairwise(times) for c in rule.nodes]
            system.prepare(times + between, x)
            return x, rule.begin(system, times, x)

        def step(t: float, s: float) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
            def part(x: Tensor, state: Any) -> tuple[Tensor, Any]:
                noise.enter(t, s)
                return rule.step(system, x, t, s, noise, state)

            return part

        parts: list[Any] = [begin, *(step(t, s) for t, s in pairwise(times))]
        if top > times[0]:
            parts.insert(0, lambda x, state: (bridge(system, x, top, times[0], made.row.stochastic), state))
        if denoise:
            parts.append(lambda x, state: (rule.finish(system, x, times[-1], state), state))
        return parts

    def tell(self, output: Tensor, x: Tensor | None = None) -> None:
        """What the model said at the last ``x`` and ``t``, like x.

        ``x``: where it was evaluated instead, if the caller has moved the state since the step ended (inpainting does).
        Raises ValueError for an output of another shape, a state moved within a step, and a run that is at its end.
        """
        if self.t is None:
            raise ValueError("the run is at its end: there is nothing to tell, and x are the samples")
        if not isinstance(output, Tensor) or output.shape != self.x.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f"output must be what the model says at x, of shape {tuple(self.x.shape)}, got {got}")
        if x is not None and x is not self.x:
            if self.within:
                raise ValueError("x can be moved where a step begins, and here the model is asked within one")
            self._x = x
        parts, told = len(self._parts), self._answers.told
        told.append(output)
        self._asked += 1
        self._next()
        if parts == len(self._parts) and told:  # it is needed again, and a network may write its next result over it
            told[-1] = output.clone()
        if self.t is not None and self._asked == self._budget:
            raise RuntimeError(f"the step rule needs more than the nfe budget of {self._budget} evaluations")

    def _next(self) -> None:
        """On from what is known to the next question, or to the end."""
        while self._parts:
            self._answers.said, self._system.model.told = 0, self._known
            try:
                with torch.no_grad():
                    x, state = self._parts[0](self._x, _copied(self._state))
            except _Question as question:
                self.x, self.t = question.x, question.t
                return
            self._x, self._state, self._known = x, state, self._system.model.told
            self._answers.told.clear()
            del self._parts[0]
        self._system.settle()
        self.x, self.t = self._x, None

    def __deepcopy__(self, memo: dict[int, Any]) -> "AskTell":
        raise TypeError("a run cannot be copied on its way: copy what it is made of, and begin another")


def _copied(state: Any) -> Any:
    """A rule's state, for a step to change."""
    if isinstance(state, tuple):
        parts = [_copied(part) for part in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    if isinstance(state, list):  # what a list has in a tuple is taken for numbers of a grid
        return [part if isinstance(part, tuple) else _copied(part) for part in state]
    if isinstance(state, deque | dict | set) or hasattr(state, "__copy__"):
        return copy.copy(state)
    return state
