"""Checkpoints of DMTD language models, their PyTorch reference and the correctness oracle.

Importing this package, and every module that reads checkpoints, needs no torch; ``layers``, ``dmtd`` and ``oracle`` do.
"""
