"""From a checkpoint to a bundle on disk: weights, graphs, assets, manifest."""
