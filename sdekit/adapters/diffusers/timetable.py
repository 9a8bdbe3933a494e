"""A run as a pipeline sees it: which times its network is told, one after the other, and where a run can begin."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdekit.adapters.diffusers.conventions import Convention
from sdekit.sampling.asktell import AskTell
from sdekit.sampling.fixed import Plan
from sdekit.sampling.samplers import Sampler
from sdekit.solvers.steppers import RULES
from sdekit.system import expand


class Timetable:
    """The evaluations of a plan: ``times`` of the process, and what the network is ``told`` there.

    ``told``: of the plan's times where it is not what the convention's clock says. ``change``: a function of models
    between what the network says and the rule. ``begins``: entry -> number of the plan's time, for entries where a step
    begins; ``factor``: what the network is asked at first, to x at the plan's top. They are found by letting the rule
    run on one number. Raises ValueError for a rule that does not evaluate x itself first.
    """

    def __init__(
        self,
        made: Convention,
        plan: Plan,
        denoise: bool,
        told: dict[float, float],
        change: Callable[[Any], Any],
        device: Any,
    ) -> None:
        self.made, self.plan, self._denoise, self._change = made, plan, denoise, change
        self.steps = len(plan.times) if denoise else len(plan.times) - 1
        one = torch.ones(1, 1, dtype=torch.float64)
        run, drawn = self._run(plan, one, 0, None), float(self._run(plan, torch.zeros_like(one), 0, None).x)
        times: list[float] = []
        self.factor, self.begins = float(run.x), {0: 0}
        if drawn:
            raise ValueError("this sampler adds noise before it evaluates, and a pipeline does not: let it start at T")
        if made.flow and abs(self.factor - 1) > 1e-6:  # whose pipelines hand the noise to the network as it is
            raise ValueError(
                f"this run begins at {self.factor:.4g} times noise, and pipelines of flow models do not multiply: take "
                "a named grid for a sampler with noise (karras), and calibrations that were made by this version"
            )
        while run.t is not None:
            if not run.within:
                self.begins.setdefault(len(times), run.done)
            times.append(run.t)
            run.tell(torch.zeros_like(one))
        self.times = torch.tensor(times, dtype=torch.float64)
        own = made.clock(self.times).tolist()
        clock = torch.tensor([told.get(t, c) for t, c in zip(times, own, strict=True)], dtype=torch.float64)
        whole = not made.flow and made.sigma_data is None and bool((clock == clock.round()).all())
        self.timesteps = clock.to(device, torch.int64 if whole else torch.float32)
        self.told: list[float] = self.timesteps.tolist()
        alpha, sigma = made.sde.alpha(self.times), made.sde.sigma(self.times)
        self.sigmas = torch.cat([sigma if made.flow else sigma / alpha, torch.zeros(1)]).float()

    def start(self, x: Tensor, k: int, noised: bool, seed: int, ids: Sequence[int] | None) -> AskTell:
        """The run from x at the plan's time of number k; at the first, x is what is made of noise unless ``noised``."""
        if k == 0 and not noised:
            return self._run(self.plan, x if self.factor == 1.0 else x / self.factor, seed, ids)
        times = self.plan.times[k:]
        return self._run(Plan(self.plan.row, times, float(times[0]), 1.0), x, seed, ids)

    def _run(self, plan: Plan, x: Tensor, seed: int, ids: Sequence[int] | None) -> AskTell:
        if len(plan.times) == 1:  # nothing is left but the denoising
            plan = plan._replace(row=Sampler(RULES["ddim"]))
        return AskTell.of(
            self.made.sde, x, plan, predicts=self.made.predicts, denoise=self._denoise, seed=seed, ids=ids,
            change=self._change,
        )  # fmt: skip

    def noised(self, x_0: Tensor, noise: Tensor, told: Tensor) -> Tensor:
        """alpha x_0 + sigma noise at entries of ``told``, () or (B,), like x_0."""
        told = torch.as_tensor(told).reshape(-1).cpu()
        known = dict(zip(reversed(self.told), reversed(self.times.tolist()), strict=True))  # the first of each
        own = self.made.time(told).tolist()
        times = torch.tensor([known.get(k, t) for k, t in zip(told.tolist(), own, strict=True)], dtype=torch.float64)
        times = times.expand(len(x_0)) if len(times) == 1 else times
        wide = x_0.to(torch.promote_types(x_0.dtype, torch.float32))
        alpha, sigma = (expand(f(times), wide) for f in (self.made.sde.alpha, self.made.sde.sigma))
        return (alpha * wide + sigma * noise.to(wide.dtype)).to(x_0.dtype)
