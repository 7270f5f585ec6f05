"""The user's own frames: which are taken, what they cover, and how a tower sees them."""
