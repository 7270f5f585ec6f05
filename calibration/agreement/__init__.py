"""Measure how much two encodings of a picture agree, and find the stage where they differ."""
