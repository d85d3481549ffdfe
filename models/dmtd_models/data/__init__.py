"""Text for training and measuring: a user's data, items of tasks, and leaks between the two."""
