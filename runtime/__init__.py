"""Floor 2: frames in, visual tokens through, answers out. No PyTorch, no transformers."""
