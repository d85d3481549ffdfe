"""A device in host memory that computes, behind a GPU's rules."""
