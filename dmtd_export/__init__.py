"""Export: a DMTD checkpoint becomes a bundle of ONNX graphs over one weights file, verified."""

__all__: list[str] = []
