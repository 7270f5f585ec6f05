"""Turn checkpoints into bundles (floor 5, the only one that knows PyTorch models)."""
