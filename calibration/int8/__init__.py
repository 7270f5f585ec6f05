"""A float32 bundle becomes an INT8 one: frames, scales and the gate put together."""
