"""The device under the TensorRT backend: ``base`` says what it must do, ``cuda`` and ``simulator`` do it."""
