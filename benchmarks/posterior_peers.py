"""azula's posterior samplers, on the levels of ours, for posterior.py.

What was set: its DDPMSampler (which is our "ancestral") over its denoisers, on Karras' levels; what it has as samplers
(DPS, PGDM, TDS) as they are. The last step, to level 0, is the denoised value. MMPS runs with its default, one
iteration of GMRES, and with conjugate gradients of as many iterations as y has numbers. DPS takes the norm of the whole
batch's residual, and is given one whose norm is the sum of the samples' own, as if each went alone; zeta is 1, its
default. PGDM knows no noise of y, and takes the pseudo-inverse of A. TDS's twist is PiGDM's Gaussian; its particles are
of one run, 16 times as many as draws, from which the draws are taken at random. DiffPIR has its defaults.
azula draws from the global generator, which is seeded inside and put back.

deepinv is not here: it needs torchvision, which is never installed here.
"""

from collections.abc import Callable
from typing import Any

import torch
from posterior_tasks import Case
from torch import Tensor

from sdekit.sampling.grids import make_grid

TDS_PARTICLES = 16


def _isotropic(case: Case) -> Any:
    from azula.linalg.covariance import IsotropicCovariance

    return IsotropicCovariance(case.std**2)


def _ddpm(case: Case, denoiser: Any) -> tuple[str, Any, dict[str, Any]]:
    return "DDPMSampler", denoiser, {}


def _mmps(case: Case, prior: Any, **settings: Any) -> tuple[str, Any, dict[str, Any]]:
    from azula.guidance import MMPSDenoiser

    return _ddpm(case, MMPSDenoiser(prior, case.y, lambda x: x @ case.a.mT, _isotropic(case), **settings))


def _tmpd(case: Case, prior: Any) -> tuple[str, Any, dict[str, Any]]:
    from azula.guidance import TMPDenoiser

    return _ddpm(case, TMPDenoiser(prior, case.y, lambda x: x @ case.a.mT, case.std**2))


def _diffpir(case: Case, prior: Any) -> tuple[str, Any, dict[str, Any]]:
    from azula.guidance import DiffPIRDenoiser

    return _ddpm(case, DiffPIRDenoiser(prior, case.y, lambda x: x @ case.a.mT, case.std**2))


def _dps(case: Case, prior: Any) -> tuple[str, Any, dict[str, Any]]:
    def residuals(x: Tensor) -> Tensor:
        return (case.y - x @ case.a.mT).norm(dim=1).sum()

    return "DPSSampler", prior, {"y": torch.zeros((), dtype=torch.float64), "A": residuals}


def _pgdm(case: Case, prior: Any) -> tuple[str, Any, dict[str, Any]]:
    inverse = torch.linalg.pinv(case.a)
    return "PGDMSampler", prior, {"y": case.y, "A": lambda x: x @ case.a.mT, "A_inv": lambda y: y @ inverse.mT}


def _tds(case: Case, prior: Any) -> tuple[str, Any, dict[str, Any]]:
    def twist(x: Tensor, level: Tensor) -> Tensor:
        v = case.std**2 + 1 / (1 / level**2 + 1 / case.spread**2)
        return -0.5 * (case.y - x @ case.a.mT).square() / v - 0.5 * v.log()

    return "TDSSampler", prior, {"twist": twist}


# name -> (case, azula's denoiser of the prior) -> (its sampler, the denoiser that runs in it, settings)
MAKE: dict[str, Callable[[Case, Any], tuple[str, Any, dict[str, Any]]]] = {
    "MMPS": _mmps,
    "MMPS, CG to the end": lambda case, prior: _mmps(case, prior, solver="cg", iterations=len(case.a)),
    "TMPD": _tmpd,
    "DiffPIR": _diffpir,
    "DPS": _dps,
    "PGDM": _pgdm,
    f"TDS, {TDS_PARTICLES} particles": _tds,
}


def draw(name: str, steps: int, case: Case, n: int, seed: int) -> Tensor:
    """n draws by azula's row of this name; one y for all."""
    from azula import denoise, guidance, sample
    from azula.noise import VESchedule

    levels = make_grid(case.sde, "karras", steps)
    log = levels.log()

    class Prior(denoise.Denoiser):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VESchedule(sigma_min=float(levels[-1]), sigma_max=float(levels[0]))

        def forward(self, x: Tensor, t: Tensor) -> Any:
            level = self.schedule.sigma(t)
            return denoise.DiracPosterior(x + level**2 * case.score(x, level))

    kind, inside, settings = MAKE[name](case, Prior())
    base = getattr(guidance, kind, None) or getattr(sample, kind)
    times = (log - log[-1]) / (log[0] - log[-1])
    sampler = type(kind, (base,), {"timesteps": times})(inside, silent=True, **settings)  # a property, of equal steps
    rows = TDS_PARTICLES * n if kind == "TDSSampler" else n
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        x = sampler(levels[0] * torch.randn(rows, case.d, dtype=torch.float64))
        x = inside(x, times[-1]).mean
        return x[torch.randperm(rows)[:n]]
