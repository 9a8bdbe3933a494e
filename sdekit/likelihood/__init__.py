"""How probable data are: log densities by the flow, bits of discrete data, the variational bound."""

from sdekit.likelihood.bits import BitsPerDim, bits_per_dim
from sdekit.likelihood.bound import VariationalBound, variational_bound
from sdekit.likelihood.flow import Likelihood, log_likelihood, sample_with_log_prob

__all__ = [
    "BitsPerDim",
    "Likelihood",
    "VariationalBound",
    "bits_per_dim",
    "log_likelihood",
    "sample_with_log_prob",
    "variational_bound",
]
