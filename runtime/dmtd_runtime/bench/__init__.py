"""The benchmark: plain and DMTD decoding, interleaved."""
