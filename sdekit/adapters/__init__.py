"""Other people's models and programs, one host each: imported by name, ``from sdekit.adapters.edm import from_edm``."""
