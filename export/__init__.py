"""Floor 4: a checkpoint becomes a bundle. The only floor that knows PyTorch models."""
