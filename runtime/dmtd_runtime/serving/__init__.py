"""Sequences on their way: requests, the loop over steps, and the thread that drives a backend."""
