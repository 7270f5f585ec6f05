"""The vision half of a bundle as a model repository of NVIDIA's Triton server."""
