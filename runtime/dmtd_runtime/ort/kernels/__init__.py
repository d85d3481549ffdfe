"""Products over quantised weights in C, and what a session needs to take them."""
