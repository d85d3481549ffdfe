"""The graphs of a bundle: what DMTD computes, written in each dialect."""
