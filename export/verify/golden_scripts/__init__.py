"""Scripts that are copied into a golden run, with the one module of Foveate that they import."""
