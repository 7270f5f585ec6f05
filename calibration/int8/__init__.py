"""Make an INT8 bundle from a float32 bundle: frames, scales and the gate in order."""
