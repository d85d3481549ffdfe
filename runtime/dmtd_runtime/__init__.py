"""Torch-free runtime of DMTD bundles."""
