"""Reading and writing checkpoints: safetensors and GGUF, without torch."""
