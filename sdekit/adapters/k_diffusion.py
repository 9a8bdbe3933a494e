"""k-diffusion's denoisers as models (in), and our samplers as functions of its signature, which is ComfyUI's too (out).

Their convention: x = x_0 + sigma eps, and D(x, sigma, **extra_args) is x_0, with sigma (B,). So alpha = 1, t = sigma,
predicts = "x0". Their wrappers are such D: DiscreteEpsDDPMDenoiser, DiscreteVDDPMDenoiser, CompVisDenoiser,
OpenAIDenoiser divide x by sqrt(1 + sigma^2) and look the time up by themselves; ``sigmas`` are their levels.
ComfyUI's flow models ("CONST") have x = (1 - sigma) x_0 + sigma eps, and D is x_0 too: the same, by RectifiedFlow.
Traps: x is not the state of the VP model within, but sqrt(1 + sigma^2) times that; a wrapper made with quantize=True
rounds sigma to the nearest level, so that D jumps between them; beyond its levels it takes the time of the last one.
ComfyUI starts at the highest level with noise times sqrt(1 + sigma^2), at any other with noise times sigma.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sdekit import _checks
from sdekit.adapters.edm import heat
from sdekit.adapters.seeds import ids_of
from sdekit.models.network import NetworkScore, as_score
from sdekit.processes.gaussian import HeatODE, RectifiedFlow
from sdekit.processes.sde import SDE
from sdekit.sampling.asktell import AskTell
from sdekit.sampling.calibration import Calibration
from sdekit.sampling.fixed import Plan
from sdekit.sampling.grids import INNER, Grid, make_grid
from sdekit.sampling.samplers import Sampler, as_sampler
from sdekit.solvers.steppers import RULES, StepRule


def from_k_diffusion(
    denoiser: Callable[..., Any], *, sigma_min: float | None = None, sigma_max: float | None = None
) -> tuple[SDE, NetworkScore]:
    """(process, model) of D(x, sigma, **extra_args) -> x_0; ``score.given(**extra_args)`` for conditions.

    ``sigma_min``, ``sigma_max``: the process's t_min and T; unless given, the ends of the ``sigmas`` of a wrapper, or
    of the wrapper within (``inner_model``, as in a CFGDenoiser). A ``Denoiser`` or a function has none: say them.

    Raises TypeError for what is no callable, ValueError where levels are missing or do not increase.
    """
    if not callable(denoiser) or isinstance(denoiser, type):
        raise TypeError(f"denoiser must be a callable D(x, sigma) -> x_0, got {denoiser!r}")
    if sigma_min is None or sigma_max is None:
        levels = _ends(denoiser)
        sigma_min = levels[0] if sigma_min is None else sigma_min
        sigma_max = levels[1] if sigma_max is None else sigma_max
    sde = heat(sigma_min, sigma_max)
    return sde, as_score(denoiser, sde, "x0")


def _ends(denoiser: Any) -> tuple[float, float]:
    """The ends of the levels of a wrapper."""
    inner = denoiser
    while inner is not None:
        if getattr(inner, "sigmas", None) is not None:
            sigmas = torch.as_tensor(inner.sigmas)
            return float(sigmas.min()), float(sigmas.max())
        inner = getattr(inner, "inner_model", None)
    raise ValueError(
        f"sigma_min and sigma_max must be given: {type(denoiser).__name__} has no sigmas to read them from (EDM's are "
        "0.002 and 80)"
    )


def sampler(
    which: str | Sampler | StepRule | Calibration = "unipc_2", *, flow: bool | None = None, bridge: bool = False
) -> Callable[..., Tensor]:
    """A row of ``SAMPLERS`` or a calibration as k-diffusion's ``sample_...`` functions are.

        sampler("unipc_2")(model, x, sigmas, extra_args=None, callback=None, disable=None, *, ids=None) -> samples

    ``model(x, sigma, **extra_args)``, sigma (B,), is x_0. ``sigmas``: 1-d, decreasing; 0 at the end stands for the
    denoising (the step that needs nothing below), otherwise x at the last of them is returned. x is at the first one.
    ``callback({"x", "i", "sigma", "sigma_hat", "denoised"})``: once a step, when the model has answered first;
    ``sigma_hat`` is what it was asked at. ``disable``: of the bar, as tqdm has it.
    Noise is a function of ``extra_args["seed"]`` and the sample's number, ``ids[i]`` (default i), alone; without
    either, of x, sample by sample: never of a global generator, which k-diffusion's own take.
    x is kept in float32, at least, and handed over and returned in its own dtype.

    ``flow``: whether x is (1 - sigma) x_0 + sigma eps; None: if ComfyUI's model says so, and not otherwise.
    ``bridge``: take the first step analytically, at no evaluation of its own, where it ends above the level
    sigma/alpha = 2 N, N the evaluations' number from there on: so the grids "inner_..." begin (:func:`sigmas`).
    A calibration's ``sigmas`` must be its own, :func:`calibration_sigmas`.

    Raises ValueError or TypeError for an unknown sampler, for sigmas that do not decrease, are no list of levels or not
    the calibration's, and for an x_0 of another shape than x.
    """
    row, name = as_sampler(which), which if isinstance(which, str) else type(which).__name__.lower()

    def run(
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: dict[str, Any] | None = None,
        callback: Callable[[dict[str, Any]], Any] | None = None,
        disable: bool | None = None,
        *,
        ids: Sequence[int] | None = None,
    ) -> Tensor:
        wide = _checks.state(x).to(torch.promote_types(x.dtype, torch.float32))
        scale = (1.0 if flow else 0.0) if flow is not None else noise_scale(_sampling_of(model))
        levels, options = _levels(sigmas, bool(scale)), extra_args or {}
        if len(levels) < 2:  # nothing to do
            return x
        denoise = bool(levels[-1] == 0)
        made, steps = Plan(row, levels[:-1] if denoise else levels, float(levels[0]), 1.0), len(levels) - 1
        if isinstance(which, Calibration):
            fitted = _own(which, levels, scale)
            begin = which.start * which.prior_std / which.sigma[0]  # x is noise of the first level's size
            made = Plan(Sampler(fitted.rule), torch.tensor(fitted.times, dtype=torch.float64), fitted.times[0], begin)
        elif bridge and steps > 1:
            rest = made.times[1:]
            r = float(rest[0] / (1 - rest[0] if scale else 1))
            made = made._replace(times=rest) if r >= 2 * len(rest) * (1 - 1e-3) else made
        if len(made.times) == 1:  # nothing is left but the denoising
            made = made._replace(row=Sampler(RULES["ddim"]))
        seed = options.get("seed")
        if seed is None and ids is None and made.row.stochastic:
            ids = ids_of(wide)
        sde = _process(made, scale)
        going = AskTell.of(sde, wide, made, predicts="x0", denoise=denoise, seed=seed or 0, ids=ids)
        told, before = -1, steps - (len(made.times) - 1 + denoise)  # a bridge is a step of the list too
        with tqdm(total=steps, disable=disable) as bar:
            while going.t is not None:
                asked = going.x.to(x.dtype)
                sigma = asked.new_full((len(x),), going.t)
                denoised = model(asked, sigma, **options)
                i = before + going.done
                if i > told:
                    bar.update(i - max(told, 0))
                    told = i
                    if callback is not None:
                        said = {"x": asked, "i": i, "sigma": sigmas[i], "sigma_hat": sigma[0], "denoised": denoised}
                        callback(said)
                going.tell(denoised)
            bar.update(steps - max(told, 0))
        return going.x.to(x.dtype)

    run.__name__ = run.__qualname__ = f"sample_{name}"
    return torch.no_grad()(run)


def sigmas(grid: Grid, n: int, sigma_min: float, sigma_max: float, *, flow: bool = False, shift: float = 1.0) -> Tensor:
    """Levels for n evaluations, from sigma_max down to sigma_min and 0, (n + 1,), by a name in ``GRIDS`` or INNER.

    ``flow``: sigma as flow models have it, in (0, 1]; their grids are those of the unshifted flow, u, and then shifted
    to ``shift`` u/(1 + (shift - 1) u). The grids "inner_..." may begin below sigma_max: then that is put before them,
    (n + 2,), and with ``sampler(..., bridge=True)`` it is n evaluations all the same.
    Raises ValueError for n < 2, an unknown grid, and levels that a process of that kind does not have.
    """
    n = _checks.count(n, "n", minimum=2)
    shift = _checks.positive(shift, "shift")
    if flow:
        low, high = (s / (shift - (shift - 1) * s) for s in (sigma_min, sigma_max))
        if not 0 < low < high <= 1:
            raise ValueError(f"sigmas of a flow model must lie in (0, 1], got {sigma_min:g} to {sigma_max:g}")
        sde: SDE = RectifiedFlow()
        sde.t_min, sde.T = low, high
    else:
        sde = heat(sigma_min, sigma_max)
    times = make_grid(sde, grid, n - 1)
    if isinstance(grid, str) and grid in INNER and float(times[0]) < sde.T:
        times = torch.cat([times.new_tensor([sde.T]), times])
    levels = shift * times / (1 + (shift - 1) * times) if flow else times
    return torch.cat([levels, levels.new_zeros(1)]).float()


def calibration_sigmas(calibration: Calibration, *, flow: bool = False) -> Tensor:
    """The calibration's levels in a host's words, with the 0 at the end, (nfe + 1,); ``flow`` as in :func:`sigmas`.

    Its process may be any: a VP model's calibration serves where the host has x_0 + sigma eps. Raises ValueError for
    one that begins where there is no signal, alpha = 0, if that has no sigma.
    """
    return torch.tensor([*_carried(calibration, flow).times, 0.0])


def noise_scale(model_sampling: Any) -> float:
    """Of ComfyUI's ``model_sampling``: c where x = (1 - sigma) x_0 + sigma c eps, and 0 for x = x_0 + sigma eps.

    The former is the class CONST of theirs, among the bases of a class that is made for each model.
    """
    flow = any(kind.__name__ == "CONST" for kind in type(model_sampling).__mro__)
    return float(getattr(model_sampling, "noise_scale", 1.0)) if flow else 0.0


def _sampling_of(model: Any) -> Any:
    """What ComfyUI's samplers look at to know a flow; None for a model that is not ComfyUI's."""
    patcher = getattr(getattr(model, "inner_model", None), "model_patcher", None)
    return None if patcher is None else patcher.get_model_object("model_sampling")


class _Flow(RectifiedFlow):
    """alpha = 1 - t, sigma = c t."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = c

    def sigma(self, t: Tensor) -> Tensor:
        """c t."""
        return self.c * t


