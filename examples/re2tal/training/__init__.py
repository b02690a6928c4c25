"""A run: how its model is built and laid out in memory, the training loop, checkpoints and logs."""
