"""The version of the whole distribution, spelled once."""

__version__ = "0.1.0"
