"""Read a checkpoint: its configuration, weights, processor and measured accuracy."""
