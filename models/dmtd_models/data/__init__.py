"""Text for training and measuring: corpora and tasks out of packages, a user's own data, and leaks between the two."""
