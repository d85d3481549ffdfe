"""Export of DMTD checkpoints to ONNX and TensorRT: builder, verification, command line."""
