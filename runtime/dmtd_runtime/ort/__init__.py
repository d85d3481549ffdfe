"""ONNX Runtime itself: importing it, its CUDA provider, sessions."""
