"""A checkpoint with the routing of trained models, made without training."""
