"""Find, record and apply the scales of a tower's activations."""
