"""TensorRT and TensorRT-RTX: a graph becomes a plan on the device, and the plan runs."""
