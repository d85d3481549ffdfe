"""`dmtd build`: TensorRT engines from the standard graphs of a bundle, without a GPU where the library can."""
