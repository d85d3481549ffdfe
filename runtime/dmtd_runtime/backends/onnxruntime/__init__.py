"""The backend over a bundle's graphs in ONNX Runtime, on the CPU or a GPU."""
