"""The PyTorch reference of DMTD, and the oracle by full recomputation."""
