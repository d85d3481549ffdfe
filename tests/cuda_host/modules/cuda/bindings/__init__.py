"""In place of cuda-bindings, whose own copy of the CUDA runtime wants a driver: its calls, over the stand-in library."""

__version__ = "13.0.0"
