"""Text and tasks for training and evaluation. Torch-free; nothing is imported before it is used."""
