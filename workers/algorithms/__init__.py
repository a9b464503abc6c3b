"""Models without weights: published image processing on torch tensors, the same on GPU and CPU."""
