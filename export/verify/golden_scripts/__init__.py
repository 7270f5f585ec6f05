"""Scripts that are copied into a golden run; they import nothing of Foveate."""
