"""What says where the data are: a network as a score, the oracle's exact one, and functions from model to model."""

from sdekit.models import guidance
from sdekit.models.mixture import GaussianMixture
from sdekit.models.network import as_score
from sdekit.models.points import PointSet
from sdekit.models.thresholding import dynamic_threshold, static_threshold

__all__ = ["GaussianMixture", "PointSet", "as_score", "dynamic_threshold", "guidance", "static_threshold"]
