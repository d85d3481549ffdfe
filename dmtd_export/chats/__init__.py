"""Training text that the base model writes: ``write_chats``, through the runtime's own batches. See ``writer``."""

from dmtd_export.chats.writer import write_chats

__all__ = ["write_chats"]
