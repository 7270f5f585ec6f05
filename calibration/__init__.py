"""Quantize vision graphs on the user's own frames, and measure agreement (floor 4)."""
