"""How alike two encodings of a picture are, where they part, and when that is good enough."""
