"""Find which layers lose most in INT8, and leave as few as the gate needs in floating point."""
