"""Our samplers as what diffusers calls a scheduler."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from sdekit import _checks
from sdekit.adapters.diffusers.conventions import OWN, build, convention, parts, takes
from sdekit.adapters.diffusers.times import HOST, host_times, told_by_pipelines
from sdekit.adapters.diffusers.timetable import Timetable
from sdekit.adapters.seeds import seeds
from sdekit.models.thresholding import static_threshold
from sdekit.sampling.asktell import AskTell
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.fixed import Plan, plan
from sdekit.sampling.grids import GRIDS, INNER
from sdekit.sampling.samplers import SAMPLERS, as_sampler


class Scheduler(SchedulerMixin, ConfigMixin):
    """A row of ``SAMPLERS`` or a calibration as ``pipe.scheduler``.

        pipe.scheduler = Scheduler.from_config(pipe.scheduler.config, sampler="unipc_2")
        pipe(prompt, num_inference_steps=8)

    Process and prediction are those of the scheduler that is replaced (:func:`from_diffusers`); ``sampler`` names a row
    of ``SAMPLERS``; ``grid`` its times: None for what suits the sampler, a name in ``GRIDS``, or "host": the levels of
    the scheduler that is replaced, by its own formula, and the times that this tells the network (rounded, where it
    rounds). A shift that the config has, or makes of the image's size, moves the grids of few steps.
    ``num_inference_steps`` = N times, from the last of which a step leads to t = 0 (the denoising). A step of a sampler
    of ``order`` evaluations is so many entries of ``timesteps``, but for the last: N evaluations for a row of one.
    A ``calibration`` has N = its ``nfe``, and its own times.

    ``set_timesteps(sigmas=...)`` or ``(timesteps=...)`` are times in the replaced scheduler's words (a flow's sigmas
    are those before its shift), instead of the grid; linspace(1, 1/N, N), which the pipelines of flow models pass
    whatever they are asked, counts as nothing. The state is kept in float32 within, whatever the pipeline's dtype, and
    taken from the pipeline where that has changed what it was handed (inpainting). Noise is a function of ``generator``
    alone, of each sample's own where that is a list; where the pipeline hands none on, of the latents that it began
    with, sample by sample.
    ``clip_sample`` of the config clips x_0, and eps is that of the clipped x_0 (use_clipped_model_output).
    A run starts at noise times ``init_noise_sigma``, which is 1 but for EDM's process.
    """

    config_name: Any = "scheduler_config.json"
    _compatibles: list[str] = []  # noqa: RUF012

    def __init__(
        self,
        scheduler: Any,
        sampler: str | None = None,
        grid: str | None = None,
        calibration: Calibration | dict[str, Any] | None = None,
    ) -> None:
        """``scheduler``: the one that is replaced, or its config. Raises ValueError for what is not known, by name."""
        self._replaces, self._settings = parts(scheduler)
        if sampler is not None and calibration is not None:
            raise ValueError(f"a calibration is a sampler of its own: leave sampler out; got {sampler!r}")
        sampler = sampler or (None if calibration is not None else "unipc_2")
        row = as_sampler(_checks.lookup(SAMPLERS, sampler or "unipc_2", "sampler"))
        if grid is not None:
            _checks.lookup({**GRIDS, **INNER, HOST: None}, grid, "grid")
        fitted = Calibration(**calibration) if isinstance(calibration, dict) else calibration
        if fitted is not None and not isinstance(fitted, Calibration):
            raise TypeError(f"calibration must be what calibrate or load_calibration returns, got {calibration!r}")
        if fitted is not None and grid is not None:
            raise ValueError(f"a calibration has its own times: leave grid out; got {grid!r}")
        if self._heeds("thresholding"):
            raise ValueError(f"thresholding of {self._replaces} is not known here: set it to False in the config")
        self._calibration, self._sampler, self._grid = fitted, sampler or "unipc_2", grid
        self.order = 1 if fitted else max(1, row.rule.evaluations)
        stored = None if fitted is None else asdict(fitted)
        self.register_to_config(
            **self._settings,
            replaces=self._replaces,
            sampler=sampler,
            grid=grid,
            calibration=stored,
        )
        self._host = build(self._replaces, self._settings)
        convention(self._replaces, self._settings, 0.0)  # raises for what is not known
        self._table: Timetable | None = None
        self.timesteps, self.sigmas = self._host.timesteps, torch.zeros(0)
        self.num_inference_steps: int | None = None
        self._reset()

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Any, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """From the scheduler to be replaced, or its config, or that of one of this class.

        ``kwargs``: what is to be else: sampler, grid, calibration, or a setting. Raises TypeError for other words.
        """
        name, settings = parts(config)
        stored = getattr(config, "config", config)
        own = {key: stored[key] for key in OWN[:3] if "replaces" in stored and key in stored}
        if "grid" in kwargs or "calibration" in kwargs:  # the one excludes the other
            own = {"sampler": own["sampler"]} if "sampler" in own and "calibration" not in kwargs else {}
        own |= {key: kwargs.pop(key) for key in OWN[:3] if key in kwargs}
        settings |= {key: kwargs.pop(key) for key in takes(name) & set(kwargs)}
        if kwargs and not return_unused_kwargs:
            raise TypeError(f"{', '.join(kwargs)}: no setting of {name}, nor one of {', '.join(OWN[:3])}")
        scheduler = cls({**settings, "replaces": name}, **own)
        return (scheduler, kwargs) if return_unused_kwargs else scheduler

    def _heeds(self, key: str) -> Any:
        """A setting, if the class that is replaced has it: configs carry those of others along."""
        return self._settings.get(key) if key in takes(self._replaces) else None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Make ``timesteps`` (what the network is told, evaluation by evaluation) and ``sigmas`` (the levels there).

        ``mu``: the log of the shift, where the config has it depend on the size of the image; of no account elsewhere.
        Raises ValueError for times that do not decrease or are too few, and where mu is missing.
        """
        given = next((x for x in (sigmas, timesteps) if x is not None), None)
        if num_inference_steps is None:
            if given is None:
                raise ValueError("set_timesteps needs num_inference_steps, timesteps or sigmas")
            num_inference_steps = len(given) - int(sigmas is not None and float(given[-1]) == 0)
        n = _checks.count(num_inference_steps, "num_inference_steps")
        made, denoise = convention(self._replaces, self._settings, mu), True
        told: dict[float, float] = {}
        usual = given is not None and timesteps is None and made.flow and told_by_pipelines(given, n)
        explicit = given is not None and not usual
        if self._calibration is not None:
            if explicit or n != self._calibration.nfe:
                nfe = self._calibration.nfe
                raise ValueError(f"the calibration has its own {nfe} times: num_inference_steps must be that, got {n}")
            way = plan(made.sde, self._calibration, None, None, None, True, None, None)
        elif explicit or self._grid == HOST:
            made = made.by_level()
            times, told, denoise = host_times(self._host, made, n, timesteps, sigmas, mu)
            way = Plan(SAMPLERS[self._sampler], times, float(times[0]), 1.0)
        elif n < 2:
            raise ValueError("num_inference_steps must be at least 2, a step and the denoising, got 1")
        else:
            way = plan(made.sde, self._sampler, n - 1, None, self._grid, True, None, None)
        clipped = self._heeds("clip_sample")
        bound = float(self._settings.get("clip_sample_range", 1.0)) if clipped else None
        change = partial(_changed, made.sde, bound)
        self._table = table = Timetable(made, way, denoise, told, change, device)
        self.timesteps, self.sigmas, self.num_inference_steps = table.timesteps, table.sigmas, table.steps
        self._reset()

    @property
    def init_noise_sigma(self) -> float:
        """What noise is multiplied by to begin: the size of a state of data of unit size, hypot(alpha, sigma)."""
        if self._table is None:
            sde, top, factor = convention(self._replaces, self._settings, 0.0).sde, None, 1.0
        else:
            sde, top, factor = self._table.made.sde, self._table.plan.top, self._table.factor
        time = torch.tensor(sde.T if top is None or self._calibration else top, dtype=torch.float64)
        return float(torch.hypot(sde.alpha(time), sde.sigma(time))) * factor

    def _reset(self) -> None:
        self._run: AskTell | None = None
        self._handed: tuple[Tensor, Tensor, int] | None = None  # the state, the copy that was handed out, its version
        self._moved: list[Tensor] = []
        self._noised: set[float] = set()  # told times
        self._begin_index: int | None = None
        self.step_index: int | None = None

    @property
    def begin_index(self) -> int | None:
        """Where in ``timesteps`` the run begins, if the pipeline has said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The run begins at that entry of ``timesteps``."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """What the network is given: the state itself, and under EDM's convention c_in times it."""
        table = self._set()
        if table.made.sigma_data is None:
            return sample
        return sample * table.made.precondition(float(table.times[self._index]))[0]

    def _set(self) -> Timetable:
        if self._table is None:
            raise ValueError("call set_timesteps first")
        return self._table

    @property
    def _index(self) -> int:
        return (self._begin_index or 0) if self.step_index is None else self.step_index

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """The next state to evaluate the network at (in the end the sample), in ``sample``'s dtype, from what it said.

        A pipeline that begins in the middle and does not say where (set_begin_index) begins at the first entry that is
        told ``timestep``. Raises ValueError for a timestep out of turn, a run that is at its end, a begin within a
        step, an eta, and (at the end) for a state that was changed within a step.
        """
        if others.get("eta"):
            raise ValueError(f"eta = {others['eta']:g} is of DDIM: take sampler='ancestral', or another row with noise")
        table = self._set()
        index = self._first(table, timestep) if self.step_index is None else self.step_index
        if index >= len(table.told):
            raise ValueError("the run is at its end: call set_timesteps before the next")
        on_device = isinstance(timestep, Tensor) and timestep.device.type != "cpu"  # a look is a wait for it
        if not on_device and float(timestep) != table.told[index]:
            want = f"entry {index} of timesteps, {table.told[index]:g}"
            raise ValueError(f"timestep must be {want}, got {float(timestep):g}")
        if self._run is None:
            self._run = self._start(table, index, sample, generator)
        run, moved = self._run, self._changed(sample)
        out = model_output.to(run.x.dtype)
        if sample.ndim > 2 and out.shape[1] == 2 * sample.shape[1]:
            out = out[:, : sample.shape[1]]
        if table.made.sigma_data is not None:
            _, c_skip, c_out = table.made.precondition(run.t)
            out = c_skip * (run.x if moved is None else moved) + c_out * out
        run.tell(out, moved)
        self.step_index, state = index + 1, run.x.to(sample.dtype)
        copy = state.clone()  # which the pipeline may change
        self._handed = state, copy, copy._version
        if run.t is None and self._moved and bool(torch.stack(self._moved).any()):
            raise ValueError(f"the state was changed within a step of {self._sampler}: take a row of one evaluation")
        return SchedulerOutput(prev_sample=copy) if return_dict else (copy,)

    def _first(self, table: Timetable, timestep: Any) -> int:
        """Where a run begins."""
        if self._begin_index is not None:
            return self._begin_index
        told = float(timestep)
        return next((k for k in table.begins if table.told[k] == told), 0)

    def _changed(self, sample: Tensor) -> Tensor | None:
        """The state where the pipeline has changed what it was handed, in place or by another tensor; else None."""
        run, handed = self._run, self._handed
        if run is None or handed is None or (sample is handed[1] and sample._version == handed[2]):
            return None
        other = sample != handed[0]
        if run.within:
            self._moved.append(other.any())  # looked at in the end
            return None
        return torch.where(other, sample.to(run.x.dtype), run.x)

    def _start(self, table: Timetable, index: int, sample: Tensor, generator: Any) -> AskTell:
        if index not in table.begins:
            known = ", ".join(map(str, table.begins))
            raise ValueError(f"begin_index must be where a step evaluates what it begins with, {known}, got {index}")
        x, k = sample.to(torch.promote_types(sample.dtype, torch.float32)), table.begins[index]
        noised = table.told[index] in self._noised
        if self._calibration is not None and (k > 0 or noised):
            raise ValueError("a calibration is of the whole way from noise: start there, or take a row of SAMPLERS")
        seed, ids = seeds(generator, x) if table.plan.row.stochastic else (0, None)
        return table.start(x, k, noised, seed, ids)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x_0 + sigma eps at entries of ``timesteps``, () or (B,), like x_0; a run that follows begins there."""
        if self._run is None:
            self._noised |= {float(k) for k in torch.as_tensor(timesteps).reshape(-1).tolist()}
        return self._set().noised(original_samples, noise, timesteps)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """:meth:`add_noise`, as pipelines of flow models call it."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return int(self._settings.get("num_train_timesteps", 1000))


def _changed(sde: Any, bound: float | None, model: Any) -> Any:
    """A model whose x_0 is clipped, where the config says so."""
    return model if bound is None else static_threshold(sde, model, (-bound, bound))
