"""What a tower's activations are scaled by: found on frames, recorded, written into graphs."""
