"""diffusers, both ways: its models and configs as (process, score), and our samplers as its ``pipe.scheduler``."""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError("sdekit.adapters.diffusers needs diffusers: pip install 'sdekit[diffusers]'") from error

from sdekit.adapters.diffusers.models import from_diffusers, load_folder
from sdekit.adapters.diffusers.scheduler import Scheduler

__all__ = ["Scheduler", "from_diffusers", "load_folder"]
