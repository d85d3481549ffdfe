"""Adapters: what training changed, apart from the base."""
