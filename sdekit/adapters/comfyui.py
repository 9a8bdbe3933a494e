"""Our samplers, grids and calibrations as nodes of ComfyUI, for SamplerCustom and SamplerCustomAdvanced (out).

With sdekit installed where ComfyUI runs, one file ComfyUI/custom_nodes/sdekit_nodes.py of one line brings them in:

    from sdekit.adapters.comfyui import *

(A link to this file does too.) Every kind of model works: eps, v and EDM, whose states are x_0 + sigma eps, and flow
models, which are known by ComfyUI's own class CONST. ComfyUI is imported when a node runs, not before.
Trap: a shift of a flow model is a property of its ``model_sampling``; grids follow it.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdekit.adapters.k_diffusion import calibration_sigmas, noise_scale, sampler, sigmas
from sdekit.sampling.calibration import load_calibration
from sdekit.sampling.grids import GRIDS, INNER
from sdekit.sampling.samplers import SAMPLERS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

_BRIDGE = "Take the first step of a grid inner_... analytically, at no evaluation, where it is far above the image."


class SamplerNode:
    """A row of ``SAMPLERS`` as a SAMPLER."""

    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "make"
    RETURN_TYPES = ("SAMPLER",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node is given."""
        bridge = {"default": True, "tooltip": _BRIDGE}
        return {"required": {"sampler": (list(SAMPLERS), {"default": "unipc_2"}), "bridge": ("BOOLEAN", bridge)}}

    def make(self, sampler: str, bridge: bool = True) -> tuple[Any]:
        """(SAMPLER,)."""
        return (_ksampler(sampler, bridge=bridge),)


class GridNode:
    """A grid as SIGMAS: for a row that evaluates once a step, so many evaluations."""

    CATEGORY = "sampling/custom_sampling/schedulers"
    FUNCTION = "make"
    RETURN_TYPES = ("SIGMAS",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node is given."""
        return {
            "required": {
                "model": ("MODEL",),
                "grid": ([*INNER, *GRIDS], {"default": "inner_cubic"}),
                "steps": ("INT", {"default": 10, "min": 1, "max": 10000}),
                "denoise": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            }
        }

    def make(self, model: Any, grid: str, steps: int, denoise: float = 1.0) -> tuple[Tensor]:
        """(SIGMAS,): with ``denoise`` below 1 the last ``steps`` of steps/denoise, as ComfyUI's own schedulers have it.

        Empty with ``denoise`` 0; a single step, which is the denoising, begins where the grid does.
        """
        if denoise <= 0:
            return (torch.zeros(0),)
        sampling = model.get_model_object("model_sampling")
        low, high = float(sampling.sigma_min), float(sampling.sigma_max)
        whole = max(steps, int(steps / denoise)) if denoise < 1 else steps
        if whole == 1:
            return (torch.tensor([high, 0.0]),)
        flow = bool(noise_scale(sampling))
        levels = sigmas(grid, whole, low, high, flow=flow, shift=_shift(sampling) if flow else 1.0)
        return (levels if whole == steps else levels[-(steps + 1) :],)


class CalibrationNode:
    """A calibration's file as a SAMPLER with its SIGMAS."""

    CATEGORY = "sampling/custom_sampling/samplers"
    FUNCTION = "make"
    RETURN_TYPES = ("SAMPLER", "SIGMAS")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What the node is given."""
        return {"required": {"model": ("MODEL",), "path": ("STRING", {"default": "calibration.json"})}}

    @classmethod
    def IS_CHANGED(cls, model: Any, path: str) -> float:
        """Another number when the file is another."""
        return Path(path).stat().st_mtime

    def make(self, model: Any, path: str) -> tuple[Any, Tensor]:
        """(SAMPLER, SIGMAS)."""
        calibration = load_calibration(path)
        flow = bool(noise_scale(model.get_model_object("model_sampling")))
        return _ksampler(calibration), calibration_sigmas(calibration, flow=flow)


def _ksampler(which: Any, **options: Any) -> Any:
    try:
        from comfy.samplers import KSAMPLER
    except ImportError as error:
        raise ImportError("the nodes of sdekit.adapters.comfyui run within ComfyUI, which is not here") from error
    return KSAMPLER(sampler(which, **options))


def _shift(sampling: Any) -> float:
    """Of a flow's ``model_sampling``, whether it has that or mu: what it makes of the middle."""
    middle = float(sampling.sigma(sampling.timestep(torch.tensor(0.5))))
    return middle / (1 - middle)


NODE_CLASS_MAPPINGS = {"SdekitSampler": SamplerNode, "SdekitGrid": GridNode, "SdekitCalibration": CalibrationNode}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SdekitSampler": "sdekit sampler",
    "SdekitGrid": "sdekit grid",
    "SdekitCalibration": "sdekit calibration",
}
