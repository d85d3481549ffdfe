"""Backends run the graphs of a bundle; each is imported only when it is asked for."""
