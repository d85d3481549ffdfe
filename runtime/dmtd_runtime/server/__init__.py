"""The OpenAI-compatible server of `dmtd serve`. Nothing outside this folder and ``cli/serve.py`` imports it."""
