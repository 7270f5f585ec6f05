"""Which layers INT8 costs most, and how few of them in floating point meet a gate."""
