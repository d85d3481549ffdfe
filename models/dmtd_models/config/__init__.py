"""A model's shape and split, from the configurations that checkpoints carry."""
