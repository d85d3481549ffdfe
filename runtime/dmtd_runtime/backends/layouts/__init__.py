"""How the rows of several slots become the inputs of one graph."""