def _process(made: Plan, scale: float) -> SDE:
    """That of the host's states: t is its sigma."""
    if not scale:
        return HeatODE(T=max(made.top, 1.0))
    return RectifiedFlow() if scale == 1 else _Flow(scale)


def _levels(sigmas: Any, flow: bool) -> Tensor:
    """The host's sigmas in float64, on the CPU."""
    levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    if levels.ndim != 1:
        raise ValueError(f"sigmas must be 1-d, got shape {tuple(levels.shape)}")
    if not (levels.diff() < 0).all() or not torch.isfinite(levels).all() or (levels < 0).any():
        raise ValueError(f"sigmas must decrease strictly, to 0 or above, got {levels.tolist()[:6]} ...")
    if flow and len(levels) and levels[0] > 1:
        raise ValueError(f"sigmas of a flow model must lie in [0, 1], got {float(levels[0]):g}; flow=False?")
    return levels


def _own(calibration: Calibration, levels: Tensor, scale: float) -> Calibration:
    """The calibration in the host's frame. Raises ValueError unless the levels are its own."""
    if scale not in (0.0, 1.0):
        raise ValueError(f"a calibration is for noise of unit size, and this model's has {scale:g}")
    fitted = _carried(calibration, bool(scale))
    own = torch.tensor([*fitted.times, 0.0], dtype=torch.float64)
    if len(levels) != len(own) or not torch.allclose(levels, own, rtol=1e-5):
        raise ValueError(
            f"a calibration has its own {len(own) - 1} evaluations: sigmas must be calibration_sigmas(calibration"
            f"{', flow=True' if scale else ''}), got {len(levels) - 1} from {float(levels[0]):g}"
        )
    return fitted


def _carried(calibration: Calibration, flow: bool) -> Calibration:
    """It for the states y = x/n, n = alpha, or alpha + sigma for a flow, and x_0 at the end.

    The score in y is n times that in x, and so p = scale/n score + n mix y is the same; the rest is divided by the next
    n, and where it multiplies x also multiplied by this one.
    """
    c = calibration
    n = [a + s if flow else a for a, s in zip(c.alpha, c.sigma, strict=True)]
    if n[0] == 0:
        raise ValueError("this calibration begins where alpha = 0, and sigma is infinite there: it is for flow=True")
    after, times = [*n[1:], 1.0], [s / k for s, k in zip(c.sigma, n, strict=True)]
    return replace(
        c,
        times=times,
        scale=[y / k for y, k in zip(c.scale, n, strict=True)],
        mix=[y * k for y, k in zip(c.mix, n, strict=True)],
        linear=[y * k / m for y, k, m in zip(c.linear, n, after, strict=True)],
        weights=[[w / m for w in row] for row, m in zip(c.weights, after, strict=True)],
        alpha=[a / k for a, k in zip(c.alpha, n, strict=True)],
        sigma=times,
    )
