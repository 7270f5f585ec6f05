"""Floor 3: the user's own frames become quantization scales and measures of agreement."""
