"""Random numbers that belong to a sample: keyed normals, and a Brownian path that is kept."""

from sdekit.noise.brownian import BrownianPath
from sdekit.noise.keyed import Noise

__all__ = ["BrownianPath", "Noise"]
