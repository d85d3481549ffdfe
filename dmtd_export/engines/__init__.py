"""From a bundle to TensorRT engines: plan, build, read-back check, record."""
