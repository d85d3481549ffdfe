"""Models: the PyTorch reference of DMTD, the oracle, and the reading of checkpoints."""

__all__: list[str] = []
