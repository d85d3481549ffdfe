"""Runtime: generates text from a bundle through cycle and refill. No torch, no onnx."""

__all__: list[str] = []
